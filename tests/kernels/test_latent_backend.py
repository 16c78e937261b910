"""The CUDA backend of latents against that of the CPU: steps of every kind of row."""

from itertools import accumulate

import pytest
import torch

from asyncllm.core.windows import PerSpace
from asyncllm.engine import latent_cuda
from asyncllm.engine.latent_cpu import TorchLatentAttention, TorchLatents
from asyncllm.engine.latent_cuda import TritonLatentAttention, TritonLatents
from asyncllm.kernels import autotune
from asyncllm.kernels.autotune import DeviceFacts, num_sms
from asyncllm.kernels.latent.shared import piece_numbers
from asyncllm.models.attention import Batch, HostRows, Latent
from asyncllm.models.kv_format import FORMATS
from asyncllm.models.rope import Rope
from asyncllm.models.spec import AttentionSpec
from tests.kernels.harness import DEVICE, assert_close, ints, no_sync, randn

WHERE, CPU = torch.device(DEVICE), torch.device("cpu")
SLOTS, LANES, MAX_LEN = 400, 8, 200
# (cached tokens, new tokens) of rows: those of one token first
STEPS = {
    "decode": [(7, 1), (0, 1), (65, 1)],
    "nothing": [],
    "both": [(50, 1), (0, 5), (40, 12), (2, 9)],
}


def make_spec(heads: int = 2) -> AttentionSpec:
    return AttentionSpec(
        kind="mla", num_q_heads=heads, num_kv_heads=heads, head_dim=24, v_dim=16, scale=0.3,
        rope=Rope(theta=100.0, dim=8, interleaved=True), kv_rank=32,
    )  # fmt: skip


def make_batch(rows: list[tuple[int, int]], pad: int) -> tuple[Batch, Batch]:
    """The same step for the CPU, and for a graph: padded by decode rows, chunks and tokens."""
    order = torch.randperm(SLOTS, generator=torch.Generator().manual_seed(1)).tolist()
    table = torch.full((LANES + 1, MAX_LEN), 0x3F3F3F3F, dtype=torch.int32)
    positions: list[int] = []
    slots: list[int] = []
    for lane, (start, count) in enumerate(rows):
        mine = [order.pop() for _ in range(start + count)]
        table[lane, : start + count] = torch.tensor(mine, dtype=torch.int32)
        positions += range(start, start + count)
        slots += mine[start:]
    decode = [row for row in rows if row[1] == 1]
    chunks = rows[len(decode) :]
    cu = [*accumulate((count for _, count in chunks), initial=len(decode))]
    starts, counts = [start for start, _ in rows], [count for _, count in rows]
    host = HostRows([*range(len(rows))], starts, counts)
    lanes = [*range(len(rows))]

    def batch(pad: int, host: HostRows | None, to: torch.device) -> Batch:
        end, wide = [0] * pad, 2 * pad  # more tokens than rows have, as beside another group
        columns = {
            "positions": positions + end + end, "slots": slots + [SLOTS] * wide,
            "decode_lanes": lanes[: len(decode)] + [LANES] * pad,
            "decode_lens": [start + 1 for start, _ in decode] + end,
            "prefill_cu": cu + cu[-1:] * pad if chunks else cu[:1],
            "prefill_lanes": lanes[len(decode) :] + [LANES] * pad if chunks else [],
            "prefill_starts": [start for start, _ in chunks] + end if chunks else [],
        }  # fmt: skip
        tensors = {name: ints(column).to(to) for name, column in columns.items()}
        tokens = torch.zeros(len(slots) + wide, dtype=torch.int64, device=to)
        return Batch(tokens=tokens, table=table.to(to), max_count=99, host=host, **tensors)

    return batch(0, host, CPU), batch(pad, None, WHERE)


@pytest.mark.parametrize(
    ("step", "least", "fmt"),
    [("decode", 1, None), ("nothing", 1, None), ("both", 9, "triton_fp8kv")],
)
@pytest.mark.usefixtures("poisoned_empty")
def test_both_backends_say_the_same(
    step: str, least: int, fmt: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of ``least`` new tokens are decompressed; heads come in two groups."""
    monkeypatch.setattr(latent_cuda, "GROUP", 1)
    spec, pad = make_spec(), 2
    ours, padded = make_batch(STEPS[step], pad)
    rows, total = len(ours.tokens), len(padded.tokens)
    q = randn(total, 2 * 24, dtype=torch.float32)
    latent = Latent(
        randn(total, 40, dtype=torch.float32, seed=1), randn(32, dtype=torch.float32, seed=2),
        1e-6, randn(2, 32, 32, dtype=torch.float32, seed=3),
    )  # fmt: skip
    form = FORMATS[fmt] if fmt else None
    layout = TorchLatents([spec], torch.float32, form)
    plain = TorchLatentAttention([spec], layout, MAX_LEN, CPU, least=1 << 20)
    [want_kv] = layout.allocate(PerSpace(SLOTS + 1, 0), CPU)
    old = randn(SLOTS + 1, 40, dtype=torch.float32, seed=4).cpu()
    layout.write(want_kv, torch.arange(SLOTS + 1), old)
    kv = tuple(x.clone().to(WHERE) for x in want_kv)
    want = plain.plan(spec, ours).run(q[:rows].cpu(), want_kv, _to(latent, rows))
    backend = TritonLatentAttention(
        [spec], TritonLatents([spec], torch.float32, form), MAX_LEN, WHERE, least=least
    )
    plan = backend.plan(spec, padded)
    with no_sync():
        got = plan.run(q.clone(), kv, latent)
        again = plan.run(q.clone(), kv, latent)  # of another layer
    assert_close("out", want.to(WHERE), got[:rows])
    found = tuple(x.cpu() for x in kv)
    for slots in ours.slots.long(), torch.arange(SLOTS):  # what is new, and all
        assert_close("kv", layout.read(want_kv, slots), layout.read(found, slots))
    assert torch.equal(got, again)
    assert not got[rows:].any()  # what follows attention must find numbers in padding


def _to(latent: Latent, rows: int) -> Latent:
    return Latent(latent.raw[:rows].cpu(), latent.norm.cpu(), latent.eps, latent.up.cpu())


def test_partial_results_of_shared_prefixes_lie_where_keys_are_decompressed_later() -> None:
    backend = TritonLatentAttention(
        [make_spec()], TritonLatents([make_spec()], torch.float32), MAX_LEN, CPU
    )
    space = backend._spaces[make_spec()]
    assert space.made.data_ptr() == space.pieces.data_ptr()
    assert backend.nbytes == space.nbytes + sum(table.nbytes for table in backend.angles.values())
    costs = backend.sharing()
    assert costs is not None
    ranges = num_sms(CPU)
    assert (costs.blocks + ranges) * piece_numbers(2, 32) * 4 <= space.pieces.nbytes
    assert costs.num_blocks(2 * 1024) <= costs.blocks  # as many as the largest graph may want
    alone = make_spec(64)
    assert (
        TritonLatentAttention(
            [alone], TritonLatents([alone], torch.float32), MAX_LEN, CPU
        ).sharing()
        is None
    )


@pytest.mark.parametrize("entry", [None, {"tile": 64}])
def test_latents_are_shared_only_on_gpus_where_that_was_tuned(
    monkeypatch: pytest.MonkeyPatch, entry: dict[str, int] | None
) -> None:
    asked = []

    def tuned(where: torch.device, kernel: str, key: str) -> dict[str, int] | None:
        asked.append((where.type, kernel, key))
        return entry

    monkeypatch.setattr(latent_cuda, "tuned", tuned)
    monkeypatch.setattr(autotune, "_assumed", [DeviceFacts("a GPU", 132, 90)])
    meta = torch.device("meta")
    backend = TritonLatentAttention(
        [make_spec()], TritonLatents([make_spec()], torch.float32), MAX_LEN, meta
    )
    assert (backend.sharing() is not None) == (entry is not None)
    assert asked == [("meta", "latent", "64 shared")]


def test_space_is_held_for_the_longest_sequence() -> None:
    def space(heads: int, max_len: int) -> tuple[int, int]:
        spec = AttentionSpec(
            kind="mla", num_q_heads=heads, num_kv_heads=heads, head_dim=192, v_dim=128, scale=1.0,
            rope=Rope(theta=1e4, dim=64), kv_rank=512,
        )  # fmt: skip
        found = latent_cuda._space(spec, max_len, torch.bfloat16, torch.device("meta"))
        assert found.made.nbytes <= 1 << 30
        assert found.nbytes == found.pieces.nbytes + len(found.made) * 128
        least = latent_cuda.LEAST_PIECES * piece_numbers(heads, 512) * 4
        assert found.pieces.nbytes == max(found.made.nbytes, least)
        return found.group, len(found.made)

    assert space(16, 4096) == (16, 8192)
    assert space(16, 32768) == (16, 32768)
    assert space(128, 131072) == (16, 131072)
    assert space(20, 163840) == (10, 163840)
    assert space(7, 1 << 22) == (1, 1 << 21)  # longer rows are absorbed
