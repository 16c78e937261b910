"""Token healing: the end of a prompt is said again, in whatever tokens, and counts for nothing."""

from __future__ import annotations

from array import array

from hypothesis import given
from hypothesis import strategies as st

from asyncllm.constrain.factory import ConstraintFactory
from asyncllm.constrain.healing import Healing
from asyncllm.constrain.vocabulary import Vocabulary, passes
from asyncllm.core.request import SamplingParams
from asyncllm.core.scheduling import SchedulerCore
from asyncllm.messages import SlotsGranted, Submit

PIECES = [b"<s>", b"a", b"b", b"ab", b"abc", b"bc", b"c", b"<", b"", b"ba"]
VOCAB = Vocabulary(PIECES, 12, special={0})


def passing(mask: bytes) -> set[bytes]:
    return {VOCAB.piece(i) for i in range(VOCAB.size) if passes(mask, i)}


def test_only_what_agrees_with_the_text_may_come_until_it_is_said() -> None:
    healing = Healing(VOCAB, [b"a", b"b"])
    assert passing(healing.mask()) == {b"a", b"ab", b"abc"}
    assert not healing.mask_is_stable_for(1)
    healing.accept(1)
    assert passing(healing.mask()) == {b"b", b"bc", b"ba"}
    healing.accept(5)
    assert healing.mask() == b""
    assert healing.mask_is_stable_for(5)


def test_tokens_get_no_shorter_unless_there_is_no_other_way() -> None:
    assert passing(Healing(VOCAB, [b"ab"]).mask()) == {b"ab", b"abc"}
    assert passing(Healing(VOCAB, [b"ab", b"cc"]).mask()) == {b"ab", b"abc"}
    assert passing(Healing(VOCAB, [b"bca"]).mask()) == {b"b", b"bc"}


def test_special_tokens_are_no_text() -> None:
    assert passing(Healing(VOCAB, [b"<"]).mask()) == {b"<"}


@given(
    st.lists(st.binary(max_size=2), max_size=40), st.binary(min_size=1, max_size=3), st.integers(1, 3)
)  # fmt: skip
def test_the_mask_is_that_of_a_plain_search(pieces: list[bytes], text: bytes, least: int) -> None:
    vocab = Vocabulary(pieces, 37, special={1, 50})
    mask = vocab.agreeing_with(text, least)
    assert len(mask) == 8
    longer = {i for i in range(37) if i != 1 and vocab.piece(i).startswith(text)}
    shorter = {
        i for i in range(37) if i != 1 and vocab.piece(i) and text.startswith(vocab.piece(i))
    }
    want = longer | {i for i in shorter if len(vocab.piece(i)) >= least} or shorter
    assert {i for i in range(64) if passes(mask, i)} == want


def counted(tokens: list[int], *pieces: bytes) -> list[int]:
    healing = Healing(VOCAB, pieces)
    out = []
    for token in tokens:
        healing.accept(token)
        out.append(1 - healing.uncounted())
    return out


def test_tokens_that_say_nothing_new_do_not_count_as_far_as_tokens_were_dropped() -> None:
    assert counted([1, 2, 6], b"a", b"b") == [0, 0, 1]
    assert counted([3, 6], b"a", b"b") == [0, 1]
    assert counted([4, 6], b"a", b"b") == [1, 1]
    assert counted([1, 5], b"a", b"b") == [0, 1]
    assert counted([1, 2, 6], b"ab") == [0, 1, 1]


def test_a_request_gets_as_many_tokens_more() -> None:
    core = SchedulerCore(
        num_lanes=1, num_slots=64, batch_max_tokens=64, chunked_prefill_size=16, eos_ids=()
    )  # fmt: skip
    params = SamplingParams(max_new_tokens=2)
    constraint = ConstraintFactory(12, (), vocab=VOCAB).of(params, "", (b"a", b"b"))
    core.add(Submit(1, array("i", [9] * 4), params), constraint)
    out: list[int] = []
    for token in (1, 2, 6, 6, 6):
        if (proposal := core.propose()) is None:
            break
        counts = proposal.counts
        step = core.plan(SlotsGranted(array("i", [0]), counts, array("i", range(sum(counts))), 50))
        assert step is not None
        assert bool(step.plan.masks) == (len(out) < 2)
        out += core.commit(step, array("i", [token])).tokens
    assert out == [1, 2, 6, 6]
    assert core.ended[0].num_tokens == 4
