"""Random lives: many requests on a tiny KV, whoever is ready acts in random order."""

from __future__ import annotations

import random

import pytest

from asyncllm.constrain.factory import ConstraintFactory
from asyncllm.core.request import SamplingParams
from asyncllm.core.windows import Window
from asyncllm.messages import Abort
from tests.actors.fake_device import World, fake_grammar, oracle


def live(
    world: World,
    rng: random.Random,
    num: int,
    *,
    aborts: bool = True,
    constrained: float = 0.3,
    clients: int = 1,
) -> None:
    """Submit ``num`` requests at random times and let everybody act until all is quiet."""
    base = [[rng.randrange(world.device.vocab) for _ in range(30)] for _ in range(3)]
    rid = 0
    left = num
    for _ in range(200_000):
        ready = world.ready()
        if left and (not ready or rng.random() < 0.15):
            stem = rng.choice(base)[: rng.randint(0, 30)]
            tail = [rng.randrange(world.device.vocab) for _ in range(rng.randint(0, 8))]
            prompt = (stem + tail) or [1]
            params = random_params(rng)
            if rng.random() < constrained:
                params["grammar"] = fake_grammar(prompt)
            elif rng.random() < 0.2:
                params["allowed_token_ids"] = tuple(
                    rng.sample(range(world.device.vocab), min(4, world.device.vocab))
                )
            first, client = -1, left % clients
            for i in range(min(left, rng.choice([1, 1, 1, 3]))):
                rid = (rng.choice([0, 2]) << 40) + num - left + 1
                left -= 1
                outputs = begun(world, rng, prompt, {**params, "seed": i})
                told = predicted(world, rid, prompt, {**params, "seed": i})
                world.submit(
                    rid, prompt, first, client, outputs=outputs, prediction=told, **params, seed=i
                )
                first = rid if i == 0 else first
                if rng.random() < 0.2:
                    world.stop_after[rid] = len(outputs) + rng.randint(1, 6)
        elif aborts and rng.random() < 0.03 and world.submitted:
            world.tell(Abort(rng.choice(list(world.submitted))))
        elif ready:
            world.turn(rng.choice(ready))
            if not world.ready():
                assert not world.core.requests, "a request hangs"
        elif not left:
            return
    raise AssertionError("no end")


def begun(
    world: World, rng: random.Random, prompt: list[int], params: dict[str, object]
) -> list[int]:
    """What a request brings of its own output, if it does: any part of it, or all."""
    if rng.random() < 0.7:
        return []
    whole = oracle(prompt, SamplingParams(**params), world.device.vocab, world.device.eos)  # type: ignore[arg-type]
    return whole[: rng.randint(0, len(whole))]


def predicted(world: World, rid: int, prompt: list[int], params: dict[str, object]) -> list[int]:
    """What every other request of a world with drafts predicts: its output, some of it changed."""
    rng = random.Random(rid)
    if world.core.speculation is None or rid % 2:
        return []
    whole = oracle(prompt, SamplingParams(**params), world.device.vocab, world.device.eos)  # type: ignore[arg-type]
    return [rng.randrange(world.device.vocab) if rng.random() < 0.2 else each for each in whole]


def random_params(rng: random.Random) -> dict[str, object]:
    params: dict[str, object] = {"max_new_tokens": rng.choice([0, 1, 2, 5, 12, 25])}
    chance = rng.random()
    if chance < 0.1:
        params["prompt_logprobs"] = 1
    elif chance < 0.2:
        params["presence_penalty"] = 0.5
    elif chance < 0.3:
        params["use_cache"] = False
    elif chance < 0.4:
        params["ignore_eos"] = True
    elif chance < 0.5:
        params["stop_token_ids"] = (5, 6, 7)
    if rng.random() < 0.2:
        params["min_new_tokens"] = 3
    if rng.random() < 0.2:
        params["logprobs"] = 1
    return params


@pytest.mark.parametrize("encode_local", [False, True], ids=["objects", "frames"])
@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("seed", range(12))
def test_each_request_ends_once_with_its_tokens(seed: int, depth: int, encode_local: bool) -> None:
    rng = random.Random(1000 * seed + depth)
    world = World(
        num_slots=rng.choice([70, 90, 160]),
        num_lanes=rng.choice([2, 5, 9]),
        batch_max_tokens=rng.choice([8, 40]),
        chunked_prefill_size=rng.choice([3, 8, 64]),
        eos_ids={3, 4},
        depth=depth,
        headroom=rng.choice([0, 0, 8]),
        use_tree=rng.random() < 0.85,
        share_prompts=rng.random() < 0.5,
        encode_local=encode_local,
    )
    live(world, rng, 40, clients=rng.choice([1, 3]))
    world.check_end()


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("seed", range(7))
def test_windows_see_their_own_tokens_in_slots_that_are_given_on(seed: int, depth: int) -> None:
    """A sliding slot that is free goes to the next who asks; the device checks what each row sees."""
    rng = random.Random(1000 * seed + depth)
    size = rng.choice([1, 2, 5, 16, 40])
    window = Window(size)
    world = World(
        num_slots=rng.choice([90, 160, 400]),
        num_lanes=rng.choice([2, 5, 9]),
        batch_max_tokens=rng.choice([8, 40]),
        chunked_prefill_size=rng.choice([3, 8, 64]),
        eos_ids={3, 4},
        depth=depth,
        headroom=rng.choice([0, 0, 8]),
        use_tree=rng.random() < 0.85,
        share_prompts=rng.random() < 0.5,
        encode_local=rng.random() < 0.3,
        window=size,
        num_sliding=window.most + rng.choice([1, 5, 30, 60]),
    )
    live(world, rng, 40, clients=rng.choice([1, 3]))
    world.check_end()
    failures = [end.failure.detail for end in world.finished.values() if end.failure]
    assert not [detail for detail in failures if "KV" in detail], "what fits alone gets its turn"


def test_the_lives_meet_what_they_are_for() -> None:
    """Preemption, eviction, hits and duplicates happen in such lives; else they prove little."""
    rng = random.Random(5)
    world = World(num_slots=70, num_lanes=9, batch_max_tokens=40, eos_ids={3}, headroom=0)
    live(world, rng, 250, constrained=0.0)
    world.check_end()
    assert world.core.preemptions > 3
    assert world.ledger.evicted_tokens > 100
    assert world.ledger.hit_tokens > 100


def test_constrained_lives_end_in_every_way_and_are_preempted() -> None:
    rng = random.Random(7)
    world = World(num_slots=60, num_lanes=9, batch_max_tokens=40, eos_ids={3}, headroom=0)
    live(world, rng, 250, constrained=1.0)
    world.check_end()
    assert world.core.preemptions > 3
    assert {end.reason for end in world.finished.values()} == {0, 1, 2, 3}


def test_a_constrained_request_waits_for_its_token_and_others_do_not() -> None:
    world = World(num_slots=200, num_lanes=4, vocab=500)
    prompts = {1: [1] * 4, 2: [2] * 4, 3: [3] * 4}
    for rid, prompt in prompts.items():
        grammar = fake_grammar(prompt) if rid == 1 else None
        world.submit(rid, prompt, max_new_tokens=8, ignore_eos=True, grammar=grammar)
    world.settle("scheduler", "allocator", "runner")
    assert len(world.pending) == 2, "the pipeline is full"
    world.run()
    world.check_end()
    lanes = [set(plan.lanes) for plan in world.device.plans]
    free, (mine,) = lanes[0], set.union(*lanes) - lanes[0]
    assert len(free) == 2
    assert all(free <= step for step in lanes[1:6])
    own = [number for number, step in enumerate(lanes) if mine in step]
    assert own[0] < 4
    assert all(own[i + 1] - own[i] in (2, 3) for i in range(2))


def test_a_list_of_tokens_keeps_the_overlap() -> None:
    """What may come does not depend on the token before, so nobody waits for it."""
    world = World(num_slots=200, num_lanes=4, vocab=500)
    world.submit(1, [1] * 4, max_new_tokens=8, allowed_token_ids=(4, 499))
    world.settle("scheduler", "allocator", "runner")
    assert len(world.pending) == 2
    world.run()
    world.check_end()
    assert set(world.tokens[1]) <= {4, 499}
    assert len(world.device.plans) <= 9


@pytest.mark.parametrize("share_prompts", [False, True])
def test_choices_of_one_prompt_compute_it_once(share_prompts: bool) -> None:
    world = World(num_slots=300, num_lanes=8, share_prompts=share_prompts)
    prompt = list(range(30))
    for rid in range(1, 5):
        world.submit(rid, prompt, -1 if rid == 1 else 1, max_new_tokens=6, seed=rid)
    world.run()
    world.check_end()
    once = len(prompt) + 3  # what follows a hit computes one token of it
    assert (world.core.prompt_tokens == once) is share_prompts
    cached = [world.finished[rid].cached_len for rid in range(1, 5)]
    assert (cached == [0, 29, 29, 29]) is share_prompts


@pytest.mark.parametrize("gone", [1, 2, 3])
def test_held_choices_survive_the_end_of_the_first(gone: int) -> None:
    world = World(num_slots=300, num_lanes=8, share_prompts=True, chunked_prefill_size=8)
    for rid in range(1, 4):
        world.submit(rid, list(range(30)), -1 if rid == 1 else 1, max_new_tokens=3, seed=rid)
    world.settle("scheduler", "allocator", "runner")
    assert [len(plan.lanes) for plan in world.device.plans] == [1, 1], "two chunks of the first"
    world.tell(Abort(gone))
    world.run()
    world.check_end()
    assert {rid for rid, end in world.finished.items() if end.reason == 2} == {gone}
    assert world.core.prompt_tokens < 2 * 30


def test_choices_without_the_cache_are_not_held() -> None:
    world = World(num_slots=300, num_lanes=8, share_prompts=True)
    for rid in range(1, 4):
        world.submit(rid, [1] * 5, -1 if rid == 1 else 1, max_new_tokens=3, use_cache=False)
    world.settle("scheduler", "allocator", "runner")
    assert len(world.device.plans[0].lanes) == 3
    world.run()
    world.check_end()


def test_a_grammar_that_cannot_be_had_ends_the_request_before_it_runs() -> None:
    world = World()
    world.scheduler._constrain = ConstraintFactory(50, ()).of
    world.submit(1, [1] * 4, max_new_tokens=8, grammar=("json", ""))
    world.run()
    assert world.finished[1].failure.status == 400
    assert "--output_constraint_mode" in world.finished[1].failure.detail


def test_one_of_another_client_is_served_among_the_first_of_five_hundred() -> None:
    world = World(num_slots=200, num_lanes=4, batch_max_tokens=32, vocab=500)
    for rid in range(1, 501):
        world.submit(rid, [rid % 500] * 6, client=1, max_new_tokens=3, ignore_eos=True)
    world.settle("scheduler", "allocator", "runner")
    world.submit(1000, [7] * 6, client=2, max_new_tokens=3, ignore_eos=True)
    world.run()
    world.check_end()
    finished = list(world.finished)
    assert finished.index(1000) < 12, "those that ran already, and its turn"
    assert [rid for rid in finished if rid != 1000] == list(range(1, 501))


def test_three_clients_take_turns_to_the_end() -> None:
    world = World(num_slots=200, num_lanes=2, batch_max_tokens=16, vocab=500)
    for rid in range(90):
        client = 1 if rid < 60 else 2 if rid < 80 else 3
        world.submit(rid + 1, [rid] * 6, client=client, max_new_tokens=2, ignore_eos=True)
    world.run()
    world.check_end()
    finished = [1 if rid <= 60 else 2 if rid <= 80 else 3 for rid in world.finished]
    assert [sorted(finished[i : i + 3]) for i in range(0, 30, 3)] == [[1, 2, 3]] * 10
    assert sorted(finished[30:50]) == [1] * 10 + [2] * 10
    assert finished[50:] == [1] * 40
