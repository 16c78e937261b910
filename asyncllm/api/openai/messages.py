"""Chat messages, and how they are brought to the one form chat templates expect.

Content becomes a string, roles those of the template, tool-call arguments objects. Knows OpenAI's
message shapes; knows neither templates nor tokens.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Annotated, Any, ClassVar, Final, Literal, NotRequired, get_args

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    ValidationInfo,
    WithJsonSchema,
    with_config,
)
from pydantic.json_schema import JsonSchemaValue
from typing_extensions import TypedDict

from asyncllm.api.common import json_body
from asyncllm.api.common.conversation import (
    MAX_MESSAGES,
    Messages,
    PartsContent,
    PastArguments,
    RefusalPart,
    TextPart,
    text_of,
)
from asyncllm.api.common.custom_tool import INPUT
from asyncllm.api.common.request import served_by
from asyncllm.api.common.request_model import (
    STRICT,
    Items,
    RequestModel,
    TaggedUnion,
    Unavailable,
    UnicodeStr,
    refuse,
)
from asyncllm.api.common.validation import preview

# of roles, where the template does not know them by these
OTHER_NAMES: Final = {"developer": "system", "function": "tool", "ipython": "tool"}
Speaker = Literal["system", "developer", "user"]
ToolRole = Literal["tool", "function", "ipython"]
ROLES: Final = (*get_args(Speaker), "assistant", *get_args(ToolRole))  # with every template


def _lower(role: object) -> object:
    return role.lower() if isinstance(role, str) else role


def in_any_case(roles: Sequence[str]) -> JsonSchemaValue:
    """What a role is that may be one of these."""
    words = (
        "".join(f"[{c.lower()}{c.upper()}]" if c.isalpha() else c for c in role) for role in roles
    )
    said = f"{' or '.join(roles)}, in any case"
    return {"type": "string", "description": said, "pattern": f"^({'|'.join(words)})$"}


def _of_template(role: str, info: ValidationInfo) -> str:
    """A role that only the template knows, as it spells it."""
    known = served_by(info).dialect.roles
    lower = role.lower()  # once: it may be as long as a body
    for each in (role, *sorted(known)):
        if each in known and each.lower() == lower:
            return each
    told = ", ".join(dict.fromkeys((*ROLES, *sorted(known))))
    refuse(f": {preview(role)} is not one of {told}")


def _described(roles: Sequence[str]) -> WithJsonSchema:
    return WithJsonSchema(in_any_case(roles))


# dicts, since there may be thousands, and an object costs several times what a dict does


@with_config(STRICT)
class CalledFunction(TypedDict):
    name: UnicodeStr
    arguments: NotRequired[PastArguments]


@with_config(STRICT)
class CalledCustom(TypedDict):
    name: UnicodeStr
    input: UnicodeStr


@with_config(STRICT)
class PastCall(TypedDict):
    """A tool call of an earlier turn: of a function, or of a custom tool."""

    id: NotRequired[UnicodeStr | None]
    function: NotRequired[CalledFunction]
    custom: NotRequired[CalledCustom]


def _of_some_tool(call: PastCall) -> PastCall:
    if "function" not in call and "custom" not in call:
        refuse(".function is missing", ".function")
    return call


class _ChatMessage(RequestModel):
    name: UnicodeStr | None = None
    tool_call_id: UnicodeStr | None = None
    tool_calls: Items[Annotated[PastCall, AfterValidator(_of_some_tool)]] = Field(
        default_factory=list
    )
    function_call: CalledFunction | None = None
    reasoning_content: UnicodeStr = ""
    reasoning: UnicodeStr = ""


class SpeakerMessage(_ChatMessage):
    role: Annotated[Speaker, BeforeValidator(_lower), _described(get_args(Speaker))]
    content: PartsContent


class ToolMessage(_ChatMessage):
    """What a tool gave, which may be nothing."""

    role: Annotated[ToolRole, BeforeValidator(_lower), _described(get_args(ToolRole))]
    content: PartsContent = ""


class ThinkingPart(RequestModel):
    """Reasoning in the content, as Mistral has it."""

    type: Literal["thinking"]
    thinking: PartsContent


AssistantPart = Annotated[
    UnicodeStr | TextPart | RefusalPart | ThinkingPart,
    TaggedUnion(other="content of type {} is not available"),
]
AssistantContent = Annotated[
    UnicodeStr | Items[AssistantPart], TaggedUnion("a string or an array of parts")
]


class AssistantChatMessage(_ChatMessage):
    """Which may have made calls only."""

    refused: ClassVar = {"audio": Unavailable("audio")}
    role: Annotated[Literal["assistant"], BeforeValidator(_lower), _described(["assistant"])]
    content: AssistantContent = ""
    refusal: UnicodeStr = ""  # in place of content


class OtherMessage(_ChatMessage):
    """Of a role that the template mentions; the OpenAPI document says which these are."""

    role: Annotated[str, AfterValidator(_of_template)]
    content: PartsContent = ""


def _bounded(messages: object) -> object:
    """Refuse arguments that take long to parse, before any of them is."""
    if isinstance(messages, list):
        json_body.check_nested(
            _arguments(messages), "messages: arguments of tool calls", "messages"
        )
    return messages


def _arguments(messages: list[object]) -> Iterator[str]:
    """Every call's arguments that are JSON text, in the order in which they will be parsed."""
    for message in messages:
        if not isinstance(message, dict):
            continue
        calls = message.get("tool_calls")
        for call in [*(calls if isinstance(calls, list) else ()), message]:
            if isinstance(call, dict):
                for key in ("function", "function_call"):
                    function = call.get(key)
                    if isinstance(function, dict) and isinstance(function.get("arguments"), str):
                        yield function["arguments"]


ChatMessage = SpeakerMessage | ToolMessage | AssistantChatMessage | OtherMessage
ChatMessages = Annotated[
    Items[Annotated[ChatMessage, TaggedUnion(key="role", fold=str.lower)]],
    Field(min_length=1, max_length=MAX_MESSAGES),
    BeforeValidator(_bounded),
]


def conversation(given: Sequence[ChatMessage], roles: Collection[str]) -> Messages:
    """The messages in template form.

    Args:
        roles: those that the template mentions.
    """
    return [_turn(message, roles) for message in given]


def template_kwargs(given: dict[str, object]) -> dict[str, object]:
    """Extra variables of the chat template; see :func:`prepare.check_variables`."""
    kwargs = dict(given)
    # two families of templates, two names of one switch
    for one, other in (("thinking", "enable_thinking"), ("enable_thinking", "thinking")):
        if one in kwargs:
            kwargs.setdefault(other, kwargs[one])
    return kwargs


def _turn(message: ChatMessage, roles: Collection[str]) -> dict[str, object]:
    role = message.role
    if role not in roles:
        role = OTHER_NAMES.get(role, role)
    content: Any = message.content
    thoughts: list[ThinkingPart] = []
    if not isinstance(content, str):
        thoughts = [part for part in content if isinstance(part, ThinkingPart)]
        if thoughts:
            content = [part for part in content if not isinstance(part, ThinkingPart)]
    refusal = message.refusal if isinstance(message, AssistantChatMessage) else ""
    turn: dict[str, object] = {"role": role, "content": text_of(content) or refusal}
    for key in ("name", "tool_call_id"):
        if (said := getattr(message, key)) is not None:
            turn[key] = said
    inside = "\n".join(text_of(part.thinking) for part in thoughts)
    if thought := message.reasoning_content or message.reasoning or inside:
        turn["reasoning_content"] = thought
    if message.tool_calls:
        turn["tool_calls"] = [_call(_called(call), call.get("id")) for call in message.tool_calls]
    elif message.function_call is not None:
        turn["tool_calls"] = [_call(message.function_call)]
    return turn


def _called(call: PastCall) -> CalledFunction:
    """A custom tool's call as that of a function, which it is to the model."""
    if "function" in call:
        return call["function"]
    custom = call["custom"]
    return {"name": custom["name"], "arguments": {INPUT: custom["input"]}}


def _call(function: CalledFunction, key: str | None = None) -> dict[str, object]:
    told = {"name": function["name"], "arguments": function.get("arguments", {})}
    call: dict[str, object] = {"type": "function", "function": told}
    return call if key is None else call | {"id": key}
