"""Restrictions that need no grammar: which tokens they let pass, and when."""

from __future__ import annotations

import pytest

from asyncllm.constrain.factory import ConstraintFactory
from asyncllm.constrain.vocabulary import bits
from asyncllm.core.request import SamplingParams
from asyncllm.errors import RequestError


def members(mask: bytes) -> set[int]:
    return {8 * i + bit for i, octet in enumerate(mask) for bit in range(8) if octet >> bit & 1}


@pytest.mark.parametrize("vocab_size", [1, 31, 32, 33, 1009])
def test_bits_have_whole_words_and_no_token_beyond_the_vocabulary(vocab_size: int) -> None:
    wanted = {0, vocab_size // 2, vocab_size - 1, vocab_size}
    mask = bits(wanted, vocab_size)
    assert len(mask) == 4 * -(-vocab_size // 32)
    assert members(mask) == wanted - {vocab_size}


def test_only_the_listed_tokens_and_the_ends() -> None:
    constraints = ConstraintFactory(64, (2, 60))
    allowed = constraints.of(SamplingParams(allowed_token_ids=(5, 7)))
    assert allowed is not None
    for token in (5, 7, 5):
        assert members(allowed.mask()) == {2, 5, 7, 60}
        assert allowed.mask_is_stable_for(3)
        assert not allowed.accept(token)
    endless = constraints.of(SamplingParams(allowed_token_ids=(5,), ignore_eos=True))
    assert endless is not None
    assert members(endless.mask()) == {5}


def test_nothing_asked_nothing_restricted() -> None:
    assert ConstraintFactory(64, (2,)).of(SamplingParams()) is None


def test_without_grammars_a_grammar_is_refused() -> None:
    with pytest.raises(RequestError, match="--output_constraint_mode"):
        ConstraintFactory(64, (2,)).of(SamplingParams(grammar=("json", "")))
