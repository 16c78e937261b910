"""Where a text repeats itself, and how certain that is."""

from __future__ import annotations

import random
from collections.abc import Sequence

from asyncllm.codec import i32
from asyncllm.core.ngram_lookup import GRAM, LONGEST, NgramLookup

COPIED = list(range(100, 160))


def read(ids: list[int], prediction: Sequence[int] = (), *, begun: bool = False) -> NgramLookup:
    lookup = NgramLookup(i32(ids), len(ids) + 100, i32(prediction), begun=begun)
    while lookup.unread:
        assert lookup.read(7) > 0
    return lookup


def right(lookup: NgramLookup, tokens: list[int]) -> int:
    """How many of these were guessed, each before it was added."""
    found = 0
    for token in tokens:
        found += lookup.guesses and list(lookup.guess(1)) == [token]
        lookup.push(token)
    return found


def test_a_copy_is_followed_from_its_second_token_on() -> None:
    lookup = read([1, 2, *COPIED, 3])
    assert not lookup.guesses
    assert right(lookup, COPIED) == len(COPIED) - GRAM
    assert list(lookup.guess(1)) == [3]


def test_a_predicted_text_is_followed_from_its_first_token_to_its_last() -> None:
    lookup = read([1, 2, 3], COPIED)
    assert lookup.is_predicted
    assert right(lookup, COPIED[:-2]) == len(COPIED) - 2
    assert (len(lookup.chances(8)), list(lookup.guess(2))) == (2, COPIED[-2:])
    assert right(lookup, [*COPIED[-2:], 2, 1]) == 2
    assert (lookup.guesses, lookup.is_predicted) == (False, False)


def test_a_predicted_text_is_found_again_after_what_differs() -> None:
    for before, begun in (([1, 2, 3], False), ([1, 2, 3, COPIED[0]], True)):
        lookup = read(before, [8, 8, *COPIED], begun=begun)
        assert right(lookup, COPIED[begun:]) >= len(COPIED) - 4
    thought = list(range(200, 300))
    lookup = read([1, 2, 3], COPIED)
    assert right(lookup, [*thought, *COPIED]) == len(COPIED) - GRAM
    lookup = read([*thought, 1], COPIED)
    right(lookup, [5, 6, *thought[:20]])
    assert (lookup.is_predicted, lookup.guesses) == (False, True)


def test_a_predicted_text_needs_no_reading() -> None:
    lookup = NgramLookup(i32(range(1000)), 2000, i32(COPIED))
    assert right(lookup, COPIED[:20]) == 20
    lookup.read(5000)
    assert right(lookup, COPIED[20:]) == 40


def test_what_was_replaced_left_out_or_put_in_costs_a_few_guesses() -> None:
    for change in (
        [*COPIED[:30], 9, 9, *COPIED[32:]],
        [*COPIED[:30], *COPIED[40:]],
        [*COPIED[:30], 7, 8, 9, *COPIED[30:]],
    ):
        lookup = read([1, 2, *COPIED, 3])
        assert right(lookup, change) >= len(change) - GRAM - 4


def test_the_place_that_agrees_longest_is_taken() -> None:
    lookup = read([5, 1, 2, 3, 70, 6, 1, 2, 3, 80, 0, 4, 5, 1, 2, 3])
    assert list(lookup.guess(1)) == [70]


def test_a_loop_is_guessed_beyond_the_end_of_the_text() -> None:
    lookup = read([9, *[1, 2, 3] * 3])
    assert list(lookup.guess(8)) == [1, 2, 3, 1, 2, 3, 1, 2]


def test_nothing_is_guessed_before_all_is_read_and_tokens_may_come_meanwhile() -> None:
    lookup = NgramLookup(i32([*COPIED, *COPIED[:10]]), 200)
    lookup.read(20)
    lookup.push(COPIED[10])
    assert not lookup.guesses
    lookup.read(1000)
    assert not lookup.unread
    assert list(lookup.guess(2)) == COPIED[11:13]


def test_chances_fall_with_each_guess_and_rise_with_agreement() -> None:
    lookup = read([*COPIED, 1, *COPIED[:GRAM]])
    before = lookup.chances(8)
    assert before == sorted(before, reverse=True)
    right(lookup, COPIED[GRAM:LONGEST])
    after = lookup.chances(8)
    assert len(before) == len(after) == 8
    assert after[-1] > before[-1]
    assert lookup.chances(3, ahead=2) == after[2:5]


def test_a_text_whose_guesses_are_wrong_makes_them_unlikely() -> None:
    rng = random.Random(0)
    lookup = read([rng.randrange(4) for _ in range(300)])
    for _ in range(500):
        lookup.push(rng.randrange(4))
    assert lookup.guesses
    assert lookup.chances(2)[1] < 0.2


def test_any_text_is_guessed_from_itself() -> None:
    """The guess is what followed the place, for texts of few and of many different tokens."""
    rng = random.Random(1)
    for size in (1, 2, 5, 1000):
        ids = [rng.randrange(size) for _ in range(400)]
        lookup = read(ids[:50])
        for i in range(50, 400):
            if lookup.guesses:
                guess = list(lookup.guess(5))
                starts = [j for j in range(1, i + 1) if ids[:i][j : j + 1] == guess[:1]]
                assert starts, "a token that has been in the text"
            lookup.push(ids[i])
        assert list(lookup.ids) == ids
