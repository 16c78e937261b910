"""How each format writes a tool call, and the grammars that force or guide one.

Knows no grammar engine.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

from asyncllm.api.parsing.events import Tool
from asyncllm.api.parsing.tools import deepseek
from asyncllm.api.parsing.tools.schema import arguments_schema

Style = Literal["json", "qwen_xml", "glm_xml"]


@dataclass(frozen=True, slots=True)
class CallText:
    """How a format writes a call: ``begin``, the arguments, ``end``; ``%s`` is the name.

    Args:
        trigger: every begin starts with it, and nothing else that a model writes does.
        opens, between, closes: the text before, between and after the calls of an answer.
        style: how arguments are written.
        quoted: the name is part of a JSON string.
    """

    trigger: str
    begin: str
    end: str
    opens: str = ""
    between: str = ""
    closes: str = ""
    style: Style = "json"
    quoted: bool = False

    def begun(self, name: str) -> str:
        """The text before the arguments of a call of ``name``."""
        return self.begin.replace("%s", json.dumps(name)[1:-1] if self.quoted else name)


_HERMES: Final = CallText(
    trigger="<tool_call>",
    begin='<tool_call>\n{"name": "%s", "arguments": ',
    end="}\n</tool_call>",
    between="\n",
    quoted=True,
)
CALL_TEXTS: Final = {
    "qwen25": _HERMES,
    "hermes": _HERMES,
    "llama3": CallText(
        trigger='{"name": "',
        begin='{"name": "%s", "parameters": ',
        end="}",
        between="; ",
        quoted=True,
    ),
    "mistral": CallText(trigger="[TOOL_CALLS]", begin="[TOOL_CALLS]%s[ARGS]", end=""),
    "mistral list": CallText(
        trigger='{"name": "',
        begin='{"name": "%s", "arguments": ',
        end="}",
        opens="[TOOL_CALLS] [",
        between=", ",
        closes="]",
        quoted=True,
    ),
    "deepseekv3": CallText(
        trigger=deepseek.CALL,
        begin=f"{deepseek.CALL}function{deepseek.SEP}%s\n```json\n",
        end=f"\n```{deepseek.CALL_END}",
        opens=deepseek.CALLS,
        between="\n",
        closes=deepseek.CALLS_END,
    ),
    "deepseekv31": CallText(
        trigger=deepseek.CALL,
        begin=f"{deepseek.CALL}%s{deepseek.SEP}",
        end=deepseek.CALL_END,
        opens=deepseek.CALLS,
        closes=deepseek.CALLS_END,
    ),
    "qwen3_coder": CallText(
        trigger="<tool_call>",
        begin="<tool_call>\n<function=%s>\n",
        end="\n</function>\n</tool_call>",
        between="\n",
        style="qwen_xml",
    ),
    "glm47": CallText(
        trigger="<tool_call>", begin="<tool_call>%s", end="</tool_call>", style="glm_xml"
    ),
    "kimi_k2": CallText(
        trigger="<|tool_call_begin|>",
        begin="<|tool_call_begin|>functions.%s:0<|tool_call_argument_begin|>",
        end="<|tool_call_end|>",
        opens="<|tool_calls_section_begin|>",
        closes="<|tool_calls_section_end|>",
    ),
    "gpt_oss": CallText(
        trigger="<|channel|>commentary to=functions.",
        begin="<|channel|>commentary to=functions.%s <|constrain|>json<|message|>",
        end="<|call|>",
    ),
    "phi4": CallText(
        trigger='{"name": "',
        begin='{"name": "%s", "arguments": ',
        end="}",
        opens="<|tool_call|>[",
        between=", ",
        closes="]<|/tool_call|>",
        quoted=True,
    ),
}


def spelling(format_name: str, template: str = "") -> str:
    """The name of a format's variant, for :data:`CALL_TEXTS`.

    Args:
        format_name: one of FORMATS.
        template: the chat template, which decides between variants.
    """
    if format_name == "mistral" and "[ARGS]" not in template:
        return "mistral list"
    if format_name == "deepseekv3" and template and "```json" not in template:
        return "deepseekv31"
    return format_name


def written(spelling_name: str, calls: Sequence[tuple[str, dict[str, object] | str]]) -> str:
    """Calls as a model writes them that uses this format.

    Args:
        spelling_name: of :func:`spelling`.
        calls: name and arguments of each; arguments that are text stand as they are.
    """
    form = CALL_TEXTS[spelling_name]
    begun = {name: form.begun(name) for name in {name for name, _ in calls}}
    each = (f"{begun[name]}{_arguments(form.style, values)}{form.end}" for name, values in calls)
    return form.opens + form.between.join(each) + form.closes


_encode: Final = json.JSONEncoder(ensure_ascii=False).encode  # dumps makes one for each value


def _arguments(style: Style, values: dict[str, object] | str) -> str:
    if isinstance(values, str):
        return values
    if style == "json":
        return _encode(values)
    texts = {
        key: value if isinstance(value, str) else _encode(value) for key, value in values.items()
    }
    if style == "qwen_xml":
        return "\n".join(f"<parameter={k}>\n{v}\n</parameter>" for k, v in texts.items())
    return "".join(f"<arg_key>{k}</arg_key><arg_value>{v}</arg_value>" for k, v in texts.items())


def call_forms(spelling_name: str, tools: Sequence[Tool]) -> str:
    """The text of a grammar of kind "calls" (see ``core.request.GRAMMARS``).

    Arguments of strict tools fit their schemas, those of others are any object. It ends with the
    arguments where their end is plain to see: what stands behind them the model knows.

    Args:
        spelling_name: of :func:`spelling`.
    """
    form = CALL_TEXTS[spelling_name]
    if form.style == "json":
        end = "}" if form.quoted else ""
    else:
        end = form.end[: form.end.index(">") + 1]
    calls = [
        {
            "begin": form.begun(tool.name).removeprefix(form.trigger),
            "schema": arguments_schema(tool if tool.strict else Tool(tool.name)),
            "style": form.style,
            "end": end,
        }
        for tool in tools
    ]
    return f"{form.trigger}\n{json.dumps(calls)}"
