"""Renders chat messages to a prompt with the model's own Jinja template.

Knows templates and what they expect around them; knows no tokens, and leaves the checking of
messages to :mod:`asyncllm.api.openai.messages`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError, meta, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from asyncllm.api.parsing.tools.detect import LIST
from asyncllm.errors import RequestError, StartupError
from asyncllm.plain import T

USED = ("default", "tool_use")  # names of templates, of which the second one is for tools
# stands behind the last message's text, where a continued prompt is cut
_END = "\ue000continue\ue001"

# what a template can raise when it meets messages its author did not think of
_RENDER_ERRORS = (
    TemplateError,
    TypeError,
    ValueError,
    LookupError,
    AttributeError,
    ArithmeticError,
    RuntimeError,
)


class _TemplateArguments(dict[str, object]):
    """Arguments of a call: an object to most templates; to those that join it to text, its JSON."""

    def __str__(self) -> str:
        return json.dumps(self, ensure_ascii=False)

    def __add__(self, other: str) -> str:
        return str(self) + other

    def __radd__(self, other: str) -> str:
        return other + str(self)


class _RawArguments(str):
    """Arguments that are no JSON object: text that is written as it is."""


class ChatTemplate:
    """The compiled templates of one model.

    Args:
        templates: Jinja source by name; "default" is used, or "tool_use" where tools are given.
        special_tokens: bos_token, eos_token, ... as templates refer to them.

    Raises:
        StartupError: a template does not compile.
    """

    def __init__(self, templates: Mapping[str, str], special_tokens: Mapping[str, str]) -> None:
        self._special_tokens = dict(special_tokens)
        self._templates = _read(templates, _environment().from_string)

    def render(self, chat: Mapping[str, Any]) -> str:
        """The prompt of a conversation.

        Args:
            chat: {"messages": [...], "tools": [...] | None, "kwargs": {...}}. Messages are in
                template form: content is a string, tool-call arguments are objects, or text if
                they are none (in an object, for templates that take objects apart); ``listed``
                is put into the content, in the place of ``LIST``. kwargs are
                variables of the template, among them add_generation_prompt (default True), and
                continue_final_message, which ends the prompt with the last message's own text.

        Raises:
            RequestError: no template, or the template's own refusal.
        """
        messages: list[dict[str, Any]] = list(map(_with_list, chat["messages"]))
        tools = chat.get("tools") or None
        kwargs = dict(chat.get("kwargs") or {})
        continued = bool(kwargs.pop("continue_final_message", False))
        if continued:
            last = messages[-1]
            messages = [*messages[:-1], {**last, "content": last["content"] + _END}]
        usual, offering = (self._templates.get(name) for name in USED)
        template = offering or usual if tools else usual
        if template is None:
            raise RequestError(
                "this model has no chat template, so it cannot answer chat messages;"
                " use /v1/completions",
                param="messages",
            )
        variables = {"add_generation_prompt": not continued, **self._special_tokens, **kwargs}
        try:
            try:
                told = [_with_arguments(turn, _RawArguments) for turn in messages]
                text = template.render({**variables, "messages": told, "tools": tools})
            except _RENDER_ERRORS:
                if not any(map(_has_text_arguments, messages)):
                    raise
                told = [_with_arguments(turn, _wrapped) for turn in messages]
                text = template.render({**variables, "messages": told, "tools": tools})
        except _RENDER_ERRORS as error:
            raise RequestError(
                f"the chat template refuses these messages: {error}", param="messages"
            ) from error
        if not continued:
            return text
        if _END not in text:
            raise RequestError(
                "continue_final_message: the chat template leaves out the last message's text",
                param="messages",
            )
        return text[: text.rindex(_END)]


def _with_list(turn: dict[str, Any]) -> dict[str, object]:
    if "listed" not in turn:
        return turn
    before, _, behind = turn["content"].rpartition(LIST)
    rest = {key: value for key, value in turn.items() if key != "listed"}
    return rest | {"content": before + turn["listed"] + behind}


def _has_text_arguments(turn: dict[str, Any]) -> bool:
    calls = turn.get("tool_calls") or ()
    return any(isinstance(call["function"]["arguments"], str) for call in calls)


def _wrapped(arguments: str) -> _TemplateArguments:
    return _TemplateArguments(arguments=arguments)


def _with_arguments(turn: dict[str, Any], unread: Callable[[str], Any]) -> dict[str, object]:
    """``unread``: makes something of arguments that are text."""
    if not (calls := turn.get("tool_calls")):
        return turn
    told = []
    for call in calls:
        given = call["function"]["arguments"]
        read = unread(given) if isinstance(given, str) else _TemplateArguments(given)
        told.append({**call, "function": {**call["function"], "arguments": read}})
    return {**turn, "tool_calls": told}


def variables(templates: Mapping[str, str], special_tokens: Mapping[str, str]) -> frozenset[str]:
    """What templates read from outside, but special tokens: what a request may have to say.

    Raises:
        StartupError: as :class:`ChatTemplate`.
    """
    read = map(meta.find_undeclared_variables, _read(templates, _environment().parse).values())
    return frozenset().union(*read) - special_tokens.keys()


def roles(templates: Mapping[str, str]) -> frozenset[str]:
    """Roles of messages that templates ask about, as they spell them.

    Raises:
        StartupError: as :class:`ChatTemplate`.
    """
    found: set[str] = set()
    for tree in _read(templates, _environment().parse).values():
        for compared in tree.find_all(nodes.Compare):
            sides = [compared.expr, *(other.expr for other in compared.ops)]
            if any(map(_is_role, sides)):
                found.update(*map(_strings, sides))
        for used in tree.find_all(nodes.Filter):
            if used.args and _strings(used.args[0]) == {"role"}:  # selectattr("role", "eq", "tool")
                found.update(*map(_strings, used.args[2:]))
        looked_up = [item.node for item in tree.find_all(nodes.Getitem) if _is_role(item.arg)]
        tables = {node.name for node in looked_up if isinstance(node, nodes.Name)}
        for given in tree.find_all(nodes.Assign):
            if isinstance(given.target, nodes.Name) and given.target.name in tables:
                found |= _strings(given.node)
    return frozenset(role for role in found if role.isidentifier())


def _is_role(node: nodes.Node | None) -> bool:
    """Whether an expression is a message's role, or named so."""
    match node:
        case nodes.Getattr(attr=name) | nodes.Getitem(arg=nodes.Const(value=name)):
            return bool(name == "role")
        case nodes.Name(name=name):
            return "role" in name.lower()
        case nodes.Filter(node=inner):  # lower, trim
            return _is_role(inner)
        case _:
            return False


def _strings(node: nodes.Node) -> set[str]:
    """Those that an expression is made of; of an object its keys."""
    match node:
        case nodes.Const(value=str(text)):
            return {text}
        case nodes.List(items=items) | nodes.Tuple(items=items):
            return set().union(*map(_strings, items))
        case nodes.Dict(items=items):
            return set().union(*(_strings(pair.key) for pair in items))
        case _:
            return set()


def _read(templates: Mapping[str, str], call: Callable[[str], T]) -> dict[str, T]:
    """What ``call`` makes of each template. Raises StartupError: one does not compile."""
    try:
        return {name: call(text) for name, text in templates.items()}
    except TemplateSyntaxError as error:
        raise StartupError(f"chat template, line {error.lineno}: {error}") from error


# -- what chat templates expect of their environment -----------------------------------------------


def _environment() -> ImmutableSandboxedEnvironment:
    env = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=["jinja2.ext.loopcontrols", _Generation],
    )
    env.filters["tojson"] = _tojson
    env.globals["raise_exception"] = _raise
    env.globals["strftime_now"] = _strftime_now
    return env


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
    if isinstance(value, _RawArguments):
        return str(value)
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
