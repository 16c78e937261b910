"""Numbers in 8 bits and back: how far off they may be, at any size."""

import pytest
import torch

from asyncllm.kernels.attention.quantize import dequantize_ref, quantize_ref


@pytest.mark.parametrize("kind", [torch.int8, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("group", [None, 8])
@pytest.mark.parametrize("size", [1e-38, 1e-20, 1.0, 3e4, 1e30, 3e38])
def test_nothing_is_too_large_or_lost(kind: torch.dtype, group: int | None, size: float) -> None:
    x = torch.randn(50, 3, 16).clamp(-1, 1) * size
    x[0] = 0.0
    x[1, :, 5:] = 0.0
    values, scales = quantize_ref(x, kind, group)
    assert (values.dtype, scales.dtype) == (kind, torch.bfloat16)
    assert scales.shape == (50, 3, 2 if group else 1)
    back = dequantize_ref(values, scales, torch.float32)
    groups = x.unflatten(-1, (scales.shape[-1], -1))
    most = groups.abs().amax(-1, keepdim=True).expand_as(groups).flatten(-2)
    # half a step of a whole number, of 3 bits of mantissa, or of the least exponent
    step = most / 127 if kind == torch.int8 else (x.abs() / 8).maximum(most / 448 / 2**9)
    assert bool(((back - x).abs() <= 0.5 * 1.01 * step + 1e-29).all())  # scales are rounded by 1 %
    assert not back[0].any()


def test_the_largest_number_is_kept() -> None:
    x = torch.tensor([[3.0, -1.0, 0.5, 0.0], [-5e-3, 5e-3, 1e-3, 0.0]])
    for kind, most in ((torch.int8, 127.0), (torch.float8_e4m3fn, 448.0)):
        values, scales = quantize_ref(x, kind, None)
        assert 0.98 * most <= float(values.float().abs().max()) <= most
        assert bool((scales.float()[:, 0] * most >= x.abs().amax(1)).all())


def test_every_float_of_8_bits_is_read_as_torch_reads_it() -> None:
    codes = torch.arange(256).to(torch.uint8).view(torch.float8_e4m3fn)
    codes = codes[codes.float().isfinite()]
    assert len(codes) == 254
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        got = dequantize_ref(codes[:, None], torch.ones(254, 1, dtype=torch.bfloat16), dtype)
        assert torch.equal(got[:, 0], codes.to(dtype))
