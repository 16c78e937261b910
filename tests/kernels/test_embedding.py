"""Start of a step, embedding and first norm, against their references."""

import pytest
import torch
from torch import Tensor

from asyncllm.kernels.embedding import embed_rmsnorm, embed_rmsnorm_ref, stage, stage_ref
from tests.kernels.harness import DEVICE, DTYPES, assert_close, ints, no_sync, randn, replayed

EPS = 1e-5


@pytest.mark.parametrize("shape", [(1, 64), (7, 576), (3, 4099)], ids=str)
@pytest.mark.parametrize("wide", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.usefixtures("poisoned_empty")
def test_embed_rmsnorm(shape: tuple[int, int], wide: torch.dtype, dtype: torch.dtype) -> None:
    num, hidden = shape
    table, weight = randn(50, hidden, dtype=dtype), randn(hidden, dtype=dtype, seed=1)
    tokens = (torch.arange(num, device=DEVICE) * 17 % 50).to(wide)
    with no_sync():
        normed, residual = embed_rmsnorm(tokens, table, weight, EPS)
    want, rows = embed_rmsnorm_ref(tokens, table, weight, EPS)
    assert_close("normed", want, normed)
    assert torch.equal(rows, residual)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_embeddings_are_scaled_and_rounded_before_the_norm(dtype: torch.dtype) -> None:
    table, weight = randn(50, 576, dtype=dtype), randn(576, dtype=torch.float32, seed=1)
    tokens = torch.arange(7, device=DEVICE)
    normed, residual = embed_rmsnorm(tokens, table, weight, EPS, 22.625)
    want, rows = embed_rmsnorm_ref(tokens, table, weight, EPS, 22.625)
    assert_close("normed", want, normed)
    assert torch.equal(rows, residual)
    assert torch.equal(rows, table[:7] * 22.625)


def case(num: int) -> dict[str, Tensor]:
    """Two thirds given, one third last tokens; a few are padding."""
    generator = torch.Generator().manual_seed(num)
    tokens = torch.randint(1000, (num,), generator=generator)
    tokens[::3] = -1
    lanes = torch.randint(9, (num,), generator=generator)
    lanes[5::7] = -1
    # distinct places, so that the order of writes does not matter
    return {
        "tokens": tokens.int().to(DEVICE),
        "token_lanes": lanes.int().to(DEVICE),
        "positions": torch.randperm(num, generator=generator).int().to(DEVICE),
        "slots": torch.randperm(5 * num, generator=generator)[:num].int().to(DEVICE),
        "last_token": torch.randint(1000, (9,), generator=generator).to(DEVICE),
    }


def tables(num: int) -> list[Tensor]:
    return [torch.full((9, num + 3), -7, dtype=torch.int32, device=DEVICE) for _ in range(2)]


@pytest.mark.parametrize("with_history", [True, False])
@pytest.mark.parametrize("num", [1, 31, 700])
@pytest.mark.usefixtures("poisoned_empty")
def test_stage(num: int, with_history: bool) -> None:
    columns, mine, theirs = case(num), tables(num), tables(num)
    want = stage_ref(**columns, table=theirs[0], history=theirs[1] if with_history else None)
    with no_sync():
        got = stage(**columns, table=mine[0], history=mine[1] if with_history else None)
    assert torch.equal(got, want)
    assert torch.equal(mine[0], theirs[0])
    assert torch.equal(mine[1], theirs[1])


def test_stage_by_hand() -> None:
    table, history = tables(4)
    got = stage(
        ints([11, -1, -1]), ints([2, 0, -1]), ints([0, 5, 3]), ints([40, 41, 42]),
        torch.arange(9, device=DEVICE) + 100, table, history,
    )  # fmt: skip
    assert got.tolist() == [11, 100, 0]
    assert (table[2, 0], table[0, 5], history[2, 0], history[0, 5]) == (40, 41, 11, 100)
    assert (table != -7).sum() == (history != -7).sum() == 2


@pytest.mark.parametrize("num", [1, 700])
@pytest.mark.usefixtures("poisoned_empty")
def test_stage_enters_slots_of_both_spaces(num: int) -> None:
    columns, mine, theirs = case(num), tables(num), tables(num)
    more = columns["slots"] * 3 + 1
    want = stage_ref(**columns, table=theirs[0], sliding_table=theirs[1], sliding_slots=more)
    with no_sync():
        got = stage(**columns, table=mine[0], sliding_table=mine[1], sliding_slots=more)
    assert torch.equal(got, want)
    assert torch.equal(mine[0], theirs[0])
    assert torch.equal(mine[1], theirs[1])
    assert num == 1 or not torch.equal(mine[0], mine[1])


def test_nothing_to_do() -> None:
    columns, (table, _) = case(3), tables(3)
    none = {name: c[:0] for name, c in columns.items()} | {"last_token": columns["last_token"]}
    assert stage(**none, table=table).shape == (0,)
    weight = randn(64, dtype=torch.float32)
    normed, residual = embed_rmsnorm(ints([]), weight[None], weight, EPS)
    assert normed.shape == residual.shape == (0, 64)


def test_refuses_what_does_not_fit() -> None:
    columns, (table, history) = case(3), tables(3)
    with pytest.raises(ValueError, match="slots"):
        stage(**{**columns, "slots": columns["slots"].long()}, table=table)
    with pytest.raises(ValueError, match="table"):
        stage(**columns, table=table.long())
    with pytest.raises(ValueError, match="history"):
        stage(**columns, table=table, history=history[:, :2])
    with pytest.raises(ValueError, match="sliding_slots"):
        stage(**columns, table=table, sliding_table=history, sliding_slots=columns["slots"][:2])
    with pytest.raises(ValueError, match="sliding_table"):
        stage(**columns, table=table, sliding_table=history[:2], sliding_slots=columns["slots"])
    with pytest.raises(ValueError, match="last_token"):
        stage(**{**columns, "last_token": columns["last_token"].int()}, table=table)
    weight = randn(64, dtype=torch.float32)
    with pytest.raises(ValueError, match="tokens"):
        embed_rmsnorm(weight, weight[None], weight, EPS)
    with pytest.raises(ValueError, match="weight"):
        embed_rmsnorm(ints([0]), weight[None], weight[:3], EPS)
    with pytest.raises(ValueError, match="residual"):
        embed_rmsnorm(ints([0]), weight[None], weight, EPS, residual=weight)


@pytest.mark.gpu
def test_in_a_cuda_graph() -> None:
    columns, mine, theirs = case(300), tables(300), tables(300)
    embedding, weight = (
        randn(1000, 4096, dtype=torch.bfloat16),
        randn(4096, dtype=torch.bfloat16, seed=1),
    )
    tokens = torch.empty(300, dtype=torch.int64, device=DEVICE)
    normed, residual = (torch.empty(300, 4096, dtype=torch.bfloat16, device=DEVICE) for _ in "ab")

    def call() -> None:
        stage(**columns, table=mine[0], history=mine[1], out=tokens)
        embed_rmsnorm(tokens, embedding, weight, EPS, out=normed, residual=residual)

    def before() -> None:
        columns["last_token"].add_(-1).clamp_(min=0)
        for table in mine:
            table.fill_(-7)

    replayed(call, before=before)
    want = stage_ref(**columns, table=theirs[0], history=theirs[1])
    assert torch.equal(tokens, want)
    assert torch.equal(mine[0], theirs[0])
    assert torch.equal(mine[1], theirs[1])
    rows, raw = embed_rmsnorm_ref(want, embedding, weight, EPS)
    assert_close("normed", rows, normed)
    assert torch.equal(raw, residual)
