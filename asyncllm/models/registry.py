"""Maps a config.json's architecture to the code that reads and runs it, imported on use."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from difflib import get_close_matches
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

from asyncllm.errors import StartupError

if TYPE_CHECKING:
    from asyncllm.models.model import Model, ModelContext
    from asyncllm.models.spec import ConfigDict, ModelSpec


@dataclass(frozen=True, slots=True)
class Family:
    """The code for an architecture, as ``module:name``.

    Attributes:
        decoder: called with (spec, site), returns a :class:`asyncllm.models.model.Model`.
        reader: called with the spec by the common names of config.json and with config.json, gives
            the architecture's spec. "": the common names say it all.
        opener: called with config.json before anything is read, gives what of it describes the
            decoder, with the architecture's own defaults. "": that is all, and there are none.
        turns_parts: rotary embeddings may turn a part of each head only.

    Reader and opener must not import torch.
    """

    decoder: str
    reader: str = ""
    opener: str = ""
    turns_parts: bool = False

    def config(self, hf: ConfigDict) -> ConfigDict:
        if not self.opener:
            return hf
        opener: Callable[[ConfigDict], ConfigDict] = getattr(*_place(self.opener))
        return opener(hf)

    def read(self, spec: ModelSpec, hf: ConfigDict) -> ModelSpec:
        if not self.reader:
            return spec
        reader: Callable[[ModelSpec, ConfigDict], ModelSpec] = getattr(*_place(self.reader))
        return reader(spec, hf)

    def make(self, spec: ModelSpec, site: ModelContext) -> Model:
        decoder: Callable[[ModelSpec, ModelContext], Model] = getattr(*_place(self.decoder))
        return decoder(spec, site)


def _place(path: str) -> tuple[ModuleType, str]:
    module, _, name = path.partition(":")
    return import_module(module), name


_DECODER = "asyncllm.models.llama:Decoder"


def _common(module: str, reader: str = "", opener: str = "") -> Family:
    path = f"asyncllm.models.{module}:"
    return Family(_DECODER, path + reader if reader else "", path + opener if opener else "")


MODELS = {
    "DeepseekV2ForCausalLM": _common("deepseek", "read2", "config2"),
    "DeepseekV3ForCausalLM": _common("deepseek", "read3", "config3"),
    "LlamaForCausalLM": Family(_DECODER),
    "Qwen2ForCausalLM": _common("qwen", "read2", "config2"),
    "Qwen3ForCausalLM": _common("qwen", "read3", "config3"),
    "MistralForCausalLM": _common("mistral", "", "config"),
    "MinistralForCausalLM": _common("mistral", "", "config"),
    "Ministral3ForCausalLM": _common("mistral", "read3", "config3"),
    "Mistral3ForConditionalGeneration": _common("mistral", "read_text", "config_text"),
    "Gemma2ForCausalLM": _common("gemma", "read", "config2"),
    "Gemma3ForCausalLM": _common("gemma", "read3", "config3"),
    "Gemma3ForConditionalGeneration": _common("gemma", "read_text", "config_text"),
    "Phi3ForCausalLM": replace(_common("phi3", "read", "config"), turns_parts=True),
    "MixtralForCausalLM": _common("mixtral", "read", "config"),
    "Qwen2MoeForCausalLM": _common("qwen_moe", "read2", "config2"),
    "Qwen3MoeForCausalLM": _common("qwen_moe", "read3", "config3"),
}
# the architecture by model_type, for files that name none
_BY_TYPE = {
    "deepseek_v2": "DeepseekV2ForCausalLM",
    "deepseek_v3": "DeepseekV3ForCausalLM",
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "mistral": "MistralForCausalLM",
    "ministral": "MinistralForCausalLM",
    "ministral3": "Ministral3ForCausalLM",
    "mistral3": "Mistral3ForConditionalGeneration",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "gemma3": "Gemma3ForConditionalGeneration",
    "phi3": "Phi3ForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "qwen2_moe": "Qwen2MoeForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
}


def family(architectures: object, model_type: object = None) -> tuple[str, Family]:
    """The architecture that a config.json names, and its code.

    Of several names the first that is served counts, however its letters are spelled
    (``LLaMAForCausalLM``). Where there are none ``model_type`` decides.

    Raises:
        StartupError: for a model this server does not run.
    """
    listed = architectures if isinstance(architectures, list) else [architectures]
    names = [str(name) for name in listed if name]
    spelled = {name.lower(): name for name in MODELS}
    served = [spelled[name.lower()] for name in names if name.lower() in spelled]
    if not names and str(model_type) in _BY_TYPE:
        served = [_BY_TYPE[str(model_type)]]
    if served:
        return served[0], MODELS[served[0]]
    # "qwen3_vl" is nearer to Qwen3 than "Qwen3VLForConditionalGeneration" to anything
    told = names[0] if names else ""
    heads = {name.partition("For")[0].lower(): name for name in MODELS}
    asked = str(model_type or told.partition("For")[0]).lower().replace("_", "")
    near = [heads[name] for name in get_close_matches(asked, heads, 3, 0.0)]
    raise StartupError(
        f"{f'architecture {told!r}' if told else f'model_type {model_type!r}'} is not available "
        f"yet (the nearest that are: {', '.join(near)})"
    )
