"""Turns of clients, against the same thing written plainly; and what it costs."""

from __future__ import annotations

import random
from itertools import islice
from time import thread_time

from asyncllm.core.fair_queue import FairQueue


class Plain:
    """Lists, searched through."""

    def __init__(self) -> None:
        self.first: list[int] = []
        self.lines: list[tuple[int, list[int]]] = []

    def line(self, client: int) -> list[int]:
        for known, line in self.lines:
            if known == client:
                return line
        self.lines.append((client, []))
        return self.lines[-1][1]

    def discard(self, client: int, key: int, *, served: bool) -> None:
        if key in self.first:
            self.first.remove(key)
            return
        line = self.line(client)
        line.remove(key)
        self.lines.remove((client, line))
        if line and served:
            self.lines.append((client, line))
        elif line:
            self.lines.insert(self.at, (client, line))

    def order(self) -> list[int]:
        longest = max((len(line) for _, line in self.lines), default=0)
        rounds = [[line[i] for _, line in self.lines if i < len(line)] for i in range(longest)]
        return self.first + [key for keys in rounds for key in keys]

    at = 0


def test_any_course_of_events_serves_in_turns() -> None:
    rng = random.Random(3)
    queue, plain, owner = FairQueue[int](), Plain(), dict[int, int]()
    for key in range(4000):
        client = rng.randrange(4)
        match rng.randrange(6):
            case 0 | 1:
                queue.append(client, key, key)
                plain.line(client).append(key)
            case 2:
                queue.prepend(client, key, key)
                plain.line(client).insert(0, key)
            case 3 if rng.random() < 0.3:
                queue.put_first(key, key)
                plain.first.insert(0, key)
            case 4 if owner:
                gone = rng.choice(list(owner))
                whose = owner.pop(gone)
                plain.at = (
                    [c for c, _ in plain.lines].index(whose) if gone not in plain.first else 0
                )
                queue.discard(whose, gone)
                plain.discard(whose, gone, served=False)
                continue
            case 5 if owner:
                gone = plain.order()[0]
                queue.serve(owner[gone], gone)
                plain.discard(owner.pop(gone), gone, served=True)
                continue
            case _:
                continue
        owner[key] = client
        assert queue.has(client, key)
        assert list(queue) == plain.order()
        assert len(queue) == len(owner)
    assert len(owner) > 50


def test_a_client_without_items_is_forgotten() -> None:
    queue = FairQueue[str]()
    for client in range(1000):
        queue.append(client, client, "x")
        queue.serve(client, client)
    assert not queue
    assert not queue._lines


def test_a_pick_costs_the_same_whatever_waits() -> None:
    def seconds(num: int) -> float:
        queue = FairQueue[int]()
        for key in range(num):
            queue.append(key % (num // 2), key, key)
        best = 1.0
        for _ in range(20):
            begin = thread_time()
            for key in list(islice(queue, 100)):
                queue.serve(key % (num // 2), key)
            best = min(best, thread_time() - begin)
        return best

    assert seconds(100_000) < 10 * seconds(4000)
