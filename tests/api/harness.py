"""What tests of the request side share: served models, requests, tokens, answers and their events."""

from __future__ import annotations

import codecs
import json
from array import array
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from asyncllm.api.common.answer import Answer, Choice, Vocab
from asyncllm.api.common.request import GenerationRequest, ServedModel
from asyncllm.api.lightllm import request as lightllm
from asyncllm.api.openai import request as openai
from asyncllm.api.openai.chat_reply import ParsedChatReply, chat_reply
from asyncllm.api.openapi import document as openapi
from asyncllm.api.parsing.output_parser import Dialect
from asyncllm.api.parsing.reasoning import prompt_state
from asyncllm.codec import i32
from asyncllm.core.request import FinishReason
from asyncllm.messages import TextDelta
from asyncllm.records import Logprobs

SERVED = ServedModel(
    name="m",
    listed=("m", "org/m"),
    accepted=frozenset({"default", "folder"}),
    max_len=64,
    vocab_size=100,
    created=0,
)
# its tokens are bytes, its name is one that JSON escapes
BYTES_SERVED = ServedModel(
    name='m"1', listed=('m"1',), accepted=frozenset(), max_len=64, vocab_size=256, created=0
)
VOCAB = Vocab(
    piece=lambda t: bytes([t]),
    decode=lambda ids: bytes(list(ids)).decode("utf-8", "replace"),
    spell=lambda ids: spell(ids),
    special=frozenset({0}),
)
DOC = openapi.document(SERVED, secured=True)
TGI = openapi.document(replace(SERVED, tgi=True), secured=False)

HI = [{"role": "user", "content": "hi"}]
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}}
FUNCTION = {"name": "weather", "description": "of a city", "parameters": SCHEMA}
TOOLS = [{"type": "function", "function": FUNCTION}]

ARGS = '{"city": "Ü\\n{"}'
CALL = f'{{"name": "weather", "arguments": {ARGS}}}'
WEATHER = ("weather", ARGS)
THINK = "<think>\nwell <tool_call>\n</think>\n\n"

# format of calls, of reasoning; the answer; content, reasoning, calls, finish reason
Case = tuple[str, str, str, str | None, str | None, list[tuple[str, str]], str]
CASES: dict[str, Case] = {
    "text": ("hermes", "", "no < call", "no < call", None, [], "stop"),
    "empty": ("hermes", "", "", "", None, [], "stop"),
    "hermes": ("hermes", "", f"ok <tool_call>{CALL}</tool_call>", "ok", None, [WEATHER], "tool_calls"),
    "two": ("qwen25", "", f"<tool_call>{CALL}\n{CALL}</tool_call>", None, None, [WEATHER] * 2, "tool_calls"),
    "llama3": ("llama3", "", f"<|python_tag|>{CALL}", None, None, [WEATHER], "tool_calls"),
    "mistral": ("mistral", "", f"[TOOL_CALLS]weather[ARGS]{ARGS}", None, None, [WEATHER], "tool_calls"),
    "coder": ("qwen3_coder", "", "<tool_call><function=weather><parameter=city>\nÜ\n</parameter>"
              "</function></tool_call>", None, None, [("weather", '{"city": "Ü"}')], "tool_calls"),
    "kimi": ("kimi_k2", "kimi_k2", "◁think▷hm◁/think▷<|tool_calls_section_begin|><|tool_call_begin|>"
             f"functions.weather:0<|tool_call_argument_begin|>{ARGS}<|tool_call_end|>"
             "<|tool_calls_section_end|>", None, "hm", [WEATHER], "tool_calls"),
    "cut": ("hermes", "", '<tool_call>{"name": "weather", "arguments": {"city": "A', None, None,
            [("weather", '{"city": "A')], "length"),
    "think": ("", "think", THINK + "Yes", "Yes", "well <tool_call>", [], "stop"),
    "think and cut": ("", "think", THINK + "Yes", "Yes", "well <tool_call>", [], "length"),
    "think and call": ("hermes", "qwen3", f"{THINK}<tool_call>{CALL}</tool_call>", None,
                       "well <tool_call>", [WEATHER], "tool_calls"),
    "think without end": ("hermes", "qwen3", "<think>well", None, "well", [], "length"),
    "silent": ("hermes", "qwen3", "Yes", "Yes", None, [], "stop"),
    "harmony": ("gpt_oss", "gpt-oss", "<|channel|>analysis<|message|>hm<|end|><|start|>assistant"
                f"<|channel|>commentary to=functions.weather<|message|>{ARGS}<|call|>", None, "hm",
                [WEATHER], "tool_calls"),
}  # fmt: skip


# -- requests ----------------------------------------------------------------------------------


def completion_request(**body: Any) -> GenerationRequest:
    return openai.completion({"prompt": "hi"} | body, SERVED)


def chat_request(**body: Any) -> GenerationRequest:
    return openai.chat({"messages": HI} | body, SERVED)


def native_request(stream: bool = False, **parameters: Any) -> GenerationRequest:
    return lightllm.generate({"inputs": "hi", "parameters": parameters}, SERVED, stream=stream)


def rendered(generation: GenerationRequest) -> Any:
    """The conversation as the chat template gets it."""
    (prompt,) = generation.prompts
    assert prompt.chat is not None
    return json.loads(prompt.chat)


# -- answers -----------------------------------------------------------------------------------


def spell(ids: Sequence[int]) -> list[str]:
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    return [decoder.decode(bytes([i])) for i in ids]


def delta(
    text: str,
    ids: array[int] | None = None,
    pieces: tuple[str, ...] = (),
    logprobs: array[float] | Logprobs | None = None,
    prompt: Logprobs | None = None,
) -> TextDelta:
    """New tokens; ``logprobs`` may be those of the chosen ones alone."""
    if isinstance(logprobs, array):
        logprobs = Logprobs(chosen=logprobs)
    return TextDelta(1, text, i32([]) if ids is None else ids, pieces, logprobs, prompt)


def floats(*values: float) -> array[float]:
    return array("f", values)


def answer(generation: GenerationRequest, prompts: list[bytes]) -> Answer:
    n = generation.n
    wants = generation.params.logprobs, generation.params.prompt_logprobs
    choices = [
        Choice(index=i, prompt_idx=i // n, wants=wants, keeps_ids=generation.token_ids)
        for i in range(n * len(prompts))
    ]
    ids = [array("i", list(p)) for p in prompts]
    return Answer(generation, "id-1", 7, BYTES_SERVED.name, VOCAB, choices, ids)


def take(reply: Any, news: TextDelta, index: int = 0) -> bytes:
    choice = reply.answer.choices[index]
    choice.take(news)
    out: bytes = (
        reply.piece(choice, news.text, len(news.ids)) if reply.answer.generation.stream else b""
    )
    return out


def end(reply: Any, reason: FinishReason = FinishReason.STOP, index: int = 0) -> bytes:
    choice = reply.answer.choices[index]
    choice.reason = reason
    out: bytes = reply.end(choice) if reply.answer.generation.stream else b""
    return out


# -- what a client reads -----------------------------------------------------------------------


def events(data: bytes) -> list[Any]:
    *parts, rest = data.split(b"\n\n")
    assert rest == b""
    return [json.loads(part.removeprefix(b"data: ")) for part in parts]


def typed_events(raw: bytes) -> list[dict[str, Any]]:
    """Decoded events; the event line must name the type."""
    *parts, rest = raw.decode().split("\n\n")
    assert rest == ""
    found = []
    for part in parts:
        name, data = part.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        found.append(event)
    return found


def native_events(data: bytes) -> list[Any]:
    *parts, rest = data.split(b"\n\n")
    assert rest == b""
    assert all(p.startswith(b"data:{") for p in parts)
    return [json.loads(p[5:]) for p in parts]


# -- chat answers with reasoning and calls ------------------------------------------------------


def reply(calls: str, thoughts: str, *, head: str = "", **body: Any) -> ParsedChatReply:
    """A reply whose prompt has been accepted."""
    dialect = Dialect(calls=calls or "hermes", lists_tools=True, reasoning=thoughts)
    asked = {"messages": [{"role": "user", "content": "hi"}]} | ({"tools": TOOLS} if calls else {})
    generation = openai.chat(asked | body, replace(BYTES_SERVED, dialect=dialect))
    wants = generation.params.logprobs, -1
    choices = [
        Choice(index=i, prompt_idx=0, wants=wants, keeps_ids=generation.token_ids)
        for i in range(generation.n)
    ]
    answer = Answer(generation, "id-1", 7, BYTES_SERVED.name, VOCAB, choices, [array("i")])
    options = generation.output_options
    begins = (
        ""
        if options is None or not thoughts
        else prompt_state(thoughts, head + options.continued, options.continued)
    )
    answer.accept(0, i32([1, 2]), begins)
    made = chat_reply(answer)
    assert isinstance(made, ParsedChatReply)
    return made


def feed(made: ParsedChatReply, pieces: list[str], reason: FinishReason, index: int = 0) -> bytes:
    """One token for each piece; what the stream says."""
    choice, out = made.answer.choices[index], b""
    for text in pieces:
        scored = made.answer.generation.params.logprobs >= 0
        news = delta(text, i32([65]), (text,), floats(-1) if scored else b"")
        choice.take(news)
        out += (
            made.piece(choice, news.text, len(news.ids)) if made.answer.generation.stream else b""
        )
    choice.end(reason, 1, "")
    return out + (made.end(choice) if made.answer.generation.stream else b"")


def ending(reason: str) -> FinishReason:
    return FinishReason.LENGTH if reason == "length" else FinishReason.STOP


def joined(chunks: list[Any]) -> dict[str, Any]:
    """A message made of its deltas, as clients make it."""
    out: dict[str, Any] = {
        "content": "",
        "reasoning": "",
        "reasoning_content": "",
        "tool_calls": [],
    }
    for chunk in chunks:
        (choice,) = chunk["choices"]
        delta = choice["delta"]
        assert len(delta.keys() & {"content", "reasoning", "tool_calls"}) <= 1
        for key in ("content", "reasoning", "reasoning_content"):
            out[key] += delta.get(key, "")
        for call in delta.get("tool_calls", []):
            if call["index"] == len(out["tool_calls"]):
                assert (call["type"], call["function"]["arguments"]) == ("function", "")
                out["tool_calls"].append(call)
                continue
            assert call.keys() == {"index", "function"}
            assert call["function"].keys() == {"arguments"}
            out["tool_calls"][call["index"]]["function"]["arguments"] += call["function"][
                "arguments"
            ]
    return out


def called(calls: list[Any]) -> list[tuple[str, str]]:
    return [(call["function"]["name"], call["function"]["arguments"]) for call in calls]
