"""Penalties and biases against dense references."""

import pytest
import torch
from torch import Tensor

from asyncllm.kernels.penalties import (
    add_bias,
    add_bias_ref,
    penalize,
    penalize_ref,
    penalty_counts,
)
from tests.kernels.harness import DEVICE, DTYPES, assert_close, ints, no_sync, randn, replayed

VOCAB = 131


def case(num: int, max_len: int, seed: int = 0) -> list[Tensor]:
    """history, then the columns of ``penalize``: one row in three, lanes of every length."""
    generator = torch.Generator().manual_seed(seed)
    lens = torch.randint(1, max_len + 1, (num,), generator=generator)
    history = torch.randint(VOCAB, (num + 2, max_len), generator=generator).square() % VOCAB
    lanes = torch.randperm(num + 2, generator=generator)[:num]
    for lane, length in zip(lanes.tolist(), lens.tolist(), strict=True):
        history[lane, length:] = 0x3F3F3F3F  # not yet known: whatever was there before
    prompt_lens = (lens * torch.rand(num, generator=generator)).int()
    numbers = [
        torch.rand(num, generator=generator) * s + o for s, o in ((2, -0.5), (2, -0.5), (1, 0.6))
    ]
    columns = [lanes.int(), lens.int(), prompt_lens, *numbers, torch.arange(num).int() % 2]
    rows = torch.randperm(3 * num, generator=generator)[:num].int()
    return [c.to(DEVICE) for c in (history.int(), rows, *columns)]


@pytest.mark.parametrize("max_len", [7, 600, 9000])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_penalize(max_len: int, dtype: torch.dtype) -> None:
    history, *columns = case(5, max_len)
    logits = randn(15, VOCAB, dtype=dtype)
    want = penalize_ref(logits.clone(), history, *columns)
    counts = penalty_counts(8, VOCAB, logits.device)
    with no_sync():
        assert penalize(logits, history, counts, *columns) is logits
    assert_close("logits", want, logits)
    assert not counts.any()


def test_more_rows_than_counters() -> None:
    history, *columns = case(7, 50)
    logits = randn(21, VOCAB, dtype=torch.float32)
    want = penalize_ref(logits.clone(), history, *columns)
    penalize(logits, history, penalty_counts(3, VOCAB, logits.device), *columns)
    assert_close("logits", want, logits)


def test_other_rows_padding_and_unseen_tokens_stay() -> None:
    history, *columns = case(4, 40)
    columns[2][1] = 0  # padding
    columns[0][1] = columns[0][2]  # its row is another's
    wide = randn(12, 200, dtype=torch.float32)
    logits = wide[:, :VOCAB]
    before, want = wide.clone(), wide.clone()
    penalize_ref(want[:, :VOCAB], history, *(c[[0, 2, 3]] for c in columns))
    penalize(logits, history, penalty_counts(4, VOCAB, wide.device), *columns)
    assert_close("logits", want, wide)
    others = [row for row in range(12) if row not in columns[0].tolist()]
    assert torch.equal(wide[others], before[others])
    lane, length = int(columns[1][0]), int(columns[2][0])
    unseen = sorted(set(range(VOCAB)) - set(history[lane, :length].tolist()))
    row = int(columns[0][0])
    assert unseen
    assert torch.equal(wide[row, unseen], before[row, unseen])


def test_by_hand() -> None:
    history = ints([[3, 3, 4, 5, 5, 5, 9]])
    logits = torch.tensor([[1.0, 1, 1, 2, -2, 4, 1, 1, 1, 1]], device=DEVICE)
    numbers = [torch.tensor([x], device=DEVICE) for x in (0.5, 0.25, 2.0)]
    penalize(
        logits, history, penalty_counts(1, 10, logits.device),
        ints([0]), ints([0]), ints([6]), ints([3]), *numbers, torch.tensor([True], device=DEVICE),
    )  # fmt: skip
    # 3 and 4 are prompt; 5 was made three times: 4 / 2 - 3 * 0.25 - 0.5
    assert logits[0].tolist() == [1, 1, 1, 1, -4, 0.75, 1, 1, 1, 1]


def test_add_bias() -> None:
    logits = randn(6, VOCAB, dtype=torch.float32)
    rows, tokens = ints([0, 0, 5, 5, -1, 3, 2]), ints([1, 130, 7, 7, 4, 131, -1])
    values = torch.tensor([0.5, float("-inf"), 1.0, float("-inf"), 9.0, 9.0, 9.0], device=DEVICE)
    want = add_bias_ref(logits.clone(), rows, tokens, values)
    with no_sync():
        assert add_bias(logits, rows, tokens, values) is logits
    assert torch.equal(want, logits)
    assert logits[0, 130] == logits[5, 7] == float("-inf")
    assert torch.isfinite(logits).sum() == logits.numel() - 2


def test_add_bias_of_many_and_of_none() -> None:
    logits = randn(4, VOCAB, dtype=torch.float32)
    rows = ints([i % 4 for i in range(300)])
    tokens = ints([i // 4 for i in range(300)])
    values = randn(300, dtype=torch.float32, seed=1)
    want = add_bias_ref(logits.clone(), rows, tokens, values)
    assert torch.equal(add_bias(logits, rows, tokens, values), want)
    assert torch.equal(add_bias(logits, rows[:0], tokens[:0], values[:0]), want)


def test_refuses_what_does_not_fit() -> None:
    history, *columns = case(2, 10)
    logits, device = randn(6, VOCAB, dtype=torch.float32), torch.device(DEVICE)
    counts = penalty_counts(2, VOCAB, device)
    with pytest.raises(ValueError, match="columns"):
        penalize(logits, history, counts, columns[0][:1], *columns[1:])
    with pytest.raises(ValueError, match="counts"):
        penalize(logits, history, penalty_counts(2, VOCAB + 1, device), *columns)
    with pytest.raises(ValueError, match="history"):
        penalize(logits, history.long(), counts, *columns)
    with pytest.raises(ValueError, match="logits"):
        penalize(logits.T, history, counts, *columns)
    with pytest.raises(ValueError, match="float32"):
        add_bias(logits.half(), columns[0], columns[1], columns[4])
    with pytest.raises(ValueError, match="entries"):
        add_bias(logits, columns[0][:1], columns[1], columns[4])


@pytest.mark.gpu
def test_in_a_cuda_graph() -> None:
    history, *columns = case(6, 5000)
    _, *fresh = case(6, 5000, seed=9)
    fresh[0], fresh[1] = columns[0], columns[1]
    fresh[2] = torch.minimum(fresh[2], columns[2])
    fresh[3] = torch.minimum(fresh[3], fresh[2])
    base = randn(18, VOCAB, dtype=torch.float32)
    logits, counts = base.clone(), penalty_counts(6, VOCAB, base.device)
    want = penalize_ref(base.clone(), history, *fresh)

    def before() -> None:
        logits.copy_(base)
        for old, new in zip(columns, fresh, strict=True):
            old.copy_(new)

    replayed(lambda: penalize(logits, history, counts, *columns), before=before)
    assert_close("logits", want, logits)
