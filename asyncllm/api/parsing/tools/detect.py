"""Detects the format of tool calls in a chat template, and describes tools where it does not.

Knows templates as text only; renders none.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Final

from asyncllm.api.parsing.events import Tool
from asyncllm.api.parsing.tools import deepseek
from asyncllm.api.parsing.tools.call_grammar import written

LIST: Final = "\ue000tools\ue001"
# the most telling first: several families use <tool_call>
_SIGNS: Final = (
    ("kimi_k2", ("<|tool_call_begin|>",)),
    ("deepseekv3", (deepseek.CALL,)),
    ("gpt_oss", ("<|channel|>", "to=functions.")),
    ("qwen3_coder", ("<function=", "<parameter=")),
    ("glm47", ("<arg_key>",)),
    ("mistral", ("[TOOL_CALLS]",)),
    ("qwen25", ("<tool_call>",)),
    ("phi4", ("<|tool|>", "<|/tool|>")),
    ("llama3", ("<|python_tag|>",)),
    ("llama3", ("<|eot_id|>", '"parameters"')),
)
_CODE: Final = re.compile(r"\{[%{](.*?)[%}]\}", re.DOTALL)
_COMMENT: Final = re.compile(r"\{#.*?#\}", re.DOTALL)
_QUOTED: Final = re.compile(r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"", re.DOTALL)
_KEY: Final = re.compile(r"\bmessage(?:\.tools\b|\[['\"]tools['\"]\])")
_ROLE: Final = re.compile(r"==\s*['\"]tool['\"]")
_TOOLS: Final = re.compile(r"(?<![\w.])tools(?!\w)")


def detect_format(template: str) -> str | None:
    """The tool-call format a chat template shows its model, None if it shows none we know."""
    plain = without_comments(template)
    for name, signs in _SIGNS:
        if all(sign in plain for sign in signs):
            return name
    return None


def without_comments(template: str) -> str:
    """A chat template's text and code, with DeepSeek's odd characters as they are."""
    plain = _COMMENT.sub("", template)
    return plain.replace("\\u2581", deepseek.SPACE).replace("\\uff5c", deepseek.BAR)


def template_uses_tools(template: str) -> bool:
    """Does a chat template put ``tools`` into the prompt?"""
    return any(_TOOLS.search(_QUOTED.sub("", part)) for part in _code(template))


def tools_in_system(template: str) -> bool:
    """Does a chat template take tools as JSON text, beside the system message's content?"""
    return any(map(_KEY.search, _code(template)))


def template_tells_results(template: str) -> bool:
    """Does a chat template know turns of the role "tool"?"""
    return any(map(_ROLE.search, _code(template)))


def _code(template: str) -> list[str]:
    return _CODE.findall(_COMMENT.sub("", template))


def system_text(tools: Sequence[Tool], spelling_name: str = "hermes") -> tuple[str, str]:
    """What a system message says about tools where the template does not: the text around the
    list of tools, with :data:`LIST` in its place, and the list.

    Args:
        spelling_name: of ``call_grammar.spelling``: how calls are to be written.
    """
    lines = (
        json.dumps(
            {
                "type": "function",
                "function": {
                    "name": tool.name,
                    "description": tool.description,
                    "parameters": tool.parameters,
                },
            },
            ensure_ascii=False,
        )
        for tool in tools
    )
    listed = "\n".join(lines)
    head = (
        f"These functions can be called; each line is one, with a JSON schema of its arguments:\n"
        f"<tools>\n{LIST}\n</tools>\n"
    )
    if spelling_name in ("hermes", "qwen25"):
        how = (
            "To call one, write its name and arguments as JSON between tool_call tags, and nothing"
            " after; for several calls, several pairs of tags:\n"
        )
        shown = written(spelling_name, [("NAME", {"KEY": "VALUE"})])
    else:
        how = (
            "To call functions, write their names and arguments so, here two, and nothing after:\n"
        )
        shown = written(spelling_name, [("NAME", {"KEY": "VALUE"}), ("NAME", {"KEY": "VALUE"})])
    return f"{head}{how}{shown}\nWhen no function helps, answer without one.", listed
