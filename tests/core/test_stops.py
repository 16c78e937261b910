"""Stop strings and sequences: the same cut however things are split, nothing held back needlessly."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from asyncllm.core.stops import SequenceFinder, StopFinder, StopMatcher

LETTERS = st.text("abc", max_size=14)
STOPS = st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=3).map(tuple)


def reference(text: str, stops: tuple[str, ...]) -> tuple[str, bool]:
    found = [text.find(s) for s in stops if s in text]
    return (text[: min(found)], True) if found else (text, False)


@settings(derandomize=True, max_examples=200, deadline=None)
@given(parts=st.lists(LETTERS, max_size=6), stops=STOPS)
def test_any_split_cuts_where_find_cuts(parts: list[str], stops: tuple[str, ...]) -> None:
    finder = StopFinder(stops)
    got = "".join(finder.push(part) for part in parts) + finder.flush()
    text = "".join(parts)
    assert (got, finder.hit) == reference(text, stops)
    assert text[len(got) :].startswith(finder.found)
    assert (finder.found in stops) is finder.hit
    keeps = StopFinder(stops, keep=True)
    assert "".join(keeps.push(part) for part in parts) + keeps.flush() == got + finder.found


@settings(derandomize=True, max_examples=100, deadline=None)
@given(text=LETTERS, stops=STOPS)
def test_only_a_possible_beginning_is_held_back(text: str, stops: tuple[str, ...]) -> None:
    finder = StopFinder(stops)
    shown = "".join(finder.push(char) for char in text)
    if not finder.hit:
        held = text[len(shown) :]
        # the beginning of a stop string, which may have a shorter one inside
        assert not held or any(s.startswith(held) and s != held for s in stops)


def test_stop_string_over_three_parts_is_cut() -> None:
    finder = StopFinder(("STOP",))
    assert [finder.push(part) for part in ("one S", "TO", "P two", " three")] == [
        "one ",
        "",
        "",
        "",
    ]
    assert finder.hit


def test_false_beginning_comes_out_when_it_fails() -> None:
    finder = StopFinder(("STOP", "###"))
    assert [finder.push(part) for part in ("a ST", "ART #", "x")] == ["a ", "START ", "#x"]
    assert not finder.hit


def test_held_text_comes_out_at_the_end() -> None:
    finder = StopFinder(("STOP",))
    assert finder.push("a STO") == "a "
    assert finder.flush() == "STO"
    assert not finder.hit


def test_stop_that_began_first_wins_over_one_inside_it() -> None:
    finder = StopFinder(("abcd", "c"))
    assert finder.push("xabc") == "x"
    assert not finder.hit
    assert finder.push("d") == ""
    assert finder.hit
    other = StopFinder(("abcd", "c"))
    assert other.push("xabc") + other.push("e") == "xab"
    assert other.hit


def test_empty_stop_strings_are_ignored() -> None:
    finder = StopFinder(("",))
    assert finder.push("abc") + finder.flush() == "abc"
    assert not finder.hit


IDS = st.lists(st.integers(0, 2), max_size=30)
SEQUENCES = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=5).map(tuple), max_size=4)


@settings(derandomize=True, max_examples=500, deadline=None)
@given(ids=IDS, sequences=SEQUENCES)
def test_sequences_are_found_where_they_first_end(
    ids: list[int], sequences: list[tuple[int, ...]]
) -> None:
    finder = SequenceFinder(sequences)
    for num in range(1, len(ids) + 1):
        finder.push(ids[num - 1])
        so_far = ids[:num]
        ended = [len(s) for s in sequences if tuple(so_far[-len(s) :]) == s]
        assert finder.hit == max(ended, default=0)
        if ended:
            return
        begun = [k for s in sequences for k in range(len(s)) if k and tuple(so_far[-k:]) == s[:k]]
        assert finder.held == max(begun, default=0)


def test_no_sequences() -> None:
    finder = SequenceFinder([()])
    finder.push(1)
    assert (finder.hit, finder.held) == (0, 0)


SPECIAL = ("<x>", "<y>")
SOME = st.lists(st.tuples(st.text("ab<x", max_size=4), st.sampled_from(("", *SPECIAL))), max_size=7)
NAMED = st.lists(
    st.sampled_from(("<x>", "<y>", "<x>a", "b<y>", "<x><y>", "ab", "x", "<", "aa", "b<x>a")),
    min_size=1,
    max_size=4,
    unique=True,
).map(tuple)


@settings(derandomize=True, max_examples=400, deadline=None)
@given(parts=SOME, stops=NAMED)
def test_texts_of_hidden_tokens_stop(parts: list[tuple[str, str]], stops: tuple[str, ...]) -> None:
    finder = StopMatcher(stops, SPECIAL)
    got = "".join(finder.push(*part) for part in parts) + finder.flush()
    # each character of the whole text, and whether it is shown
    marked = [(c, i == 0) for part in parts for i, text in enumerate(part) for c in text]
    whole = "".join(c for c, _ in marked)
    visible = "".join(c for c, shown in marked if shown)
    ends = [len(visible)]
    for stop in stops:
        named = any(token in stop for token in SPECIAL)
        if (at := (whole if named else visible).find(stop)) >= 0:
            ends.append(sum(shown for _, shown in marked[:at]) if named else at)
    assert got == visible[: min(ends)]
    assert finder.hit is (len(ends) > 1)
    assert (finder.found in stops) is finder.hit
