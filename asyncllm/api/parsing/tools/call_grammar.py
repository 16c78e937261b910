"""Calls that a grammar forces or guides: how each format spells them, as begin, arguments and end.

Knows no grammar engine.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

from asyncllm.api.parsing.events import Tool
from asyncllm.api.parsing.tools import deepseek
from asyncllm.api.parsing.tools.schema import arguments_schema

Style = Literal["json", "qwen_xml", "glm_xml"]


@dataclass(frozen=True, slots=True)
class Tag:
    """One tool's call: ``begin``, then arguments by ``schema`` in ``style``, then ``end``."""

    begin: str
    schema: dict[str, Any]
    end: str
    style: Style = "json"


@dataclass(frozen=True, slots=True)
class Tags:
    """Calls among free text.

    Args:
        triggers: free text may not go on with anything but a tag once one of these has come.
        tags: one for each tool; every begin starts with a trigger.
        opens: what stands before the first call where a call is forced, and is no part of a tag.
        between: what stands between two calls.
        closes: what stands behind the last.
    """

    triggers: tuple[str, ...]
    tags: tuple[Tag, ...]
    opens: str = ""
    between: str = ""
    closes: str = ""


@dataclass(frozen=True, slots=True)
class _Spelling:
    """A format's call; ``%s`` is the name."""

    trigger: str
    begin: str
    end: str
    opens: str = ""
    between: str = ""
    closes: str = ""
    style: Style = "json"
    quoted: bool = False  # the name stands in a JSON string

    def begun(self, name: str) -> str:
        """What stands before the arguments of a call of ``name``."""
        return self.begin.replace("%s", json.dumps(name)[1:-1] if self.quoted else name)

    def tags(self, tools: Sequence[Tool]) -> Tags:
        made = tuple(
            Tag(self.begun(tool.name), arguments_schema(tool), self.end, self.style)
            for tool in tools
        )
        return Tags((self.trigger,), made, self.opens, self.between, self.closes)


_HERMES: Final = _Spelling(
    trigger="<tool_call>",
    begin='<tool_call>\n{"name": "%s", "arguments": ',
    end="}\n</tool_call>",
    between="\n",
    quoted=True,
)
_SPELLINGS: Final = {
    "qwen25": _HERMES,
    "hermes": _HERMES,
    "llama3": _Spelling(
        trigger='{"name": "',
        begin='{"name": "%s", "parameters": ',
        end="}",
        between="; ",
        quoted=True,
    ),
    "mistral": _Spelling(trigger="[TOOL_CALLS]", begin="[TOOL_CALLS]%s[ARGS]", end=""),
    "mistral list": _Spelling(
        trigger='{"name": "',
        begin='{"name": "%s", "arguments": ',
        end="}",
        opens="[TOOL_CALLS] [",
        between=", ",
        closes="]",
        quoted=True,
    ),
    "deepseekv3": _Spelling(
        trigger=deepseek.CALL,
        begin=f"{deepseek.CALL}function{deepseek.SEP}%s\n```json\n",
        end=f"\n```{deepseek.CALL_END}",
        opens=deepseek.CALLS,
        between="\n",
        closes=deepseek.CALLS_END,
    ),
    "deepseekv31": _Spelling(
        trigger=deepseek.CALL,
        begin=f"{deepseek.CALL}%s{deepseek.SEP}",
        end=deepseek.CALL_END,
        opens=deepseek.CALLS,
        closes=deepseek.CALLS_END,
    ),
    "qwen3_coder": _Spelling(
        trigger="<tool_call>",
        begin="<tool_call>\n<function=%s>\n",
        end="\n</function>\n</tool_call>",
        between="\n",
        style="qwen_xml",
    ),
    "glm47": _Spelling(
        trigger="<tool_call>", begin="<tool_call>%s", end="</tool_call>", style="glm_xml"
    ),
    "kimi_k2": _Spelling(
        trigger="<|tool_call_begin|>",
        begin="<|tool_call_begin|>functions.%s:0<|tool_call_argument_begin|>",
        end="<|tool_call_end|>",
        opens="<|tool_calls_section_begin|>",
        closes="<|tool_calls_section_end|>",
    ),
    "gpt_oss": _Spelling(
        trigger="<|channel|>commentary to=functions.",
        begin="<|channel|>commentary to=functions.%s <|constrain|>json<|message|>",
        end="<|call|>",
    ),
    "phi4": _Spelling(
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
    """The name of a format's variant, for :func:`tags`.

    Args:
        format_name: one of FORMATS.
        template: the chat template, which tells variants apart.
    """
    if format_name == "mistral" and "[ARGS]" not in template:
        return "mistral list"
    if format_name == "deepseekv3" and template and "```json" not in template:
        return "deepseekv31"
    return format_name


def tags(format_name: str, tools: Sequence[Tool], template: str = "") -> Tags:
    """How calls of ``tools`` look in a format.

    Args:
        format_name: one of FORMATS.
        template: the chat template, which tells a format's variants apart.

    Raises:
        KeyError: no such format.
    """
    return _SPELLINGS[spelling(format_name, template)].tags(tools)


def written(spelling_name: str, calls: Sequence[tuple[str, dict[str, Any]]]) -> str:
    """Calls as a model writes them that uses this format.

    Args:
        spelling_name: of :func:`spelling`.
        calls: name and arguments of each.
    """
    form = _SPELLINGS[spelling_name]
    begun = {name: form.begun(name) for name, _ in calls}
    each = (f"{begun[name]}{_arguments(form.style, values)}{form.end}" for name, values in calls)
    return form.opens + form.between.join(each) + form.closes


def _arguments(style: Style, values: dict[str, Any]) -> str:
    if style == "json":
        return json.dumps(values, ensure_ascii=False)
    texts = {
        key: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        for key, value in values.items()
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
    form = _SPELLINGS[spelling_name]
    made = form.tags([tool if tool.strict else Tool(tool.name) for tool in tools])
    (trigger,) = made.triggers
    end = (
        ("}" if form.quoted else "")
        if form.style == "json"
        else form.end[: form.end.index(">") + 1]
    )
    told = [
        {
            "begin": tag.begin.removeprefix(trigger),
            "schema": tag.schema,
            "style": tag.style,
            "end": end,
        }
        for tag in made.tags
    ]
    return f"{trigger}\n{json.dumps(told)}"
