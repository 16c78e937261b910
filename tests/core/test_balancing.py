"""Which group gets a request: known beginnings, load, turns; what is kept is bounded."""

from __future__ import annotations

import random

import pytest

from asyncllm.codec import i32
from asyncllm.core.balancing import MOST_SPANS, GroupBalancer


def made(policy: str = "cache_aware", num_groups: int = 2, **more: object) -> GroupBalancer:
    return GroupBalancer(num_groups, policy, **{"num_slots": 1 << 20, **more})  # type: ignore[arg-type]


def text(seed: int, length: int = 100) -> list[int]:
    return [random.Random(seed).randrange(1 << 15) for _ in range(length)]


class Clerk:
    """Places prompts under fresh ids."""

    def __init__(self, balancer: GroupBalancer) -> None:
        self.balancer, self.rid = balancer, 0

    def place(self, prompt: list[int], **more: object) -> int:
        self.rid += 1
        return self.balancer.place(self.rid, i32(prompt), **more)  # type: ignore[arg-type]

    def answer(self, prompt: list[int]) -> int:
        """Placed, computed and over."""
        group = self.place(prompt)
        self.balancer.began([self.rid])
        self.balancer.ended([self.rid])
        return group


def test_the_group_that_knows_the_longest_beginning_gets_it() -> None:
    clerk = Clerk(made(num_groups=3))
    first, second = text(1), text(2)
    assert [clerk.answer(first), clerk.answer(second)] == [0, 1]
    assert clerk.answer(second[:80] + text(3, 40)) == 1
    assert clerk.answer(first[:80] + text(4, 40)) == 0
    # both know its beginning, one of them more
    assert clerk.answer(first[:80] + text(4, 40) + text(5, 20)) == 0


@pytest.mark.parametrize("length", [40, 160])
def test_a_beginning_counts_if_it_is_half_of_the_prompt_or_long(length: int) -> None:
    clerk = Clerk(made(num_groups=3))
    shared = text(0, length)
    assert clerk.answer(shared + text(1, 20)) == 0
    assert clerk.answer(shared + text(2, length // 2)) == 0
    # else it is as good as new: the groups take turns
    assert clerk.answer(shared + text(3, 400)) == (1 if length == 40 else 0)


def test_requests_that_may_not_use_the_cache_do_not_look_at_it() -> None:
    clerk = Clerk(made())
    assert clerk.answer(text(1)) == 0
    assert clerk.place(text(1), cached=False) == 1
    assert clerk.place(text(1)) == 0


def test_a_prompt_that_all_have_does_not_bring_all_to_one_group() -> None:
    clerk = Clerk(made(num_groups=3))
    groups = [clerk.place(text(1) + text(i, 20)) for i in range(60)]
    assert groups[:5] == [groups[0]] * 5
    counts = clerk.balancer.num_requests
    assert sum(counts) == 60
    assert max(counts) <= min(counts) + min(counts) // 4 + 5


def test_then_the_least_load_of_tokens_that_wait_and_requests_that_run() -> None:
    clerk = Clerk(made())
    assert clerk.place(text(1, 100)) == 0
    assert [clerk.place(text(i, 30)) for i in (2, 3, 4)] == [1, 1, 1], "90 tokens wait, 100 there"
    clerk.balancer.began([1])  # only one request runs there now
    assert clerk.place(text(5, 30)) == 0


def test_a_waiting_prompt_weighs_what_its_group_does_not_know() -> None:
    clerk = Clerk(made())
    known = text(1, 1000)
    assert clerk.answer(known) == 0
    assert clerk.place(known) == 0  # an eighth of it at most is to be computed
    assert clerk.place(text(2, 140)) == 1
    assert clerk.place(text(3, 10)) == 0


def test_round_robin_looks_at_nothing() -> None:
    clerk = Clerk(made("round_robin", 3))
    assert [clerk.place(text(1)) for _ in range(7)] == [0, 1, 2, 0, 1, 2, 0]


def test_bs_balancer_gives_to_the_fewest_requests() -> None:
    clerk = Clerk(made("bs_balancer", 3))
    assert [clerk.place(text(1, n)) for n in (500, 1, 1)] == [0, 1, 2]
    clerk.balancer.ended([2])
    assert [clerk.place(text(1)) for _ in range(2)] == [1, 2], "equal ones take turns"


@pytest.mark.parametrize("policy", ["cache_aware", "round_robin", "bs_balancer"])
def test_choices_of_one_prompt_stay_together(policy: str) -> None:
    apart, together = made(policy, 4), made(policy, 4, together=True)
    for balancer in (apart, together):
        for rid in range(10, 22):
            balancer.place(rid, i32(text(1)), after=-1 if rid == 10 else 10)
    assert len({together.group_of(rid) for rid in range(10, 22)}) == 1
    assert len({apart.group_of(rid) for rid in range(10, 22)}) > 1
    together.ended([10])
    assert together.place(30, i32(text(2)), after=10) in range(4), "the first is over"


def test_what_is_over_or_unknown_is_ignored() -> None:
    clerk = Clerk(made())
    clerk.place(text(1))
    for _ in range(2):
        clerk.balancer.began([1, 77])
    for _ in range(2):
        clerk.balancer.ended([1, 77])
        clerk.balancer.began([1])
    assert clerk.balancer.num_requests == [0, 0]
    assert 1 not in clerk.balancer
    assert clerk.balancer.group_of(1) is None
    assert [clerk.place(text(i, 50)) for i in (2, 3, 4, 5)] == [1, 0, 1, 0], "no load is left"


def test_of_many_prompts_those_are_known_that_fit_into_the_cache() -> None:
    clerk = Clerk(made(num_slots=1000))
    old = [text(i) for i in range(5)]
    homes = [clerk.answer(prompt) for prompt in old]
    assert homes == [0, 1, 0, 1, 0]
    assert clerk.answer(old[1]) == 1  # used again
    for i in range(100, 118):  # 900 tokens for each group
        clerk.answer(text(i))
    clerk.place(text(200, 10))  # it weighs on the group whose turn it was
    assert clerk.answer(old[1]) == 1
    assert len(clerk.balancer._seen[0]) < 200


def test_memory_is_bounded_however_large_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    assert MOST_SPANS <= 1 << 16
    monkeypatch.setattr("asyncllm.core.balancing.MOST_SPANS", 50)
    clerk = Clerk(made(num_slots=1 << 40))
    for i in range(40):
        clerk.answer(text(i))
    assert [len(seen) for seen in clerk.balancer._seen] == [50, 50]


def test_without_a_cache_nothing_is_known() -> None:
    clerk = Clerk(made(num_slots=0))
    assert [clerk.answer(text(1)) for _ in range(4)] == [0, 1, 0, 1]


def test_a_long_prompt_costs_few_spans() -> None:
    clerk = Clerk(made())
    clerk.answer(text(1, 100_000))
    assert len(clerk.balancer._seen[0]) < 100
