"""Architecture name of config.json -> class that runs it, imported on first use."""

from __future__ import annotations

from asyncllm.errors import StartupError

MODELS = {
    "LlamaForCausalLM": "asyncllm.models.llama:Decoder",
}


def check_architecture(architecture: str) -> None:
    """Raise StartupError for a model this server does not run."""
    if architecture not in MODELS:
        known = ", ".join(sorted(MODELS))
        raise StartupError(
            f"architecture {architecture!r} is not available yet (there are: {known})"
        )
