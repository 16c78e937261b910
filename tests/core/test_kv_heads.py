"""Which rank sends which heads: every receiver gets each of its heads once, and nothing else."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest

from asyncllm.core.interval_set import IntervalSet
from asyncllm.core.kv_heads import part, senders
from asyncllm.models.spec import AttentionSpec, shard_heads


def spec(q_heads: int, kv_heads: int) -> AttentionSpec:
    return AttentionSpec(
        kind="gqa",
        num_q_heads=q_heads,
        num_kv_heads=kv_heads,
        head_dim=4,
        v_dim=4,
        scale=1.0,
        rope=None,
    )


def held(q_heads: int, kv_heads: int, tp: int) -> list[tuple[int, ...]]:
    return [shard_heads(spec(q_heads, kv_heads), tp, rank).kv_heads for rank in range(tp)]


@pytest.mark.parametrize("heads", [(8, 8), (8, 2), (9, 3), (6, 1), (15, 5), (16, 4)], ids=str)
@pytest.mark.parametrize("theirs", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("ours", [1, 2, 3, 4, 8])
def test_each_receiver_gets_each_of_its_heads_once(
    ours: int, theirs: int, heads: tuple[int, int]
) -> None:
    sent, taken = held(*heads, ours), held(*heads, theirs)
    for receiver in range(theirs):
        got: dict[int, int] = {}  # local place -> global head
        busy = set()
        for sender in range(ours):
            if (p := part(sent, taken, sender, receiver)) is None:
                continue
            busy.add(sender)
            for i in range(p.count):
                assert p.taken + i not in got
                got[p.taken + i] = sent[sender][p.sent + i]
        assert got == {i: head for i, head in enumerate(taken[receiver]) if head >= 0}
        assert tuple(sorted(busy)) == senders(sent, taken, receiver)


def test_receivers_of_what_several_hold_take_turns_among_them() -> None:
    everybody = [(0,)] * 4
    by = [senders(everybody, [(0,)] * 8, receiver) for receiver in range(8)]
    assert by == [(0,), (1,), (2,), (3,)] * 2


@pytest.mark.parametrize("seed", range(20))
def test_spans_are_sets(seed: int) -> None:
    rng = random.Random(seed)
    spans, want = IntervalSet(), set[int]()
    for _ in range(60):
        first = rng.randrange(200)
        end = first + rng.randrange(-3, 9)
        spans.add(first, end)
        want |= set(range(first, end))
        runs = list(spans)
        assert {i for run in runs for i in range(*run)} == want
        assert all(a[1] < b[0] for a, b in pairwise(runs))
        assert all(run[0] < run[1] for run in runs)
        first = rng.randrange(200)
        end = first + rng.randrange(-3, 9)
        assert spans.covers(first, end) == (set(range(first, end)) <= want)
