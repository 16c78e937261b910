"""OpenAI's responses, whole and as typed events.

Knows the JSON shapes; knows neither sockets nor request bodies.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

from asyncllm.api.common import conversation, sse
from asyncllm.api.common.answer import Answer, Choice
from asyncllm.api.common.content_blocks import ContentBlock, ContentBlockReply
from asyncllm.api.common.conversation import ConversationBuilder
from asyncllm.api.common.custom_tool import input_of
from asyncllm.api.common.logprobs import scored
from asyncllm.api.parsing.events import CallStart, Content, Reasoning
from asyncllm.api.responses.request import ResponsesRequest
from asyncllm.api.responses.store import ResponseStore, StoredResponse
from asyncllm.api.responses.tools import ClientTool
from asyncllm.core.request import FinishReason
from asyncllm.errors import RequestError

PREFIXES: Final = {Content: "msg_", Reasoning: "rs_", CallStart: "fc_"}  # of items' ids
EVENTS: Final = {  # that carry the text of a block
    Content: "response.output_text",
    Reasoning: "response.reasoning_text",
    CallStart: "response.function_call_arguments",
}

CUSTOM_INPUT: Final = "response.custom_tool_call_input"


class ResponseReply(ContentBlockReply):
    """/v1/responses: an item for each block; a finished response goes into ``store``."""

    def __init__(self, answer: Answer, asked: ResponsesRequest, store: ResponseStore) -> None:
        super().__init__(answer)
        self._asked, self._store = asked, store
        self._kept: StoredResponse | None = None  # once it has ended, if it may be stored
        self._number = 0  # of the next event
        self._items: list[dict[str, object]] = []  # that have ended
        self._delta: sse.ChunkTemplate  # of the block in progress
        self._scores: list[dict[str, object]] = []  # of tokens that no delta has brought yet

    def opening(self) -> bytes:
        """The response, empty."""
        response = self._response("in_progress", [])
        return self._event("response.created", response=response) + self._event(
            "response.in_progress", response=response
        )

    def piece(self, choice: Choice, text: str, count: int) -> bytes:
        """What has been found in new text."""
        if self._scored and count:
            self._scores += scored(self.answer.vocab, choice, choice.num_tokens - count)
        return super().piece(choice, text, count)

    def block_start(self, block: ContentBlock) -> bytes:
        """The item, empty, and its part if it has parts."""
        kind = f"{self._events(block)}.delta"
        delta = {"type": kind, **_where(block), "item_id": self._id(block), "delta": sse.MARK}
        if block.kind is Content:
            delta["logprobs"] = sse.MARK
        self._delta = sse.ChunkTemplate(delta | {"sequence_number": sse.MARK}, sse.head(kind))
        item = self._item(block, "in_progress", empty=True)
        return self._event(
            "response.output_item.added", output_index=block.index, item=item
        ) + self._part_event("response.content_part.added", block, part=_part(block, ""))

    def block_delta(self, block: ContentBlock, text: str) -> bytes:
        """A delta; free text comes at the call's end, out of the JSON that the model writes."""
        if not text or self._offered(block).custom:
            return b""
        values = [sse.escaped(text)]
        if block.kind is Content:
            values.append(sse.body(self._scores))
            self._scores = []
        return self._delta.fill(*values, b"%d" % self._next())

    def block_stop(self, block: ContentBlock) -> bytes:
        """The whole text once more, part by part."""
        kind, text = f"{self._events(block)}.done", block.text
        where = {"item_id": self._id(block), **_where(block)}
        if self._offered(block).custom:
            given = input_of(text)
            out = self._event(kind.replace("done", "delta"), **where, delta=given) if given else b""
            out += self._event(kind, **where, input=given)
        elif block.call is not None:
            out = self._event(kind, **where, name=self._offered(block).name, arguments=text)
        else:
            more = {"logprobs": self._all_scores()} if block.kind is Content else {}
            out = self._event(kind, **where, text=text, **more)
        item = self._item(block, _status(block))
        self._items.append(item)
        part = item["content"][0] if "content" in item else {}
        return (
            out
            + self._part_event("response.content_part.done", block, part=part)
            + self._event("response.output_item.done", output_index=block.index, item=item)
        )

    def end(self, choice: Choice) -> bytes:
        """What was held back, and the last item's end; an answer of nothing is an empty message."""
        out = self.flush(choice)
        if not self.blocks.all:
            out += self._tell(self.blocks.add([Content("")])) + self.flush(choice)
        return out

    def closing(self) -> bytes:
        """The whole response."""
        (choice,) = self.answer.choices
        response = self._finish(choice, self._items, self.blocks.all)
        self.keep()
        return self._event(f"response.{response['status']}", response=response)

    def error(self, error: RequestError) -> bytes:
        """The response as a failed one."""
        code = "rate_limit_exceeded" if error.status == 429 else "server_error"
        failure = {"code": code, "message": error.message}
        response = self._response("failed", self._items) | {"error": failure}
        return self._event("response.failed", response=response)

    def whole(self) -> bytes:
        """The answer in one piece."""
        (choice,) = self.answer.choices
        blocks = self.all_blocks(choice) or [ContentBlock(0, Content, complete=not choice.is_cut)]
        items = [self._item(block, _status(block)) for block in blocks]
        return sse.body(self._finish(choice, items, blocks))

    def keep(self) -> None:
        """Store the finished response."""
        if self._kept is not None:
            self._store.put(self.answer.id, self._kept)

    @property
    def _scored(self) -> bool:
        return self.answer.generation.params.logprobs >= 0

    def _all_scores(self) -> list[dict[str, object]]:
        return scored(self.answer.vocab, self.answer.choices[0]) if self._scored else []

    def _finish(
        self, choice: Choice, items: list[dict[str, object]], blocks: list[ContentBlock]
    ) -> dict[str, object]:
        """The finished response, which :meth:`keep` stores if it may be."""
        status = "incomplete" if choice.is_cut else "completed"
        response = self._response(status, items)
        usage = self.answer.usage()
        thoughts = usage.get("completion_tokens_details", {}).get("reasoning_tokens", 0)
        response["usage"] = {
            "input_tokens": usage["prompt_tokens"],
            "input_tokens_details": {
                "cached_tokens": usage["prompt_tokens_details"]["cached_tokens"],
                "cache_write_tokens": 0,
            },
            "output_tokens": usage["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": thoughts},
            "total_tokens": usage["total_tokens"],
        }
        if status == "incomplete":
            aborted = choice.reason is FinishReason.ABORT
            response["incomplete_details"] = {"reason": "abort" if aborted else "max_output_tokens"}
        if self._asked.echo["store"]:
            self._kept = answered(self._asked, blocks, sse.body(response))
        return response

    def _response(self, status: str, output: list[dict[str, object]]) -> dict[str, object]:
        return {
            "id": self.answer.id,
            "object": "response",
            "created_at": self.answer.created,
            "status": status,
            "background": False,
            "error": None,
            "incomplete_details": None,
            "model": self.answer.model,
            "output": output,
            "service_tier": "default",
            "truncation": "disabled",
            "usage": None,
        } | self._asked.echo

    def _offered(self, block: ContentBlock) -> ClientTool:
        """The called tool as the client knows it."""
        return self._asked.tools.client_tool("" if block.call is None else block.call.name)

    def _events(self, block: ContentBlock) -> str:
        """What events that bring the text are called."""
        return CUSTOM_INPUT if self._offered(block).custom else EVENTS[block.kind]

    def _id(self, block: ContentBlock) -> str:
        prefix = "ctc_" if self._offered(block).custom else PREFIXES[block.kind]
        name = prefix + self.answer.id.removeprefix("resp_")
        return f"{name}_{block.index}" if block.index else name

    def _item(self, block: ContentBlock, status: str, empty: bool = False) -> dict[str, Any]:
        item: dict[str, object] = {"id": self._id(block), "status": status}
        text = "" if empty else block.text
        if block.call is not None:
            tool = self._offered(block)
            told = {"call_id": block.call.id, "name": tool.name}
            if tool.namespace:
                told["namespace"] = tool.namespace
            if tool.custom:
                return item | {"type": "custom_tool_call"} | told | {"input": input_of(text)}
            return item | {"type": "function_call"} | told | {"arguments": text}
        part = _part(block, text)
        if block.kind is Reasoning:
            content = [] if empty else [part]
            return item | {"type": "reasoning", "summary": [], "content": content}
        if not empty:
            part["logprobs"] = self._all_scores()
        content = [] if empty else [part]
        return item | {"type": "message", "role": "assistant", "content": content}

    def _part_event(self, kind: str, block: ContentBlock, part: dict[str, object]) -> bytes:
        if block.call is not None:
            return b""
        return self._event(kind, item_id=self._id(block), **_where(block), part=part)

    def _event(self, kind: str, **more: object) -> bytes:
        return sse.event({"type": kind, **more, "sequence_number": self._next()}, sse.head(kind))

    def _next(self) -> int:
        self._number += 1
        return self._number - 1


def _where(block: ContentBlock) -> dict[str, Any]:
    where = {"output_index": block.index}
    return where if block.call is not None else where | {"content_index": 0}


def _part(block: ContentBlock, text: str) -> dict[str, object]:
    if block.kind is Reasoning:
        return {"type": "reasoning_text", "text": text}
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _status(block: ContentBlock) -> str:
    return "completed" if block.complete else "incomplete"


def answered(
    asked: ResponsesRequest, blocks: Iterable[ContentBlock], body: bytes
) -> StoredResponse:
    """What is kept of a finished response; a cut call does not join the conversation."""
    builder = ConversationBuilder()
    for block in blocks:
        if block.kind is Content:
            builder.add_text("assistant", block.text)
        elif block.kind is Reasoning:
            builder.add_reasoning(block.text)
        elif block.complete and block.call is not None:
            given = conversation.parsed_arguments(block.text)
            tool = asked.tools.client_tool(block.call.name)
            builder.add_call(block.call.id, tool.name, given, tool=tool)
    return StoredResponse([*asked.messages, *builder.messages], body)
