"""Fields that give the output a form: a JSON schema, a regular expression, a grammar.

Knows the fields' JSON values and limits; what a schema or grammar means is checked where it is
compiled.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Annotated, ClassVar, Final, Literal, Self

from pydantic import AfterValidator, Field, PlainValidator, field_validator, model_validator

from asyncllm.api.common.request_model import (
    AnyObject,
    Items,
    RequestModel,
    Unavailable,
    UnicodeStr,
    refuse,
    surrogate,
)
from asyncllm.api.common.validation import preview, reject

MAX_CHARS: Final = 65_536
MAX_CHOICES: Final = 1024

Grammar = tuple[str, str]  # kind, text: see SamplingParams.grammar
JSON: Final[Grammar] = ("json", "")  # any JSON object
_COMPACT_OBJECT: Final[Grammar] = ("compact", '{"type": "object"}')
_EMPTY: Final = "is empty; leave it out if nothing is to constrain the output"
_SCHEMA: Final = "a JSON schema: an object, or a string of one"


def of_object(value: object) -> Grammar:
    """A JSON schema as an object; for validators."""
    if not isinstance(value, dict):
        refuse(f" must be an object, not {preview(value)}")
    try:
        # its order is that of the output; ASCII, since a string may hold half a character
        return "schema", _limited(json.dumps(value))
    except RecursionError:
        refuse(" is nested too deeply")


def checked_schema(value: AnyObject) -> AnyObject:
    """The same, where it can be a schema; for validators."""
    of_object(value)
    return value


def _of_object_or_text(value: object) -> Grammar | None:
    if value == "":
        return None
    if isinstance(value, dict):
        return of_object(value)
    if not isinstance(value, str):
        refuse(f" must be {_SCHEMA}, not {preview(value)}")
    if (why := surrogate(value)) is not None:
        refuse(why)
    _limited(value)
    try:
        parsed = json.loads(value)
    except RecursionError:
        refuse(" is nested too deeply")
    except ValueError as error:
        refuse(f" is not valid JSON: {error}")
    if not isinstance(parsed, dict):
        refuse(f" must be {_SCHEMA}, not {preview(parsed)}")
    return "schema", value


def _limited(text: str) -> str:
    if len(text) > MAX_CHARS:
        refuse(f": {len(text)} characters, at most {MAX_CHARS}")
    return text


def _possible(value: str) -> str:
    if not value or "\0" in value:
        refuse(": an output cannot be empty or hold NUL")
    return value


def _choices(value: list[str]) -> list[str]:
    _limited(json.dumps(value, ensure_ascii=False))
    return value


SchemaObject = Annotated[Grammar, PlainValidator(of_object, json_schema_input_type=AnyObject)]
# "" is none
SchemaOrText = Annotated[
    Grammar | None, PlainValidator(_of_object_or_text, json_schema_input_type=AnyObject | str)
]
GrammarText = Annotated[UnicodeStr, AfterValidator(_limited)]  # of a regular expression, or in EBNF
Choices = Annotated[
    Items[Annotated[UnicodeStr, AfterValidator(_possible)]],
    Field(max_length=MAX_CHOICES),
    AfterValidator(_choices),
]


def regex(text: str) -> Grammar | None:
    """A regular expression that the whole output matches; "" is none."""
    return ("regex", text) if text else None


def ebnf(text: str) -> Grammar | None:
    """GrammarText in EBNF, the first of which is ``root``; "" is none,
    "json" LightLLM's any JSON object."""
    return JSON if text == "json" else ("ebnf", text) if text else None


def choice(texts: Sequence[str]) -> Grammar | None:
    """Strings, one of which is the output; no strings are none."""
    return ("choice", json.dumps(texts, ensure_ascii=False)) if texts else None


def not_empty(value: object) -> object:
    """For validators: an empty constraint would mean that nothing may come, or anything."""
    if value in ("", []):
        refuse(f" {_EMPTY}")
    return value


_ITS_OWN: Final = "vLLM's own note of the backend it chose"


class StructuredOutputs(RequestModel):
    """vLLM's: one of its keys gives the output's form."""

    refused: ClassVar = {
        "structural_tag": Unavailable("a structural tag"),
        "whitespace_pattern": Unavailable("a pattern for white space"),
        "disable_additional_properties": Unavailable("closing open objects", False),
    }
    ignored: ClassVar = {
        "disable_fallback": "there is only one backend, so no fallback",
        "_backend": _ITS_OWN,
        "_backend_was_auto": _ITS_OWN,
    }
    json_schema: SchemaOrText = Field(None, alias="json", description="a JSON schema")
    json_object: bool = Field(False, description="any JSON object")
    regex: GrammarText = Field("", description="a regular expression")
    choice: Choices = Field(default_factory=list, description="a list of strings")
    grammar: GrammarText = Field("", description="rules in EBNF")
    disable_any_whitespace: bool = Field(
        False, description="no white space in JSON, not even after , and : (json, json_object)"
    )

    _not_empty = field_validator("json_schema", "regex", "choice", "grammar", mode="before")(
        not_empty
    )

    @model_validator(mode="after")
    def _some(self) -> Self:
        if not (self.json_schema or self.json_object or self.regex or self.choice or self.grammar):
            refuse(f" {_EMPTY}")
        if self.disable_any_whitespace and not (self.json_schema or self.json_object):
            refuse(".disable_any_whitespace needs json or json_object", ".disable_any_whitespace")
        return self

    def form(self, name: str) -> Grammar | None:
        """The one that is given. Raises RequestError where there are several."""
        schema, compact = self.json_schema, self.disable_any_whitespace
        any_object = _COMPACT_OBJECT if compact else JSON
        forms = {
            "json": ("compact", schema[1]) if schema and compact else schema,
            "json_object": any_object if self.json_object else None,
            "regex": regex(self.regex),
            "choice": choice(self.choice),
            "grammar": ebnf(self.grammar),
        }
        return only(forms, f"{name}.")


ALWAYS_STRICT: Final = "every output is valid against its schema"
_TOLD: Final = "it is not put into the prompt"


class FreeFormat(RequestModel):
    type: Literal["text"]

    @property
    def form(self) -> Grammar | None:
        return None


class ObjectFormat(RequestModel):
    type: Literal["json_object"]

    @property
    def form(self) -> Grammar | None:
        return JSON


class NamedSchema(RequestModel):
    ignored: ClassVar = {"name": _TOLD, "description": _TOLD, "strict": ALWAYS_STRICT}
    grammar: SchemaObject = Field(alias="schema")


class ResponseFormat(RequestModel):
    """OpenAI's; the schema may also stand in it as ``schema`` or ``value``, as llama.cpp and
    huggingface_hub have it."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: NamedSchema | None = None
    beside: SchemaObject | None = Field(None, alias="schema")
    value: SchemaObject | None = None

    @model_validator(mode="after")
    def _one_schema(self) -> Self:
        named = None if self.json_schema is None else self.json_schema.grammar
        beside = {"schema": self.beside, "value": self.value}
        found = [name for name, form in beside.items() if form is not None]
        if len(found) + (named is not None) > 1:
            refuse(" has several schemas")
        if found and self.type == "text":
            refuse(f".{found[0]} needs the type json_schema or json_object")
        if self.type == "json_schema" and named is None and not found:
            refuse(".json_schema is missing", ".json_schema")
        return self

    @property
    def form(self) -> Grammar | None:
        if self.type == "text":
            return None
        named = None if self.json_schema is None else self.json_schema.grammar
        return named or self.beside or self.value or JSON


# the names by which clients of any server give the output's form
_NAMES: Final = (
    "response_format", "structured_outputs", "guided_json", "guided_regex", "guided_grammar",
    "guided_choice", "guided_json_object", "guided_whitespace_pattern", "structural_tag",
    "json_schema", "regex", "ebnf", "grammar", "regular_constraint",
)  # fmt: skip


def other_names(told: str, *own: str) -> dict[str, Unavailable]:
    """Those to be refused where ``told``, for a message, says how the form is given.

    Args:
        own: names that mean something there.
    """
    why = Unavailable(f"this name for structured output (use {told})", "", False, [], {})
    return {name: why for name in _NAMES if name not in own}


def only(forms: Mapping[str, Grammar | None], at: str = "") -> Grammar | None:
    """The grammar of a body, which may have one. Raises RequestError when there are several."""
    found = [name for name, form in forms.items() if form is not None]
    if len(found) > 1:
        reject(f"{at}{found[0]} and {at}{found[1]} exclude each other", at + found[1])
    return forms[found[0]] if found else None


def field_of(grammar: Grammar | None, forms: Mapping[str, Grammar | None], tools: str = "") -> str:
    """The field that a request's grammar is from: one of ``forms``, else ``tools``."""
    return next((name for name, form in forms.items() if form and form == grammar), tools)


def without_tokens(form: Grammar | None, allowed: Sequence[int], name: str) -> None:
    """Raises RequestError where a grammar and a list of allowed tokens would both restrict."""
    if form is not None and allowed:
        reject(f"{name} and a grammar exclude each other (a forced call is one too)", name)
