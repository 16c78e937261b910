"""Keeps finished responses for previous_response_id and GET."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from asyncllm.api.common.conversation import Messages
from asyncllm.api.common.errors import UnknownPath
from asyncllm.api.common.validation import preview
from asyncllm.errors import RequestError


@dataclass(frozen=True, slots=True)
class StoredResponse:
    """A finished response: the conversation up to its answer, and its JSON."""

    messages: Messages
    body: bytes


class ResponseStore:
    """Responses by id, the least recently used ones forgotten first.

    Args:
        owner_of: who else may have the response of an id, as text behind an error.
        most: responses kept at once.
        most_bytes: and bytes of their conversations and JSON, about.
    """

    def __init__(
        self,
        owner_of: Callable[[str], str] = lambda _: "",
        *,
        most: int = 1024,
        most_bytes: int = 64 << 20,
    ) -> None:
        self._owner_of = owner_of
        self._most, self._most_bytes = most, most_bytes
        self._kept: OrderedDict[str, StoredResponse] = OrderedDict()
        self.num_bytes = 0

    def __len__(self) -> int:
        return len(self._kept)

    def put(self, key: str, stored: StoredResponse) -> None:
        """Keep a response."""
        self._kept[key] = stored
        self.num_bytes += _size(stored)
        while self._kept and (len(self._kept) > self._most or self.num_bytes > self._most_bytes):
            self._drop(next(iter(self._kept)))

    def messages(self, key: str) -> Messages:
        """The conversation up to a response. Raises RequestError (400)."""
        if key not in self._kept:
            raise RequestError(
                f"previous_response_id: {self._missing(key)}",
                param="previous_response_id",
                code="previous_response_not_found",
            )
        self._kept.move_to_end(key)
        return self._kept[key].messages

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
            raise UnknownPath(self._missing(key))

    def _missing(self, key: str) -> str:
        return f"the response {preview(key)} is not stored here{self._owner_of(key)}"

    def _drop(self, key: str) -> None:
        self.num_bytes -= _size(self._kept.pop(key))


def _size(stored: StoredResponse) -> int:
    return len(stored.body) + sum(100 + len(repr(turn)) for turn in stored.messages)
