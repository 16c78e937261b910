"""OpenAI's Responses: /v1/responses bodies to checked requests, and the memory of earlier ones.

Knows request bodies and conversations; answers are in :mod:`asyncllm.api.responses_reply`.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, Final

from asyncllm.api import chatparts, fields
from asyncllm.api.errors import NotAvailable, UnknownPath
from asyncllm.api.fields import Body, Field, Refused, bad, show, text, typed
from asyncllm.api.generation import Generation, Prompt, Served, temperature
from asyncllm.core.request import SamplingParams
from asyncllm.errors import RequestError

F = Field
Turns = list[dict[str, Any]]
MAX_METADATA: Final = 16
MAX_METADATA_CHARS: Final = 512
ROLES: Final = ("user", "assistant", "system", "developer")


def input_turns(value: Any, name: str) -> Turns:
    """The new turns in template form."""
    if isinstance(value, str):
        return [{"role": "user", "content": text(value, name)}]
    typed(value, list, name, "a string or an array of items")
    for i, item in enumerate(value):
        at = f"{name}[{i}]"
        typed(item, dict, at, "an object")
        kind, role = item.get("type", "message"), item.get("role")
        if not isinstance(kind, str):
            bad(f"{at}.type must be a string, not {show(kind)}", f"{at}.type")
        if kind != "message":
            raise NotAvailable(
                f"{at}: items of type {show(kind)} are not available on this server; messages are",
                param=f"{at}.type",
            )
        if role not in ROLES:
            bad(f"{at}.role: {show(role)} is not one of {', '.join(ROLES)}", f"{at}.role")
    return chatparts.messages(value, name)


def _text_options(value: Any, name: str) -> None:
    form = value.get("format")
    if form is not None:
        typed(form, dict, f"{name}.format", "an object")
        if form.get("type") != "text":
            raise NotAvailable(
                f"{name}.format: structured output is not available on this server",
                param=f"{name}.format",
            )
    if value.get("verbosity") not in (None, "medium"):
        raise NotAvailable(
            f"{name}.verbosity is not available on this server", param=f"{name}.verbosity"
        )


def _effort(value: Any, name: str) -> str | None:
    effort = value.get("effort")
    return None if effort is None else text(effort, f"{name}.effort")


def metadata(value: Any, name: str) -> dict[str, str]:
    """A few short strings by name."""
    if len(value) > MAX_METADATA:
        bad(f"{name}: {len(value)} entries, at most {MAX_METADATA}", name)
    for key, item in value.items():
        if len(text(item, f"{name}[{show(key)}]")) > MAX_METADATA_CHARS:
            bad(f"{name}: a value of {len(item)} characters, at most {MAX_METADATA_CHARS}", name)
    return dict(value)


def _include(value: Any, name: str) -> None:
    if "message.output_text.logprobs" in value:
        raise NotAvailable(f"{name}: log-probabilities are not available here", param=name)


RESPONSES: Final = (
    F(name="model", kind="string", doc="a name in /v1/models; missing or \"default\": the one served"),
    F(name="input", kind="any", parse=input_turns, required=True,
      doc="a string, or an array of messages: role (user, assistant, system, developer) and content "
      "(string, or parts input_text and output_text)"),
    F(name="instructions", kind="string", doc="a system message before everything else"),
    F(name="previous_response_id", kind="string",
      doc="go on from this stored response; its instructions do not count"),
    F(name="store", kind="boolean", default=True,
      doc="keep the response in memory for previous_response_id and GET"),
    F(name="max_output_tokens", kind="integer", low=1, high=fields.MAX_INT32,
      doc="tokens to generate at most; absent: what fits into the context"),
    F(name="temperature", kind="number", default=1.0, low=0, high=2, doc="0: greedy"),
    F(name="top_p", kind="number", default=1.0, low=0, high=1, above=True, to="top_p",
      doc="smallest set of tokens with this probability"),
    F(name="text", kind="object", parse=_text_options, doc="only {\"format\": {\"type\": \"text\"}}"),
    F(name="reasoning", kind="object", parse=_effort, doc="effort is handed to the chat template"),
    F(name="include", kind="array", parse=_include, doc="there is nothing more to include"),
    F(name="metadata", kind="object", default={}, parse=metadata,
      doc=f"at most {MAX_METADATA} strings, which come back"),
    F(name="stream", kind="boolean", default=False, doc="answer as server-sent events"),
)  # fmt: skip

UNAVAILABLE: Final = (
    Refused(name="tools", neutral=([],), doc="calling tools"),
    Refused(name="tool_choice", neutral=("none", "auto"), doc="calling tools"),
    Refused(name="background", neutral=(False,), doc="answering in the background"),
    Refused(name="truncation", neutral=("disabled",), doc="truncating the prompt"),
    Refused(name="top_logprobs", neutral=(0,), doc="log-probabilities"),
    Refused(name="conversation", doc="a stored conversation (previous_response_id is there)"),
    Refused(name="prompt", doc="a stored prompt"),
    Refused(name="context_management", neutral=([],), doc="context management"),
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """A checked /v1/responses body.

    Args:
        turns: the conversation so far, without instructions.
        echo: what the answer repeats of the request.
    """

    generation: Generation
    turns: Turns
    echo: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Stored:
    """A finished response: the conversation up to its answer, and its JSON."""

    turns: Turns
    body: bytes


class Store:
    """Responses by id, the least recently used ones forgotten first.

    Args:
        most: responses kept at once.
        most_bytes: and bytes of their conversations and JSON, about.
    """

    def __init__(self, most: int = 1024, most_bytes: int = 64 << 20) -> None:
        self._most, self._most_bytes = most, most_bytes
        self._kept: OrderedDict[str, Stored] = OrderedDict()
        self.num_bytes = 0

    def __len__(self) -> int:
        return len(self._kept)

    def put(self, key: str, stored: Stored) -> None:
        """Keep a response."""
        self._kept[key] = stored
        self.num_bytes += _size(stored)
        while self._kept and (len(self._kept) > self._most or self.num_bytes > self._most_bytes):
            self._drop(next(iter(self._kept)))

    def turns(self, key: str) -> Turns:
        """The conversation up to a response. Raises RequestError (400)."""
        if key not in self._kept:
            raise RequestError(
                f"previous_response_id: the response {show(key)} is not stored here",
                param="previous_response_id",
                code="previous_response_not_found",
            )
        self._kept.move_to_end(key)
        return self._kept[key].turns

    def body(self, key: str) -> bytes:
        """The JSON of a response. Raises UnknownPath (404)."""
        self._known(key)
        self._kept.move_to_end(key)
        return self._kept[key].body

    def delete(self, key: str) -> None:
        """Forget a response. Raises UnknownPath (404)."""
        self._known(key)
        self._drop(key)

    def _known(self, key: str) -> None:
        if key not in self._kept:
            raise UnknownPath(f"the response {show(key)} is not stored here")

    def _drop(self, key: str) -> None:
        self.num_bytes -= _size(self._kept.pop(key))


def _size(stored: Stored) -> int:
    return len(stored.body) + sum(100 + len(turn["content"]) for turn in stored.turns)


def read(body: Body, served: Served, store: Store) -> Asked:
    """A /v1/responses body.

    Raises:
        RequestError: 400, also for a previous response that is not stored. NotAvailable: 400.
        ModelNotFound: 404.
    """
    served.check_name(RESPONSES[0].read(body))
    fields.refuse(UNAVAILABLE, body)
    values = fields.read(RESPONSES, body)
    previous = values["previous_response_id"]
    turns = values["input"] if previous is None else store.turns(previous) + values["input"]
    if len(turns) > chatparts.MAX_MESSAGES:
        bad(f"input: {len(turns)} messages, at most {chatparts.MAX_MESSAGES}", "input")
    params = SamplingParams(
        **fields.sampling(RESPONSES, values),
        max_new_tokens=values["max_output_tokens"],
        temperature=temperature(values["temperature"]),
    )
    kwargs: dict[str, Any] = {"add_generation_prompt": True}
    if values["reasoning"] is not None:
        kwargs["reasoning_effort"] = values["reasoning"]
    packed = chatparts.pack(_with_system(values["instructions"], turns), None, kwargs)
    generation = Generation(
        prompts=(Prompt(chat=packed),),
        params=params,
        seeded=False,
        stream=values["stream"],
        add_special_tokens=False,
    )
    echo = {
        name: values[name]
        for name in (
            "instructions", "max_output_tokens", "metadata", "previous_response_id", "store",
            "temperature", "top_p",
        )
    }  # fmt: skip
    echo["reasoning"] = {"effort": values["reasoning"], "summary": None}
    return Asked(generation=generation, turns=turns, echo=echo)


def answered(asked: Asked, answer: str, body: bytes) -> Stored:
    """What is kept of a finished response."""
    return Stored([*asked.turns, {"role": "assistant", "content": answer}], body)


def _with_system(instructions: str | None, turns: Turns) -> Turns:
    """One system message in front: many templates know no second one."""
    if not instructions:
        return turns
    if turns and turns[0]["role"] == "system":
        instructions = f"{instructions}\n{turns[0]['content']}"
        turns = turns[1:]
    return [{"role": "system", "content": instructions}, *turns]
