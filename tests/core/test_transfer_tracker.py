"""Random lives of requests that move: prefill here, decode there, K/V on their way in between."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest

from asyncllm.codec import i32
from asyncllm.core.request import FinishReason, SamplingParams
from asyncllm.messages import (
    Abort,
    BeginDecode,
    Drain,
    Drained,
    EndpointGone,
    GroupProgress,
    ImportPlaced,
    JoinStep,
    KvArrived,
    KvSent,
    OfferStep,
    StepAgreed,
    Submit,
    TransferFailed,
)
from tests.actors.fake_device import World, fake_grammar, oracle
from tests.actors.fake_transfer import RANKS, Client, Pair
from tests.core.test_request_lifecycle import random_params


def make_pair(rng: random.Random, **changes: Any) -> Pair:
    def make() -> World:
        limits: dict[str, Any] = {
            "num_slots": rng.choice([70, 90, 160]),
            "num_lanes": rng.choice([2, 5, 9]),
            "batch_max_tokens": rng.choice([8, 40]),
            "chunked_prefill_size": rng.choice([3, 8, 64]),
            "eos_ids": {3, 4},
            "depth": rng.choice([1, 2, 3]),
            "headroom": rng.choice([0, 0, 8]),
            "use_tree": rng.random() < 0.85,
            "share_prompts": rng.random() < 0.5,
            "encode_local": rng.random() < 0.2,
            "in_step": rng.random() < 0.2,
        }
        world = World(**(limits | changes), reader="agent", num_ranks=RANKS)
        world.actors["lockstep"] = lambda _, batch: step_together(world, rng, batch)
        return world

    return Pair(rng, make(), make())


def step_together(world: World, rng: random.Random, offers: list[OfferStep]) -> None:
    """Another group takes the step too, and sometimes one that nobody here wants."""
    for offer in offers:
        world.tell(StepAgreed(offer.step, offer.num_tokens + rng.randint(0, 9), offer.mixed))
        if rng.random() < 0.2:
            world.tell(JoinStep(offer.step + 1))


def preempt(pair: Pair) -> None:
    """Somebody loses its place, at any moment."""
    world = pair.rng.choice([pair.p, pair.d])
    held = [*world.core.running.values(), *world.core.importing.values()]
    if held:
        world.core._preempt(pair.rng.choice(held))
        world.tell(Abort(0))  # nobody's; the scheduler looks around


def live(
    pair: Pair,
    num: int,
    *,
    aborts: float = 0.02,
    lapses: float = 0.0,
    preempts: float = 0.0,
    constrained: float = 0.3,
) -> None:
    """``num`` requests come at random times, and everybody acts until all is quiet."""
    rng, pair.lapses = pair.rng, lapses
    base = [[rng.randrange(50) for _ in range(30)] for _ in range(3)]
    for _ in range(200_000):
        acts = pair.acts()
        if len(pair.clients) < num and (not acts or rng.random() < 0.1):
            prompt = rng.choice(base)[: rng.randint(0, 30)]
            prompt = (prompt + [rng.randrange(50) for _ in range(rng.randint(0, 8))]) or [1]
            params: dict[str, Any] = {**random_params(rng), "seed": len(pair.clients)}
            params["max_new_tokens"] = rng.choice([1, 2, 5, 12, 25])
            if rng.random() < constrained:
                params["grammar"] = fake_grammar(prompt)
            stop_after = rng.randint(1, 9) if rng.random() < 0.15 else 0
            pair.ask(Client(prompt, SamplingParams(**params), stop_after))
        elif rng.random() < aborts and pair.clients:
            pair.abort(rng.choice(pair.clients))
        elif rng.random() < preempts:
            preempt(pair)
        elif acts:
            pair.act(rng.choice(acts))
        else:
            break
    check_end(pair)


def check_end(pair: Pair) -> None:
    """Each has ended with its tokens, and nobody holds anything."""
    for world in (pair.p, pair.d):
        assert not world.core.requests
        assert not world.core.moves
        assert world.ledger.used == 0
        assert not world.ledger.lanes
        assert sorted(world.core._free_lanes) == list(range(world.core.num_lanes))
        for rank in pair.ranks[id(world)]:
            assert (rank.exports, rank.imports, rank.computed) == ({}, {}, {})
    assert pair.ended == set(pair.of), "each half ends once"
    for client in pair.clients:
        end = client.end
        assert end is not None
        want = oracle(client.prompt, client.params, 50, {3, 4})
        if end.failure is not None:
            assert end.failure.detail == "nothing can follow" or end.failure.status == 503
        if end.reason in (FinishReason.STOP, FinishReason.LENGTH) and not client.stop_after:
            assert client.tokens == want
            assert end.num_tokens == len(want)
        else:
            assert client.tokens == want[: len(client.tokens)]
        if client.params.prompt_logprobs >= 0 and client.tokens:
            assert client.scores == [-float(i) for i in range(1, len(client.prompt))]


@pytest.mark.parametrize("seed", range(14))
def test_requests_move_and_give_the_tokens_of_one_server(seed: int) -> None:
    live(make_pair(random.Random(seed)), 30)


@pytest.mark.parametrize("seed", range(14))
def test_transfers_that_lapse_are_tried_again(seed: int) -> None:
    live(make_pair(random.Random(100 + seed)), 30, lapses=0.02)


@pytest.mark.parametrize("seed", range(14))
def test_who_loses_its_place_has_it_computed_or_sent_all_the_same(seed: int) -> None:
    live(make_pair(random.Random(200 + seed)), 30, lapses=0.005, preempts=0.03)


def test_the_lives_meet_what_they_are_for() -> None:
    """Room is short on both sides, imports are given up for want of it, and K/V come."""
    rng = random.Random(3)
    pair = make_pair(rng, num_slots=70, num_lanes=9, headroom=0)
    live(pair, 200, lapses=0.002, constrained=0.2)
    p, d = pair.p.core, pair.d.core
    assert d.preemptions > 3
    assert d.moves.imports > 50
    assert d.moves.lapses > 3
    assert p.moves.exports >= d.moves.imports
    assert p.moves.exported_tokens >= d.moves.imported_tokens > 500
    assert pair.p.ledger.hit_tokens > 100
    assert pair.d.ledger.hit_tokens > 100


# -- one at a time -------------------------------------------------------------------------------

PROMPT = list(range(30))


def quiet_pair(**changes: Any) -> Pair:
    limits = {
        "num_slots": 200,
        "num_lanes": 4,
        "chunked_prefill_size": 8,
        "depth": 2,
        "in_step": False,
    }
    return make_pair(random.Random(0), **(limits | {"headroom": 0, "use_tree": True} | changes))


def ask(pair: Pair, prompt: list[int] = PROMPT, **params: Any) -> Client:
    asked = {"max_new_tokens": 8, "ignore_eos": True, **params}
    client = Client(prompt, SamplingParams(**asked))
    pair.ask(client)
    return client


def run_until(pair: Pair, met: Callable[[], bool], *without: Any) -> None:
    """Everybody acts but for these, until something is so."""
    while not met():
        acts = [a for a in pair.acts() if a not in without and a[0] not in without]
        assert acts, "it never comes to it"
        pair.act(pair.rng.choice(acts))


def test_the_decode_node_computes_no_prompt_and_pages_leave_while_chunks_run() -> None:
    pair = quiet_pair(batch_max_tokens=40)
    client = ask(pair)
    run_until(pair, lambda: bool(pair.pages))
    assert len(pair.p.device.plans) < 4, "30 tokens are four chunks"
    pair.run()
    check_end(pair)
    p, d = pair.p.core, pair.d.core
    assert (p.prompt_tokens, d.prompt_tokens) == (30, 0)
    assert (p.moves.exported_tokens, d.moves.imported_tokens) == (30, 30)
    assert (p.generated_tokens, d.generated_tokens) == (1, 7)
    assert all(len(plan.tokens) == 1 for plan in pair.d.device.plans)
    again = ask(pair)
    pair.run()
    assert again.tokens == client.tokens
    assert (d.prompt_tokens, d.moves.imported_tokens) == (0, 31), "one token is always moved"


def test_what_has_been_generated_there_is_a_hit_for_the_next_turn() -> None:
    pair = quiet_pair()
    client = ask(pair)
    pair.run()
    ask(pair, PROMPT + client.tokens)
    pair.run()
    check_end(pair)
    # the last token has no K/V there
    assert pair.d.core.moves.imported_tokens == 30 + 1
    assert pair.p.core.prompt_tokens == 30 + 8


@pytest.mark.parametrize("late", ["K/V", "token"])
def test_the_token_may_come_before_the_kv_or_behind_them(late: str) -> None:
    pair = quiet_pair()
    client, d = ask(pair), pair.d.core
    if late == "K/V":
        run_until(pair, lambda: bool(d.requests) and not d.requests[1].lacks, pair._deliver)
    else:
        run_until(pair, lambda: d.moves.imports == 1, (pair.p.turn, ("agent", 0)))
        assert d.requests[1].lacks
    assert list(d.importing) == [client.there]
    assert not pair.d.device.plans
    pair.run()
    check_end(pair)


def test_an_import_gives_way_to_what_runs_and_is_computed_there() -> None:
    pair = quiet_pair(num_slots=64)
    first = ask(pair, PROMPT[:10], max_new_tokens=40)
    run_until(pair, lambda: len(first.tokens) > 1)
    second = ask(pair, [7] * 40, max_new_tokens=4)
    run_until(pair, lambda: first.end is not None, pair._deliver)
    assert first.attempts == 1
    assert pair.d.core.preemptions == 1, "the import alone"
    assert pair.d.core.moves.imports == 1
    pair.run()
    check_end(pair)
    assert second.attempts == 1
    assert pair.d.core.prompt_tokens == 40 + 1, "the token that came with it, too"


@pytest.mark.parametrize("where", range(0, 60, 3))
def test_an_abort_in_any_phase_frees_both_sides(where: int) -> None:
    pair = quiet_pair()
    client = ask(pair, max_new_tokens=4, grammar=fake_grammar(PROMPT) if where % 2 else None)
    for _ in range(where):
        if acts := pair.acts():
            pair.act(pair.rng.choice(acts))
    pair.abort(client)
    pair.run()
    check_end(pair)


def test_slots_of_an_import_that_has_lapsed_wait_for_the_other_rank() -> None:
    pair = quiet_pair()
    client = ask(pair)
    client.attempts = 4  # this one is the last
    one, other = pair.ranks[id(pair.d)]
    run_until(pair, lambda: bool(one.imports and other.imports), pair._deliver)
    one.lapse(client.there)
    run_until(
        pair, lambda: client.end is not None, pair._deliver, (pair.d.turn, ("kv_transfer", 1))
    )
    assert not pair.d.core.requests
    assert pair.d.ledger.used == 30, "the other one may still write"
    pair.run()
    check_end(pair)
    failure = client.end and client.end.failure
    assert failure
    assert (failure.code, failure.status) == ("transfer_failed", 503)
    assert "nothing comes" in failure.detail


def test_answers_that_come_twice_or_of_nobody_change_nothing() -> None:
    pair = quiet_pair()
    client = ask(pair)
    run_until(pair, lambda: client.here >= 0, pair._deliver)
    for _ in range(2):
        for rid in (client.there, 999):
            pair.d.tell(KvSent(rid=rid, rank=0, seq=0))
            pair.p.tell(KvSent(rid=rid, rank=7, seq=0))
            pair.d.tell(KvArrived(rid, 7))
            pair.d.tell(TransferFailed(rid, 8, "x"))
        pair.p.tell(BeginDecode(client.here, 3))
        pair.d.tell(BeginDecode(999, 3))
    pair.run()
    for rank in range(RANKS):
        pair.d.tell(KvArrived(client.there, rank))
        pair.d.tell(BeginDecode(client.there, 3))
    pair.run()
    check_end(pair)
    assert client.attempts == 1


def test_a_first_token_that_is_none_ends_the_request() -> None:
    pair = quiet_pair()
    client = ask(pair)
    pair.d.scheduler._vocab_size = 50
    run_until(pair, lambda: client.here >= 0)
    pair.d.tell(BeginDecode(client.there, 50))
    pair.run()
    check_end(pair)
    assert [type(msg) for msg in pair.d.rejected] == [BeginDecode]
    assert not pair.d.device.plans


def test_a_prefill_node_is_drained_when_its_kv_have_left() -> None:
    pair = quiet_pair()
    client = ask(pair)
    run_until(pair, lambda: client.here >= 0)
    pair.p.tell(Drain(30.0))
    run_until(pair, lambda: bool(client.tokens), pair._send)
    pair.p.settle("scheduler", "allocator")
    assert not pair.p.core.requests
    assert Drained("scheduler", 0) not in pair.p.others
    pair.run()
    assert Drained("scheduler", 0) in pair.p.others
    check_end(pair)


def test_the_balancer_knows_a_request_until_its_kv_have_left() -> None:
    """An abort comes by it, and is to stop what is on its way."""
    pair = quiet_pair()
    pair.p.scheduler._balanced = True
    client = ask(pair)
    run_until(pair, lambda: bool(client.tokens), pair._send)
    pair.p.settle("balancer")
    told = [msg for msg in pair.p.others if isinstance(msg, GroupProgress)]
    (begun,) = {rid for msg in told for rid in msg.begun}
    assert not [rid for msg in told for rid in msg.ended]
    pair.p.tell(Abort(begun))
    pair.abort(client)
    pair.run()
    check_end(pair)
    assert pair.p.core.moves.exports == 0
    told = [msg for msg in pair.p.others if isinstance(msg, GroupProgress)]
    assert [rid for msg in told for rid in msg.ended] == [begun]


@pytest.mark.parametrize("end", [Drain(0.0), EndpointGone(0)], ids=["drain", "gone"])
def test_the_end_of_all_requests_takes_back_what_is_on_its_way(end: Drain | EndpointGone) -> None:
    pair = quiet_pair()
    client = ask(pair)
    run_until(pair, lambda: bool(client.tokens), pair._send)
    for world in (pair.p, pair.d):
        world.tell(end)
        world.settle("scheduler")
        assert world.ledger.used > 0, "ranks have not let go"
    pair.run()
    for world in (pair.p, pair.d):
        assert not world.core.requests
        assert not world.core.moves
        assert world.ledger.used == 0


def place(world: World, rid: int, prompt: list[int], client: int = 0) -> None:
    params = SamplingParams(max_new_tokens=4)
    world.tell(Submit(rid=rid, prompt=i32(prompt), params=params, client=client, imports=True))


def placed(world: World) -> list[int]:
    """The rids that have slots, in the order in which they got them."""
    world.settle("scheduler", "allocator")
    return [msg.rid for msg in world.ref("agent").queue if isinstance(msg, ImportPlaced)]


def test_imports_take_lanes_and_turns_as_others_do() -> None:
    world = quiet_pair(num_lanes=3).d
    for rid in (1, 2, 3):
        place(world, rid, PROMPT, client=1)
    place(world, 4, PROMPT, client=2)
    assert placed(world) == [1, 4, 2]
    world.tell(Abort(1))
    placed(world)
    world.settle("kv_transfer")
    assert placed(world) == [1, 4, 2, 3]


def test_imports_leave_what_the_others_will_need_and_cost_no_budget() -> None:
    world = quiet_pair(num_slots=64, headroom=8, batch_max_tokens=8).d
    place(world, 1, [1] * 8)
    place(world, 2, [2] * 31)  # 8 + 8 and 31 + 8 of 64
    place(world, 3, [3] * 2)  # 8 for each of the two are kept
    assert placed(world) == [1, 2]
    assert world.reserves == 1
    assert world.ledger.used == 8 + 31
