"""Tool calls: parsers that find them, schemas that force them, prompts that offer them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from asyncllm.api.parsing.events import Tool
from asyncllm.api.parsing.tools.base import NewId, ToolParser, new_id
from asyncllm.api.parsing.tools.json_formats import (
    BareJson,
    DeepSeekV3,
    GptOss,
    Hermes,
    KimiK2,
    Llama3Calls,
    Mistral,
    Phi4,
)
from asyncllm.api.parsing.tools.tagged_formats import Glm47, Qwen3Coder

_PARSERS: Final[dict[str, type[ToolParser]]] = {
    "qwen25": Hermes,
    "llama3": Llama3Calls,
    "mistral": Mistral,
    "hermes": Hermes,
    "deepseekv3": DeepSeekV3,
    "qwen3_coder": Qwen3Coder,
    "glm47": Glm47,
    "kimi_k2": KimiK2,
    "gpt_oss": GptOss,
    "phi4": Phi4,
    "json": BareJson,
}
# what --tool_call_parser may be; "json" reads what call_schema forces
FORMATS: Final = tuple(name for name in _PARSERS if name != "json")


def make_parser(format_name: str, tools: Sequence[Tool], make_id: NewId = new_id) -> ToolParser:
    """A parser for one answer.

    Args:
        format_name: one of FORMATS, or "json" for the calls that ``call_schema`` describes.
        tools: what the request offers.
        make_id: gives 24 hex digits for each call.

    Raises:
        KeyError: no such format.
    """
    return _PARSERS[format_name](tools, make_id)


def special_tokens(format_name: str) -> tuple[str, ...]:
    """Marks that are special tokens in some models: they must be in the text that is parsed.

    Raises:
        KeyError: no such format.
    """
    return _PARSERS[format_name].tokens
