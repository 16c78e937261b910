"""A queue that is round-robin over clients and first come, first served for each client.

Knows keys and clients as numbers; does not know what the items are.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterator
from typing import Generic, TypeVar

T = TypeVar("T")


class FairQueue(Generic[T]):
    """Items under unique keys. Iteration is in serving order.

    Every operation, and every item of an iteration, costs the same however many clients and items
    there are. A client without items is not kept.
    """

    def __init__(self) -> None:
        self._first: OrderedDict[int, T] = OrderedDict()  # served before any client's turn
        self._lines: OrderedDict[int, OrderedDict[int, T]] = OrderedDict()  # next client first
        self._len = 0

    def __len__(self) -> int:
        return self._len

    def __iter__(self) -> Iterator[T]:
        """One item per client, then the next one of each; do not modify the queue meanwhile."""
        yield from self._first.values()
        rest: deque[Iterator[T]] = deque()
        for line in self._lines.values():
            items = iter(line.values())
            yield next(items)
            rest.append(items)
        while rest:
            items = rest.popleft()
            for item in items:
                yield item
                rest.append(items)
                break

    def has(self, client: int, key: int) -> bool:
        """Whether the queue holds this client's item."""
        return key in self._first or key in self._lines.get(client, ())

    def append(self, client: int, key: int, item: T) -> None:
        """Append to the client's items."""
        self._lines.setdefault(client, OrderedDict())[key] = item
        self._len += 1

    def prepend(self, client: int, key: int, item: T) -> None:
        """Put before the client's other items."""
        self.append(client, key, item)
        self._lines[client].move_to_end(key, last=False)

    def put_first(self, key: int, item: T) -> None:
        """Put before everything, whichever client's turn it is."""
        self._first[key] = item
        self._first.move_to_end(key, last=False)
        self._len += 1

    def serve(self, client: int, key: int) -> None:
        """Take an item out and end its client's turn."""
        if not self.discard(client, key) and client in self._lines:
            self._lines.move_to_end(client)

    def discard(self, client: int, key: int) -> bool:
        """Take an item out without a turn. True: it stood before all turns."""
        self._len -= 1
        if key in self._first:
            del self._first[key]
            return True
        line = self._lines[client]
        del line[key]
        if not line:
            del self._lines[client]
        return False
