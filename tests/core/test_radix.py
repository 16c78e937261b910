"""Radix tree: match, split, insert with duplicates, locks, eviction order."""

from __future__ import annotations

import random
import sys
from array import array
from types import FrameType

import pytest

from asyncllm.core.radix import RadixTree


def ids(*values: int) -> array[int]:
    return array("i", values)


def insert(tree: RadixTree, tokens: array[int], first_slot: int) -> int:
    """Insert a sequence and unlock it; how many of its tokens were there."""
    slots = array("i", range(first_slot, first_slot + len(tokens)))
    node, known = tree.extend(tree.root, tokens, 0, len(tokens), slots)
    tree.unlock(node)
    return known


def lookup(tree: RadixTree, tokens: array[int]) -> list[int]:
    node, slots = tree.match(tokens, len(tokens))
    tree.unlock(node)
    return list(slots)


def test_a_match_is_the_longest_common_prefix_to_the_token() -> None:
    tree = RadixTree()
    insert(tree, ids(1, 2, 3, 4, 5), 10)
    insert(tree, ids(1, 2, 9, 9), 20)
    assert lookup(tree, ids(1, 2, 3, 4, 5, 6)) == [10, 11, 12, 13, 14]
    assert lookup(tree, ids(1, 2, 3, 7)) == [10, 11, 12]
    assert lookup(tree, ids(1, 2, 9, 9)) == [10, 11, 22, 23]
    assert lookup(tree, ids(2, 3)) == []
    assert tree.size == 7
    assert tree.locked == 0


def test_a_match_stops_at_its_limit() -> None:
    tree = RadixTree()
    insert(tree, ids(1, 2, 3), 0)
    node, slots = tree.match(ids(1, 2, 3), 2)
    assert list(slots) == [0, 1]
    assert tree.locked == 2
    tree.unlock(node)


def test_what_is_there_already_keeps_its_slots() -> None:
    tree = RadixTree()
    insert(tree, ids(1, 2, 3), 0)
    assert insert(tree, ids(1, 2, 3, 4), 10) == 3
    assert insert(tree, ids(1, 2), 20) == 2
    assert lookup(tree, ids(1, 2, 3, 4)) == [0, 1, 2, 13]


def test_a_split_keeps_the_locks_of_those_who_hold_the_lower_part() -> None:
    tree = RadixTree()
    tokens = ids(1, 2, 3, 4)
    node, _ = tree.extend(tree.root, tokens, 0, 4, tokens)
    other, _ = tree.match(ids(1, 2, 8), 3)
    assert tree.locked == 4
    tree.unlock(node)
    assert tree.locked == 2
    assert list(tree.evict(9)) == [3, 4]
    tree.unlock(other)
    assert tree.locked == 0
    assert list(tree.evict(9)) == [1, 2]
    assert tree.size == 0


def test_only_a_sole_holder_extends_a_node_in_place() -> None:
    tree = RadixTree()
    tokens = ids(1, 2, 3, 4, 5)
    node, _ = tree.extend(tree.root, tokens, 0, 2, tokens)
    same, _ = tree.extend(node, tokens, 2, 3, tokens)
    assert same is node
    reader, _ = tree.match(tokens, 5)
    assert reader is node
    longer, _ = tree.extend(node, tokens, 3, 5, tokens)
    assert longer is not node
    tree.unlock(longer)
    assert list(tree.evict(9)) == [4, 5]
    assert tree.locked == 3
    tree.unlock(reader)


def test_the_least_recently_used_leaf_goes_first_and_only_as_far_as_needed() -> None:
    tree = RadixTree()
    insert(tree, ids(1, 1, 1), 10)
    insert(tree, ids(2, 2, 2), 20)
    insert(tree, ids(3, 3, 3), 30)
    lookup(tree, ids(1, 1, 1))
    assert list(tree.evict(2)) == [21, 22]
    assert lookup(tree, ids(2, 2, 2)) == [20]  # used again: the third is the oldest now
    assert list(tree.evict(3)) == [30, 31, 32]
    assert list(tree.evict(3)) == [10, 11, 12]


def test_a_parent_becomes_a_leaf_when_its_last_child_has_gone() -> None:
    tree = RadixTree()
    insert(tree, ids(1, 2, 3), 0)
    insert(tree, ids(1, 2, 4), 10)
    assert sorted(tree.evict(4)) == [0, 1, 2, 12]
    assert tree.size == 0
    assert lookup(tree, ids(1)) == []


def test_locked_tokens_are_never_evicted() -> None:
    tree = RadixTree()
    insert(tree, ids(1, 2, 3), 0)
    node, _ = tree.match(ids(1, 2), 2)
    assert list(tree.evict(9)) == [2]
    tree.unlock(node)


def test_use_without_eviction_does_not_grow_the_order() -> None:
    tree = RadixTree()
    insert(tree, ids(1, 2, 3), 0)
    for _ in range(10_000):
        lookup(tree, ids(1, 2, 3))
    assert len(tree._leaves) < 100


def test_unlocking_twice_is_noticed() -> None:
    tree = RadixTree()
    node, _ = tree.extend(tree.root, ids(1), 0, 1, ids(0))
    tree.unlock(node)
    with pytest.raises(AssertionError, match="unlocked once too often"):
        tree.unlock(node)


@pytest.mark.parametrize("seed", range(5))
def test_a_match_equals_the_best_of_all_inserted_sequences(seed: int) -> None:
    rng, tree, seen = random.Random(seed), RadixTree(), []
    slot_of: dict[tuple[int, ...], int] = {}
    for i in range(150):
        tokens = array("i", [rng.randrange(3) for _ in range(rng.randint(1, 12))])
        got = lookup(tree, tokens)
        best = 0
        for other in seen:
            common = 0
            while common < min(len(tokens), len(other)) and tokens[common] == other[common]:
                common += 1
            best = max(best, common)
        assert len(got) == best
        assert got == [slot_of[tuple(tokens[: n + 1])] for n in range(best)]
        insert(tree, tokens, 100 * i)
        for n in range(best, len(tokens)):
            slot_of[tuple(tokens[: n + 1])] = 100 * i + n
        seen.append(tokens)
    assert tree.size == len(slot_of)


def test_a_long_match_is_not_a_loop_over_tokens() -> None:
    """16k tokens in 64 nodes are compared in far fewer lines of Python than there are tokens."""
    tree, tokens = RadixTree(), array("i", range(16384))
    readers = [tree.match(tokens, 0)[0]]
    for end in range(256, 16385, 256):
        readers.append(tree.extend(readers[-1], tokens, end - 256, end, tokens)[0])
        readers.append(tree.match(tokens, end)[0])  # so that no node grows in place
    num_lines = 0

    def count(frame: FrameType, event: str, arg: object) -> object:
        nonlocal num_lines
        num_lines += event == "line"
        return count

    was = sys.gettrace()
    sys.settrace(count)
    try:
        assert len(lookup(tree, tokens)) == 16384
    finally:
        sys.settrace(was)
    assert 64 < num_lines < 4096, num_lines
