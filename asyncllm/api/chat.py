"""Chat messages to the text of a prompt, by the model's own Jinja template.

Knows messages and templates; knows no tokens and no HTTP.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from asyncllm.errors import RequestError, StartupError

ROLES = ("system", "developer", "user", "assistant", "tool", "function")
_MAY_BE_EMPTY = ("assistant", "tool", "function")
_OURS = ("messages", "tools")

# what a template can raise when it meets messages its author did not think of
_RENDER_ERRORS = (
    TemplateError,
    TypeError,
    ValueError,
    LookupError,
    AttributeError,
    ArithmeticError,
    RecursionError,
)


class ChatTemplate:
    """The compiled templates of one model.

    Args:
        templates: Jinja source by name; "default" is used, or "tool_use" where tools are given.
        special_tokens: bos_token, eos_token, ... as templates refer to them.

    Raises:
        StartupError: a template does not compile.
    """

    def __init__(self, templates: Mapping[str, str], special_tokens: Mapping[str, str]) -> None:
        env = ImmutableSandboxedEnvironment(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=["jinja2.ext.loopcontrols", _Generation],
        )
        env.filters["tojson"] = _tojson
        env.globals["raise_exception"] = _raise
        env.globals["strftime_now"] = _strftime_now
        self._source = "".join(templates.values())
        self._special_tokens = dict(special_tokens)
        try:
            self._templates = {name: env.from_string(text) for name, text in templates.items()}
        except TemplateSyntaxError as error:
            raise StartupError(f"chat template, line {error.lineno}: {error}") from error

    def render(self, chat: Mapping[str, Any]) -> str:
        """The prompt of a conversation.

        Args:
            chat: {"messages": [...], "tools": [...] | None, "kwargs": {...} | None}; kwargs are
                variables of the template, among them add_generation_prompt (default True).

        Raises:
            RequestError: bad messages, no template, or the template's own refusal.
        """
        messages = self._messages(chat.get("messages"))
        tools = chat.get("tools") or None
        kwargs = chat.get("kwargs") or {}
        if taken := [name for name in _OURS if name in kwargs]:
            raise RequestError(
                f"chat_template_kwargs may not set {taken[0]}", param="chat_template_kwargs"
            )
        template = self._templates.get("tool_use") if tools else None
        template = template or self._templates.get("default")
        if template is None:
            raise RequestError(
                "this model has no chat template, so it cannot answer chat messages;"
                " use /v1/completions",
                param="messages",
            )
        variables = {"add_generation_prompt": True, **self._special_tokens, **kwargs}
        try:
            return template.render({**variables, "messages": messages, "tools": tools})
        except _RENDER_ERRORS as error:
            raise RequestError(
                f"the chat template refuses these messages: {error}", param="messages"
            ) from error

    def _messages(self, messages: object) -> list[dict[str, Any]]:
        if not isinstance(messages, list) or not messages:
            raise RequestError("messages must be a list with at least one entry", param="messages")
        return [self._message(message, f"messages[{i}]") for i, message in enumerate(messages)]

    def _message(self, message: object, where: str) -> dict[str, Any]:
        if not isinstance(message, dict):
            raise RequestError(f"{where} must be an object", param=where)
        role = self._role(message.get("role"), where)
        out = {**message, "role": role, "content": _content(message.get("content"), role, where)}
        if message.get("tool_calls") is None:
            out.pop("tool_calls", None)  # templates ask whether the key is there
        else:
            out["tool_calls"] = _tool_calls(message["tool_calls"], f"{where}.tool_calls")
        return out

    def _role(self, role: object, where: str) -> str:
        """A known role in lower case, or any other that the template mentions."""
        if isinstance(role, str):
            known = role.lower()
            if known == "developer" and not self._mentions(known):
                return "system"  # the newer name for the same thing
            if known in ROLES:
                return known
            if self._mentions(role):
                return role
        raise RequestError(
            f"{where}.role is {role!r}, must be one of {', '.join(ROLES)}", param=f"{where}.role"
        )

    def _mentions(self, word: str) -> bool:
        return f"'{word}'" in self._source or f'"{word}"' in self._source


def _content(content: object, role: str, where: str) -> str:
    """One text; templates get neither null nor lists, which many of them cannot take."""
    where = f"{where}.content"
    if isinstance(content, str):
        return content
    if content is None and role in _MAY_BE_EMPTY:
        return ""
    if not isinstance(content, list):
        raise RequestError(f"{where} must be a string or a list of parts", param=where)
    texts: list[str] = []
    for i, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        if isinstance(part, str):
            texts.append(part)
        elif kind == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif kind == "text":
            raise RequestError(f"{where}[{i}].text must be a string", param=f"{where}[{i}]")
        else:
            raise RequestError(
                f"{where}[{i}]: parts of type {kind!r} are not available, only 'text'",
                param=f"{where}[{i}]",
            )
    return "\n".join(texts)


def _tool_calls(calls: object, where: str) -> list[dict[str, Any]]:
    """As given, but with arguments as an object: templates write them out as JSON themselves."""
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise RequestError(f"{where} must be a list of objects", param=where)
    out: list[dict[str, Any]] = []
    for call in calls:
        function = call.get("function")
        if isinstance(function, dict) and isinstance(arguments := function.get("arguments"), str):
            call = {**call, "function": {**function, "arguments": _object(arguments)}}
        out.append(call)
    return out


def _object(text: str) -> object:
    """The JSON object in ``text``, or ``text`` itself where it is none."""
    try:
        value = json.loads(text or "{}")
    except ValueError:
        return text
    return value if isinstance(value, dict) else text


# -- what chat templates expect of their environment -------------------------------------------------


class _Generation(Extension):
    """``{% generation %}`` marks the assistant's words for training; here it changes nothing."""

    tags = {"generation"}  # noqa: RUF012  (the base class declares it so)

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Plain JSON: Jinja's own filter escapes for HTML."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise(message: str) -> None:
    raise TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)
