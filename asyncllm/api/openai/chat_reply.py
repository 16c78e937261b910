"""OpenAI's chat completions with reasoning and tool calls, whole and as chunks.

Knows the JSON shapes; :mod:`asyncllm.api.parsing.output_parser` finds reasoning and calls.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from asyncllm.api.common import sse
from asyncllm.api.common.answer import REASONS, Answer, Choice
from asyncllm.api.common.custom_tool import input_of
from asyncllm.api.common.logprobs import scored
from asyncllm.api.openai.chunks import OpenAIReply, finish_reason
from asyncllm.api.parsing.events import (
    Arguments,
    Call,
    CallEnd,
    CallStart,
    Content,
    Event,
    Reasoning,
)
from asyncllm.api.parsing.output_parser import OutputParser

ChatDelta = dict[str, Any]


class ChatReply(OpenAIReply):
    """/v1/chat/completions."""

    kind = "chat.completion.chunk"

    def opening(self) -> bytes:
        """One chunk per choice that names the role."""
        delta = {"role": "assistant", "content": ""}
        body = {"delta": delta, "logprobs": None, "finish_reason": None}
        chunks = [self._chunk(choice, body) for choice in self.answer.choices]
        if self._wants_ids:
            chunks[0]["prompt_token_ids"] = list(self.answer.prompts[0])
        return b"".join(map(sse.event, chunks))

    def piece(self, choice: Choice, text: str, count: int) -> bytes:
        """One content chunk, if there is something to say."""
        if self._wants_logprobs or self._wants_ids:
            if not count and not text:
                return b""
            return self._event(choice, {"content": text}, self._of_tokens(choice, count))
        if not text:
            return b""
        if self._continuous:
            return self._event(choice, {"content": text})
        if (ready := self._templates.get(choice.index)) is None:
            body = {"delta": {"content": sse.MARK}, "logprobs": None, "finish_reason": None}
            ready = self._templates[choice.index] = sse.ChunkTemplate(self._chunk(choice, body))
        return ready.text(text)

    def end(self, choice: Choice) -> bytes:
        """An empty delta with the finish reason."""
        return self._event(choice, {}, {"finish_reason": self._reason(choice)})

    def whole(self) -> bytes:
        """The answer in one piece."""
        choices = [
            {
                "index": choice.index,
                "message": self._message(choice),
                "logprobs": self._logprobs(choice, 0) if self._wants_logprobs else None,
                "finish_reason": self._reason(choice),
            }
            | ({"token_ids": list(choice.tokens.ids)} if self._wants_ids else {})
            for choice in self.answer.choices
        ]
        prompt = {"prompt_token_ids": list(self.answer.prompts[0])} if self._wants_ids else {}
        return self._whole("chat.completion", choices, prompt)

    def _message(self, choice: Choice) -> dict[str, Any]:
        return {"role": "assistant", "content": choice.text, "refusal": None}

    def _reason(self, choice: Choice) -> str | None:
        return finish_reason(choice)

    def _event(
        self, choice: Choice, delta: dict[str, Any], more: dict[str, object] | None = None
    ) -> bytes:
        body = {"delta": delta, "logprobs": None, "finish_reason": None}
        return sse.event(self._chunk(choice, body | (more or {})))

    def _logprobs(self, choice: Choice, first: int) -> dict[str, object]:
        return {
            "content": scored(self.answer.vocab, choice, first, name=self._name),
            "refusal": None,
        }


def chat_reply(answer: Answer) -> ChatReply:
    """What answers a chat: without reasoning and calls to look for, text goes out as it comes."""
    return (
        ChatReply(answer) if answer.generation.output_options is None else ParsedChatReply(answer)
    )


class ParsedChatReply(ChatReply):
    """/v1/chat/completions where an answer is more than its text."""

    def __init__(self, answer: Answer) -> None:
        super().__init__(answer)
        # by choice, kind of event, and call
        self._ready: dict[tuple[int, type[Event], int], sse.ChunkTemplate] = {}

    def piece(self, choice: Choice, text: str, count: int) -> bytes:
        """A chunk for each thing found; the first has the log-probabilities of all new tokens."""
        return self._events(choice, self._of_tokens(choice, count) if count else {})

    def end(self, choice: Choice) -> bytes:
        """What was held back, then an empty delta with the finish reason."""
        return self._events(choice, {}) + super().end(choice)

    def _events(self, choice: Choice, more: dict[str, object]) -> bytes:
        out = b""
        for event in _output(choice).take_events():
            if isinstance(event, CallEnd | Arguments) and (call := self._custom(choice, event)):
                # free text comes at the call's end, out of the JSON that the model writes
                if isinstance(event, CallEnd) and (text := input_of(call.arguments)):
                    custom = {"index": event.index, "custom": {"input": text}}
                    out += self._event(choice, {"tool_calls": [custom]}, more)
                    more = {}
                continue
            if isinstance(event, CallEnd):
                continue
            if more or self._continuous or isinstance(event, CallStart):
                told = None if isinstance(event, CallStart) else event.text
                out += self._event(choice, self._delta(event, told), more)
                more = {}
            else:
                out += self._template(choice, event).text(event.text)
        if more:
            out += self._event(choice, {"content": ""}, more)
        return out

    def _custom(self, choice: Choice, event: Arguments | CallEnd) -> Call | None:
        """The call that an event is of, if it is one of a custom tool."""
        if not (names := self.answer.generation.custom_tools):
            return None
        call = _output(choice).calls[event.index]
        return call if call.name in names else None

    def _template(
        self, choice: Choice, event: Content | Reasoning | Arguments
    ) -> sse.ChunkTemplate:
        """The chunk of an event, whose text is a hole."""
        key = choice.index, type(event), event.index if isinstance(event, Arguments) else 0
        if (ready := self._ready.get(key)) is None:
            body = {"delta": self._delta(event, sse.MARK), "logprobs": None, "finish_reason": None}
            ready = self._ready[key] = sse.ChunkTemplate(self._chunk(choice, body))
        return ready

    def _message(self, choice: Choice) -> dict[str, object]:
        output = _output(choice)
        bare = bool(output.calls or output.reasoning)
        message: dict[str, object] = {
            "role": "assistant",
            "content": None if bare and not output.content else output.content,
            "refusal": None,
        }
        if output.looks_for_reasoning:
            thoughts = output.reasoning or None
            message |= {"reasoning": thoughts, "reasoning_content": thoughts}
        if output.calls:
            told = [_call(call, self.answer.generation.custom_tools) for call in output.calls]
            old = self.answer.generation.functions
            message |= {"function_call": told[0]["function"]} if old else {"tool_calls": told}
        return message

    def _delta(self, event: Event, text: str | None) -> ChatDelta:
        delta = _delta(event, text, self.answer.generation.custom_tools)
        if self.answer.generation.functions and "tool_calls" in delta:
            return {"function_call": delta["tool_calls"][0]["function"]}
        return delta

    def _reason(self, choice: Choice) -> str | None:
        if choice.reason is None:
            return None
        reason = _output(choice).finish_reason(REASONS[choice.reason])
        old = reason == "tool_calls" and self.answer.generation.functions
        return "function_call" if old else reason


def _output(choice: Choice) -> OutputParser:
    assert choice.output is not None  # they are there when the prompt is accepted
    return choice.output


def _delta(event: Event, text: str | None, custom_tools: Collection[str]) -> ChatDelta:
    match event:
        case Reasoning():
            return {"reasoning": text, "reasoning_content": text}
        case CallStart():
            begun = _call(Call(event.index, event.id, event.name), custom_tools)
            return {"tool_calls": [{"index": event.index} | begun]}
        case Arguments():
            return {"tool_calls": [{"index": event.index, "function": {"arguments": text}}]}
        case _:
            return {"content": text}


def _call(call: Call, custom_tools: Collection[str]) -> dict[str, object]:
    if call.name in custom_tools:
        custom = {"name": call.name, "input": input_of(call.arguments)}
        return {"id": call.id, "type": "custom", "custom": custom}
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": call.id, "type": "function", "function": function}
