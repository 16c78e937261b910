"""Guessed tokens in the scheduler: the same outputs, from fewer steps."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import pytest

from asyncllm.core.ngram_lookup import NgramLookup
from asyncllm.core.windows import Window
from asyncllm.messages import Finished, StepPlan
from tests.actors.fake_device import World, fake_grammar
from tests.core.test_request_lifecycle import live


def drafts(plan: StepPlan) -> int:
    return len(plan.lanes) - len(set(plan.lanes))


@pytest.mark.parametrize("seed", range(24))
def test_random_lives_with_drafts_have_the_tokens_of_those_without(seed: int) -> None:
    rng = random.Random(seed)
    vocab = rng.choice([2, 3, 5])
    slides: Any = {}
    if seed % 3 == 0:
        size = rng.choice([1, 2, 5, 16, 40])
        slides = {"window": size, "num_sliding": Window(size).most + rng.choice([1, 30, 60])}
    world = World(
        num_slots=rng.choice([90, 160, 300]),
        num_lanes=rng.choice([1, 2, 5, 9]),
        batch_max_tokens=rng.choice([8, 40]),
        chunked_prefill_size=rng.choice([3, 8, 64]),
        eos_ids={4} if vocab == 5 else (),
        depth=rng.choice([1, 2, 3]),
        headroom=rng.choice([0, 8]),
        use_tree=rng.random() < 0.85,
        share_prompts=rng.random() < 0.5,
        encode_local=rng.random() < 0.3,
        vocab=vocab,
        drafts=rng.choice([1, 3, 8]),
        **slides,
    )
    live(world, rng, 40, constrained=0.2 * (vocab == 5), clients=rng.choice([1, 3]))
    world.check_end()
    plans = world.device.plans
    assert sum(map(drafts, plans)) > 20 or vocab == 5
    assert max(max(Counter(plan.lanes).values(), default=0) for plan in plans) <= 9
    told = sum(end.accepted for end in world.finished.values())
    speculation = world.core.speculation
    assert told <= speculation.accepted <= speculation.drafted == sum(map(drafts, plans))
    assert speculation.trying == 0


def test_a_text_that_does_not_repeat_itself_costs_no_step() -> None:
    """Nothing is tried, and the next step is planned while one runs, as without."""
    steps = []
    for most in (0, 8):
        world = World(vocab=5000, drafts=most, num_slots=200)
        world.submit(1, list(range(20)), max_new_tokens=60)
        world.settle("scheduler", "allocator", "runner")
        depths = set()
        while world.pending:
            depths.add(len(world.pending))
            world.turn(("device", 0))
            world.settle("scheduler", "allocator", "runner")
        world.run()
        world.check_end()
        assert 2 in depths
        assert not any(map(drafts, world.device.plans))
        steps.append(len(world.device.plans))
    assert steps[0] == steps[1]


@pytest.mark.parametrize("begun", [0, 5])
def test_a_predicted_text_comes_in_few_steps(begun: int) -> None:
    def ask(prediction: list[int]) -> tuple[list[int], int, Finished]:
        world = World(vocab=5000, drafts=8, num_slots=200)
        options: Any = {"outputs": whole[:begun], "prediction": prediction}
        world.submit(1, list(range(20)), max_new_tokens=60, **options)
        world.run()
        world.check_end()
        return world.tokens[1], len(world.device.plans), world.finished[1]

    whole: list[int] = []
    whole, steps, end = ask([])
    assert (end.drafted, end.accepted, steps > 59) == (0, 0, True)
    edited = [*whole[:30], 7, 8, 9, *whole[32:]]
    for prediction, most in ((whole, 20), (edited, 30), (whole[:20], 50), ([1, 2, 3] * 20, 60)):
        tokens, steps, end = ask(prediction)
        assert tokens == whole
        assert steps < most + 3
        assert end.accepted <= end.drafted
        assert (end.accepted == 0) == (prediction[0] == 1)


def test_of_a_request_that_predicts_only_its_prediction_is_counted() -> None:
    world = World(vocab=2, drafts=8, num_slots=400)
    world.submit(1, [0, 1] * 12, max_new_tokens=36, prediction=[7] * 30)
    world.run()
    end = world.finished[1]
    assert sum(map(drafts, world.device.plans)) > 8
    assert (end.accepted, end.drafted) == (0, 0)


def test_what_a_grammar_forces_is_not_counted_as_predicted() -> None:
    def ask(prediction: list[int]) -> tuple[list[int], int, Finished]:
        world = World(vocab=5, drafts=8, num_slots=400)
        grammar = fake_grammar([3, 1])
        world.submit(1, [3, 1], max_new_tokens=40, grammar=grammar, prediction=prediction)
        world.run()
        world.check_end()
        return world.tokens[1], sum(map(drafts, world.device.plans)), world.finished[1]

    whole, tried, end = ask([])
    assert tried == end.drafted > end.accepted > 0
    _, tried, end = ask([9, 8, 7] * 20)
    assert tried > 0
    assert (end.drafted, end.accepted) == (0, 0), "no such token has come"
    half = len(whole) // 2
    tokens, tried, end = ask(whole[:half])
    assert tokens == whole
    assert tried > end.drafted == end.accepted > 0, "only the first half is predicted"
    assert end.accepted <= half


def test_drafts_behind_a_stop_string_are_not_among_the_accepted() -> None:
    plain = World(vocab=5000, drafts=0, num_slots=200)
    plain.submit(1, [5, 6], max_new_tokens=40)
    plain.run()
    world = World(vocab=5000, drafts=8, num_slots=200)
    world.submit(1, [5, 6], max_new_tokens=40, prediction=plain.tokens[1])
    world.stop_after[1] = 13
    world.run()
    world.check_end()
    end, before, tried = world.finished[1], 0, 0
    for plan in world.device.plans:
        rows = zip(plan.starts, plan.counts, plan.lanes, [-1, *plan.lanes], strict=False)
        positions = [start - 2 for start, count, lane, last in rows if count == 1 and lane == last]
        tried += len(positions)
        before += sum(at < 13 for at in positions)
    assert (end.num_tokens, end.drafted, end.accepted) == (13, tried, before)
    assert before < tried


def test_guesses_under_grammars_do_not_hold_up_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """The step behind one that has them is planned while it runs."""
    monkeypatch.setattr(NgramLookup, "guesses", False)
    world = World(vocab=5, drafts=8, num_slots=900)
    world.submit(0, [0], max_new_tokens=100)
    for rid in range(1, 30):
        world.submit(rid, [rid % 5, 1], max_new_tokens=40, grammar=fake_grammar([rid % 5, 1]))
    behind = 0
    while ready := world.ready():
        world.turn(ready[0])
        plans = world.device.plans[len(world.device.plans) - len(world.pending) :]
        behind += len(plans) == 2 and drafts(plans[0]) > 0
    world.check_end()
    assert behind > 10
    accepted = [world.finished[rid].accepted for rid in range(30)]
    assert accepted[0] == 0
    assert sum(accepted) > 20
    assert world.core.speculation.trying == 0


@pytest.mark.parametrize(("num_slots", "headroom"), [(60, 0), (62, 8)])
def test_a_draft_that_finds_no_slot_is_left_out_and_preempts_nobody(
    num_slots: int, headroom: int
) -> None:
    world = World(vocab=2, drafts=8, num_slots=num_slots, headroom=headroom)
    world.submit(1, [0, 1] * 12, max_new_tokens=36)
    world.run()
    world.check_end()
    assert sum(map(drafts, world.device.plans)) > 8
    assert world.core.preemptions == 0


def test_tokens_behind_the_end_of_an_accepted_run_are_dropped() -> None:
    """The end comes from the detokenizer, or is a token in the midst of right guesses."""
    world = World(vocab=2, drafts=8, num_slots=400)
    for rid in range(8):
        world.submit(rid, [0, 1] * 12, max_new_tokens=36, seed=rid)
        world.stop_after[rid] = 5 + rid
    world.run()
    world.check_end()
    assert all(end.num_tokens == 5 + rid for rid, end in world.finished.items())
