"""Architecture name of config.json -> the code that reads it and runs it, imported on first use."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING

from asyncllm.errors import StartupError

if TYPE_CHECKING:
    from asyncllm.models.model import Model, Site
    from asyncllm.models.spec import Json, ModelSpec


@dataclass(frozen=True, slots=True)
class Family:
    """What serves an architecture, as ``module:name``.

    Attributes:
        decoder: called with (spec, site), gives a :class:`asyncllm.models.model.Model`.
        reader: called with the spec by the common names of config.json and with config.json, gives
            the architecture's spec; must not import torch. "": the common names say it all.
    """

    decoder: str
    reader: str = ""

    def read(self, spec: ModelSpec, hf: Json) -> ModelSpec:
        if not self.reader:
            return spec
        module, _, name = self.reader.partition(":")
        reader: Callable[[ModelSpec, Json], ModelSpec] = getattr(import_module(module), name)
        return reader(spec, hf)

    def make(self, spec: ModelSpec, site: Site) -> Model:
        module, _, name = self.decoder.partition(":")
        decoder: Callable[[ModelSpec, Site], Model] = getattr(import_module(module), name)
        return decoder(spec, site)


MODELS = {
    "LlamaForCausalLM": Family("asyncllm.models.llama:Decoder"),
    "Qwen2ForCausalLM": Family("asyncllm.models.llama:Decoder", "asyncllm.models.qwen2:read"),
}


def family(architecture: str) -> Family:
    """Raises StartupError for a model this server does not run."""
    if architecture not in MODELS:
        known = ", ".join(sorted(MODELS))
        raise StartupError(
            f"architecture {architecture!r} is not available yet (there are: {known})"
        )
    return MODELS[architecture]
