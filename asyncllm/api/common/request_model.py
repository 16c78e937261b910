"""Request bodies as pydantic models: what all of them share, types of fields, errors in our words.

The models say what a field may be, and the OpenAPI document and the tables of docs/api.md are made
of them. Knows JSON values; knows no route and no tokenizer.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from types import UnionType
from typing import (
    Annotated,
    ClassVar,
    Final,
    Literal,
    NoReturn,
    Self,
    TypeVar,
    Union,
    get_args,
    get_origin,
)

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    ValidationError,
    ValidationInfo,
    model_validator,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, ErrorDetails, PydanticCustomError, core_schema

from asyncllm.api.common.errors import NotAvailable
from asyncllm.api.common.validation import (
    MAX_INT32,
    MAX_LOGPROBS,
    MAX_N,
    MAX_SEED,
    MAX_STOP_CHARS,
    preview,
)
from asyncllm.errors import RequestError

_T = TypeVar("_T")
_M = TypeVar("_M", bound="RequestModel")

MAX_KEY: Final = 64  # characters of a client's own key in the place of an error
_VARIANT: Final = "\ue000"  # begins the name of a variant in the place of an error
_KEY: Final = "[key]"  # pydantic's: ends the place of an error in a key
_NEEDED: Final = {
    "int": "an integer",
    "float": "a number",
    "finite": "a number",
    "string": "a string",
    "bool": "true or false",
    "dict": "an object",
    "model": "an object",
    "list": "an array",
    "tuple": "an array",
}  # by the first word of pydantic's error type


STRICT: Final = ConfigDict(strict=True, extra="ignore", arbitrary_types_allowed=True)


class Unavailable:
    """A known field whose use cannot be honoured; only ``neutral`` values and null pass."""

    def __init__(self, what: str, *neutral: object) -> None:
        self.what, self.neutral = what, neutral

    @property
    def schema(self) -> JsonSchemaValue:
        """What the OpenAPI document says of it."""
        said = f"{self.what}: not available on this server"
        return {"description": said, "enum": [None, *self.neutral]}

    def check(self, value: object, name: str) -> None:
        """For validators."""
        if not any(value == each and type(value) is type(each) for each in self.neutral):
            why = f".{name}: {self.what} is not available on this server"
            refuse(why, f".{name}", code="not_available")


class RequestModel(BaseModel):
    """An object in a request: null means absent, fields it does not know are ignored.

    Attributes:
        refused: fields of this and other servers that cannot be honoured.
        ignored: those that cannot matter here, and why.
    """

    model_config = STRICT
    refused: ClassVar[Mapping[str, Unavailable]] = {}
    ignored: ClassVar[Mapping[str, str]] = {}

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, value: object) -> object:
        if not isinstance(value, dict):
            return value
        if None in value.values():
            value = {key: each for key, each in value.items() if each is not None}
        if not cls.refused.keys().isdisjoint(value):
            for name, each in cls.refused.items():
                if name in value:
                    each.check(value[name], name)
        return value

    @classmethod
    def __get_pydantic_json_schema__(
        cls, core: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        schema = handler(core)
        told = handler.resolve_ref_schema(schema)
        told["additionalProperties"] = True
        fields = told.setdefault("properties", {})
        for name, field in fields.items():
            if name not in told.get("required", ()):
                _or_null(field)
        fields |= {name: each.schema for name, each in cls.refused.items()}
        fields |= {name: {"description": f"ignored: {why}"} for name, why in cls.ignored.items()}
        return schema

    def filled(self, known: Mapping[str, object]) -> Self:
        """This with the values of ``known`` for fields that the request does not mention."""
        mine, given = type(self).model_fields, self.model_fields_set
        more = {name: known[name] for name in known if name in mine and name not in given}
        return self.model_copy(update=more) if more else self


def parse(model: type[_M], body: Mapping[str, object], context: object = None) -> _M:
    """``body`` as this model.

    Args:
        context: for validators that ask what is served.

    Raises:
        RequestError: for the first bad value (400), or what a validator raises.
    """
    try:
        return model.model_validate(body, context=context)
    except ValidationError as error:
        raise _explained(error.errors(include_url=False)[0]) from None


def refuse(why: str, at: str = "", code: str = "invalid_value") -> NoReturn:
    """For validators: the value is wrong.

    Args:
        why: with its value and limit; its name is put before it, so it begins with ": " or " ".
        at: where in the value.
    """
    raise PydanticCustomError("refused", "{why}", {"why": why, "at": at, "code": code})


# -- types of fields ---------------------------------------------------------------------------


def _whole(value: object) -> object:
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _bounded(value: object) -> object:
    # beyond every range anyway, but an int can be too large for a float
    return min(max(value, -(2**53)), 2**53) if type(value) is int else value


def encodable(value: AnyObject) -> AnyObject:
    """The same object, if no string in it has a lone surrogate; for validators."""
    try:
        text = json.dumps(value, ensure_ascii=False)
    except RecursionError:
        refuse(" is nested too deeply")
    if surrogate(text) is not None:
        at, why = _surrogate_in(value)
        refuse(at + why, at)
    return value


def _surrogate_in(value: object) -> tuple[str, str]:
    """Where in a JSON value the first lone surrogate is, and what is wrong; "", "": nowhere."""
    if isinstance(value, str) and (why := surrogate(value)) is not None:
        return "", why
    inner: Iterable[tuple[str | int, object]] = ()
    if isinstance(value, dict):
        inner = value.items()
    elif isinstance(value, list):
        inner = enumerate(value)
    for key, each in inner:
        if isinstance(key, str) and (why := surrogate(key)) is not None:
            return "", f": the key {preview(key)}{why}"
        at, why = _surrogate_in(each)
        if why:
            part = _name((key,))
            return (part if part.startswith("[") else f".{part}") + at, why
    return "", ""


def surrogate(value: str) -> str | None:
    """What is wrong with a string that has lone surrogates."""
    if value.isascii():
        return None
    try:
        value.encode()
    except UnicodeEncodeError as error:
        return f" is not valid Unicode: lone surrogate at character {error.start}"
    return None


Integer = Annotated[int, BeforeValidator(_whole)]  # 3.0 is one
Float = Annotated[float, BeforeValidator(_bounded), Field(allow_inf_nan=False)]
# without lone surrogates, which no tokenizer can encode
UnicodeStr = Annotated[str, Field(min_length=0)]  # any limit makes pydantic look at characters
StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]
# the first bad item is told, so no other need be looked for
Items = Annotated[list[_T], Field(fail_fast=True)]
AnyObject = dict[str, object]
# one that the prompt tells of, which no lone surrogate can be part of
ToldObject = Annotated[AnyObject, AfterValidator(encodable)]


def limits_text(low: float | None, high: float | None, above: bool = False) -> str:
    """A range in words, e.g. ``(0, 10]``; "" where there is none."""
    if low is None and high is None:
        return ""
    least = "(-inf" if low is None else f"{'(' if above else '['}{low:g}"
    if high is None:
        return f"{least}, inf)"
    return f"{least}, {high:g}]" if abs(high) < 1e6 else f"{least}, {int(high)}]"


class Range:
    """Inclusive limits of a number; ``above`` makes ``low`` exclusive.

    Args:
        what: a number outside is not; "": in the limits.
    """

    def __init__(
        self, low: float, high: float | None = None, *, above: bool = False, what: str = ""
    ) -> None:
        self.low, self.high, self.above = low, high, above
        self.what = what or f"in {limits_text(low, high, above)}"

    def __get_pydantic_core_schema__(
        self, source: object, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        low, high = self.low, self.high
        limits: CoreSchema = core_schema.float_schema(ge=low, le=high)
        if source is int:
            limits = core_schema.int_schema(ge=int(low), le=None if high is None else int(high))
        elif self.above:
            limits = core_schema.float_schema(gt=low, le=high)
        told = core_schema.custom_error_schema(
            limits,
            "range",
            custom_error_message="range",
            custom_error_context={"what": self.what},
        )
        return core_schema.chain_schema([handler(source), told])

    def __get_pydantic_json_schema__(
        self, core: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        schema = handler(core)
        schema["exclusiveMinimum" if self.above else "minimum"] = self.low
        if self.high is not None:
            schema["maximum"] = self.high
        return schema


Positive = Annotated[Integer, Range(1, MAX_INT32)]
NonNegative = Annotated[Integer, Range(0, MAX_INT32)]
Probability = Annotated[Float, Range(0, 1)]
TopP = Annotated[
    Probability,
    Field(
        description="sample from the smallest set of tokens with at least this total probability; "
        "0: greedy"
    ),
]
TopK = Annotated[
    Integer,
    Range(-1, MAX_INT32),
    Field(description="sample from this many most likely tokens; -1 or 0: all"),
]
Streamed = Annotated[bool, Field(description="answer as server-sent events")]
WithSpecialTokens = Annotated[
    bool, Field(description="the tokenizer may put a bos token before a text prompt")
]
RepetitionPenalty = Annotated[Float, Range(0, 10, above=True)]
Seed = Annotated[Integer, Range(-1, MAX_SEED)]
NumChoices = Annotated[Integer, Range(1, MAX_N)]
NumBest = Annotated[Integer, Range(0, MAX_LOGPROBS)]


class TaggedUnion:
    """For a union: the value alone decides which member it is to be, so that one error is told.

    Members are models, told apart by the strings that ``key`` may be, and at most one string, array
    and model without ``key``. One whose ``key`` may be any string takes those of no other.

    Args:
        what: a value must be, in words.
        fold: makes one of the known strings of another spelling of it.
        other: what is said of an object whose ``key`` is another string, which is then called not
            available; "": that its ``key`` is none of those known.
    """

    def __init__(
        self,
        what: str = "an object",
        key: str = "type",
        other: str = "",
        *,
        fold: Callable[[str], str] = str,
    ) -> None:
        self.what, self.key, self.other, self.fold = what, key, other, fold

    def __get_pydantic_core_schema__(
        self, source: object, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        members = (source,) if isinstance(source, type) else get_args(source)
        tags = {tag: member for member in members for tag in self._tags(member)}
        known = {tag[2:]: tag for tag in tags if tag.startswith(f"{_VARIANT}=")}
        other = f"{_VARIANT}="

        def tag_of(value: object) -> str:
            if isinstance(value, dict) and (kind := value.get(self.key)) is not None:
                if not isinstance(kind, str):
                    return other
                return known.get(kind) or known.get(self.fold(kind), other)
            return _type_tag(value)

        return core_schema.tagged_union_schema(
            {tag: handler.generate_schema(member) for tag, member in tags.items()},
            tag_of if known else _type_tag,
            custom_error_type="variant",
            custom_error_message="variant",
            custom_error_context={
                "what": self.what,
                "key": self.key if known else "",
                "known": ", ".join(known),
                "other": self.other,
            },
        )

    def _tags(self, member: object) -> list[str]:
        while get_origin(member) is Annotated:
            member = get_args(member)[0]
        if get_origin(member) in (Union, UnionType):
            return [tag for each in get_args(member) for tag in self._tags(each)]
        if not isinstance(member, type) or not issubclass(member, BaseModel):
            kind = get_origin(member) or member
            name = "str" if kind is Literal else getattr(kind, "__name__", "")
            return [f"{_VARIANT}{name}"]
        field = member.model_fields.get(self.key)
        if field is None:
            return [f"{_VARIANT}dict"]
        silent = [] if field.is_required() else [f"{_VARIANT}dict"]
        # a model may say the strings itself, where there are more spellings of them
        words = getattr(member, "kinds", get_args(field.annotation)) or ("",)
        return [*(f"{_VARIANT}={word}" for word in words), *silent]


def _type_tag(value: object) -> str:
    return _VARIANT + type(value).__name__


class Checked:
    """A value that a function checks and converts, of a type that pydantic cannot read.

    Args:
        check: value, and what pydantic knows of it, to a result of any type.
        told: a type that says what the value may be.
    """

    def __init__(self, check: Callable[[object, ValidationInfo], object], told: object) -> None:
        self.check, self.told = check, told

    def __get_pydantic_core_schema__(
        self, source: object, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        told = handler.generate_schema(self.told)
        return core_schema.with_info_plain_validator_function(
            self.check, json_schema_input_schema=told
        )


# -- errors and limits in words ----------------------------------------------------------------


def _explained(found: ErrorDetails) -> RequestError:
    place, value, context = found["loc"], found["input"], found.get("ctx", {})
    name = _name(place[:-2] if place[-1:] == (_KEY,) else place)  # of a key: where it stands
    match found["type"]:
        case "refused":
            at = name + context["at"]
            code = context["code"]
            kind = NotAvailable if code == NotAvailable.code else RequestError
            why = (name + context["why"]).removeprefix(".")
            return kind(why, param=at.removeprefix("."), code=code)
        case "missing":
            why = " is missing"
        case "range":
            why = f": {preview(value)} is not {context['what']}"
        case "literal_error":
            known = context["expected"].replace("'", "").replace(" or ", ", ")
            why = f": {preview(value)} is not {'one of ' if ', ' in known else ''}{known}"
        case "string_unicode":
            why = surrogate(value) or ""
        case "too_long" | "string_too_long":
            why = f": {_counted(value, len(value))}, at most {context['max_length']}"
        case "too_short" | "string_too_short":
            why = f" must hold at least {_counted(value, context['min_length'])}"
        case "variant":
            return _no_variant(name, value, context)
        case other:
            why = f" must be {_NEEDED[other.partition('_')[0]]}, not {preview(value)}"
    return RequestError(name + why, param=name, code="invalid_value")


def _no_variant(name: str, value: object, context: Mapping[str, str]) -> RequestError:
    key, other = context["key"], context["other"]
    if not key or not isinstance(value, dict):
        why = f" must be {context['what']}, not {preview(value)}"
        return RequestError(name + why, param=name, code="invalid_value")
    kind, at = value.get(key), f"{name}.{key}"
    if not other:
        why = f": {preview(kind)} is not one of {context['known']}"
    elif not isinstance(kind, str):
        why = f" must be a string, not {preview(kind)}"
    else:
        there = " and ".join(context["known"].rsplit(", ", 1))
        verb = "is" if there == context["known"] else "are"
        why = f"{name}: {other.format(preview(kind))} on this server; {there} {verb}"
        return NotAvailable(why, param=at)
    return RequestError(at + why, param=at, code="invalid_value")


def _name(place: tuple[int | str, ...]) -> str:
    """``messages[0].content``, of the keys and indices that lead there."""
    name = ""
    for part in place:
        if isinstance(part, int) or (part.isdecimal() and len(part) <= MAX_KEY):
            name += f"[{part}]"
        elif part.isidentifier() and len(part) <= MAX_KEY:
            name += f".{part}" if name else part
        elif not part.startswith(_VARIANT):
            name += f"[{preview(part)}]"  # a key of the client's own
    return name


def _counted(value: object, number: int) -> str:
    one, more = ("character", "characters") if isinstance(value, str) else ("entry", "entries")
    return f"{number} {one if number == 1 else more}"


def _or_null(schema: JsonSchemaValue) -> None:
    """Null is absence wherever absence is allowed."""
    null = {"type": "null"}
    members = [each for each in schema.pop("anyOf", ()) if each != null]
    if len(members) == 1:  # of a field that is None where it is absent
        schema |= members[0]
    if "const" in schema:
        schema["enum"] = [schema.pop("const")]
    if isinstance(kind := schema.get("type"), str):
        schema["type"] = [kind, "null"]
    if "enum" in schema and None not in schema["enum"]:
        schema["enum"].append(None)
    if told := {key: schema.pop(key) for key in ("$ref", "oneOf") if key in schema}:
        members = [told]
    if len(members) > 1 or told:
        schema["anyOf"] = [*members, null]
