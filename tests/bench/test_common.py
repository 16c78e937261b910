"""What the clients send, and how they read a stream."""

from __future__ import annotations

import asyncio
import json
import math
from itertools import pairwise

import pytest

from bench.common import (
    Events,
    Load,
    Record,
    completion_body,
    percentile,
    poisson_arrivals,
    random_prompts,
    run_load,
    split_load,
)
from tests.bench.fake_server import CACHED, fake_server

STREAM = b'data: {"a": 1}\n\n: note\n\nevent: x\ndata: two\n\ndata:[DONE]\n\ndata: rest'


@pytest.mark.parametrize("newline", [b"\n", b"\r\n"], ids=["lf", "crlf"])
def test_events_are_the_same_wherever_the_stream_is_cut(newline: bytes) -> None:
    stream = STREAM.replace(b"\n", newline)
    want = [b'{"a": 1}', b"two", b"[DONE]"]
    for size in range(1, len(stream) + 1):
        events = Events()
        got = [e for i in range(0, len(stream), size) for e in events.feed(stream[i : i + size])]
        assert got == want, size


def test_percentiles_are_values_that_occurred() -> None:
    values = [float(v) for v in range(100, 0, -1)]
    assert [percentile(values, p) for p in (0.0, 0.5, 0.9, 0.99, 1.0)] == [1, 51, 91, 100, 100]
    assert percentile([7.0], 0.5) == 7
    assert math.isnan(percentile([], 0.5))


def test_prompts_share_their_head_only() -> None:
    prompts = random_prompts([20, 30, 40], 1 << 20, seed=3, shared=10)
    assert [len(p) for p in prompts] == [20, 30, 40]
    assert prompts[0][:10] == prompts[1][:10] == prompts[2][:10]
    assert prompts[0][10:] != prompts[1][10:20]
    assert all(1000 <= t < 1 << 20 for p in prompts for t in p)
    assert prompts == random_prompts([20, 30, 40], 1 << 20, seed=3, shared=10)
    assert prompts != random_prompts([20, 30, 40], 1 << 20, seed=4, shared=10)


def test_prompts_begin_with_one_of_several_heads() -> None:
    prompts = random_prompts([15] * 200, 1 << 20, seed=3, shared=10, heads=4)
    starts = [tuple(prompt[:10]) for prompt in prompts]
    assert len(set(starts)) == 4
    assert min(map(starts.count, starts)) > 25
    assert len({tuple(prompt[10:]) for prompt in prompts}) == 200
    assert {len(prompt) for prompt in prompts} == {15}


def test_arrivals_have_the_asked_rate() -> None:
    arrivals = poisson_arrivals(4000, 8.0, seed=1)
    assert arrivals == sorted(arrivals)
    assert 4000 / arrivals[-1] == pytest.approx(8.0, rel=0.05)
    gaps = [b - a for a, b in pairwise(arrivals)]
    assert sum(g > 0.125 for g in gaps) / len(gaps) == pytest.approx(math.exp(-1), abs=0.03)


@pytest.mark.parametrize(("exact", "want"), [(True, [3, 3, 2, 2]), (False, [2, 2, 2, 2])])
def test_a_load_is_dealt_out_whole(exact: bool, want: list[int]) -> None:
    bodies = [completion_body("m", [i], 1) for i in range(11)]
    load = Load(["u"] * 11, bodies, [float(i) for i in range(11)], 10, 9.0)
    parts = split_load(load, 4, exact=exact)
    assert [p.conc for p in parts] == want
    assert sorted(b["prompt"][0] for p in parts for b in p.bodies) == list(range(11))
    for part in parts:
        assert part.arrivals == [float(b["prompt"][0]) for b in part.bodies]


@pytest.mark.parametrize(("num", "conc", "procs"), [(512, 256, 6), (48, 8, 6), (100, 7, 3)])
def test_no_worker_is_left_with_a_request_more_than_its_share(
    num: int, conc: int, procs: int
) -> None:
    bodies = [completion_body("m", [i], 1) for i in range(num)]
    parts = split_load(Load(["u"] * num, bodies, None, conc, 9.0), procs)
    assert sum(p.conc for p in parts) == conc
    assert sum(len(p.bodies) for p in parts) == num
    assert {-(-len(p.bodies) // p.conc) for p in parts} <= {num // conc, -(-num // conc)}


def test_a_record_counts_tokens_by_usage_else_by_chunk() -> None:
    record = Record(1.0, stamps=[1.5, 2.0, 3.5])
    assert record.num_tokens == 3
    assert record.ttft_s == 0.5
    assert record.tpot_s == 1.0
    assert record.gaps_s == [0.5, 1.5]
    record.usage = {"completion_tokens": 5}
    assert record.num_tokens == 5
    assert record.tpot_s == 0.5


def run_bodies(*kinds: str, num: int, out: int = 5, conc: int = 1) -> tuple[list[Record], int]:
    async def scene() -> tuple[list[Record], int]:
        async with fake_server(*kinds) as fake:
            bodies = [completion_body("m", [5, 6, 7, 8, i], out) for i in range(num)]
            records = await run_load(Load([fake.url] * len(bodies), bodies, None, conc, 30.0))
            assert [b["prompt"] for b in fake.bodies] == [b["prompt"] for b in bodies]
            return records, fake.most_at_once

    return asyncio.run(scene())


def test_what_happens_to_requests_is_told_apart() -> None:
    records, _ = run_bodies("good", "refused", "fails", "cut", "silent", num=6)
    assert [r.kind for r in records] == ["", "http 429", "in stream", "", "", ""]
    assert [r.ok for r in records] == [True, False, False, True, False, True]
    assert [r.done for r in records] == [True, False, True, False, True, True]
    assert "too busy" in records[1].error
    assert "lost the device" in records[2].error
    assert [r.num_tokens for r in records] == [5, 0, 5, 2, 5, 5]
    assert records[0].usage is not None
    assert records[0].usage["prompt_tokens_details"] == {"cached_tokens": CACHED}
    assert all(r.start <= r.end and r.prompt_len == 5 and r.asked == 5 for r in records)
    assert records[0].start <= records[0].stamps[0] <= records[0].stamps[-1] <= records[0].end


def test_closed_loop_keeps_to_its_concurrency() -> None:
    records, most = run_bodies(num=12, conc=3)
    assert len(records) == 12
    assert 1 < most <= 3


def test_a_server_that_is_not_there_is_an_error_of_the_request(free_port: int) -> None:
    load = Load([f"http://127.0.0.1:{free_port}"], [completion_body("m", [1], 1)], None, 1, 5.0)
    (record,) = asyncio.run(run_load(load))
    assert record.kind == "connection"
    assert not record.ok


def test_open_loop_sends_everything() -> None:
    async def scene() -> list[Record]:
        async with fake_server() as fake:
            bodies = [completion_body("m", [i], 2) for i in range(5)]
            return await run_load(
                Load([fake.url] * len(bodies), bodies, [0.0, 0.01, 0.01, 0.02, 0.03], 1, 30.0)
            )

    records = asyncio.run(scene())
    assert all(r.ok for r in records)
    starts = sorted(r.start for r in records)
    assert starts[-1] - starts[0] >= 0.02


def test_a_body_asks_for_an_exact_number_of_tokens() -> None:
    body = json.loads(json.dumps(completion_body("m", [1, 2], 9, temperature=0.5)))
    assert body == {
        "model": "m", "prompt": [1, 2], "max_tokens": 9, "ignore_eos": True, "stream": True,
        "stream_options": {"include_usage": True}, "temperature": 0.5,
    }  # fmt: skip
