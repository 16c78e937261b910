"""Products with quantised weights in plain torch, against the weights written out."""

import pytest
import torch

from asyncllm.engine.quant_torch import dequantize, quant_linear, quantize_rows
from asyncllm.models.quantization import QuantWeight


def weight(kind: str, rows: int, columns: int, group: int = 0) -> tuple[QuantWeight, torch.Tensor]:
    """A random one, and the matrix that its docstring says it is."""
    torch.manual_seed(rows + columns)
    group = group or columns
    zeros = None
    if kind == "int4_group":
        nibbles = torch.randint(0, 16, (rows, columns), dtype=torch.uint8)
        scales = torch.rand(columns // group, rows) / 100
        zeros = torch.randint(0, 17, scales.shape).float()
        data = nibbles[:, ::2] | nibbles[:, 1::2] << 4
        of = torch.arange(columns) // group
        matrix = (nibbles - zeros[of].t()) * scales[of].t()
    elif kind == "fp8_block":
        group = 128
        data = torch.randn(rows, columns).to(torch.float8_e4m3fn)
        scales = torch.rand(-(-rows // 128), -(-columns // 128))
        matrix = torch.empty(rows, columns)
        for row in range(rows):
            for column in range(columns):
                block = scales[row // 128, column // 128]
                matrix[row, column] = data[row, column].float() * block
    else:
        data, scales = quantize_rows(
            torch.randn(rows, columns), torch.int8 if kind[0] == "i" else torch.float8_e4m3fn
        )
        scales = scales[:, 0]
        matrix = data.float() * scales[:, None]
    return QuantWeight(kind, data, scales, zeros, group, rows, columns), matrix


@pytest.mark.parametrize(
    ("kind", "rows", "columns", "group"),
    [
        ("fp8_channel", 48, 72, 0),
        ("int8_channel", 48, 72, 0),
        ("fp8_block", 136, 200, 0),
        ("fp8_block", 64, 64, 0),
        ("int4_group", 48, 64, 32),
        ("int4_group", 48, 64, 64),
    ],
)
def test_product(kind, rows, columns, group, monkeypatch):
    """In parts of a few rows; activations are rounded where the kind says so."""
    monkeypatch.setattr("asyncllm.engine.quant_torch.WIDENED", 10 * columns)
    held, matrix = weight(kind, rows, columns, group)
    torch.testing.assert_close(dequantize(held), matrix)
    torch.testing.assert_close(dequantize(held, slice(5, 17)), matrix[5:17])
    x, bias = torch.randn(3, columns), torch.randn(rows)
    x[1] = 0
    x[2, 0] = 1000  # a group of its own must not suffer from it
    exact = x @ matrix.t() + bias
    made = quant_linear(x, held, bias)
    assert made.dtype == x.dtype
    torch.testing.assert_close(made[1], bias)
    if kind == "int4_group":
        torch.testing.assert_close(made, exact)
    else:
        error, scale = (made - exact)[0].norm(), (exact - bias)[0].norm()
        assert 1e-4 * scale < error < (0.012 if kind[0] == "i" else 0.04) * scale
    given = torch.empty(3, rows)
    assert quant_linear(x, held, bias, given) is given
    torch.testing.assert_close(given, made, rtol=0, atol=0)


def test_groups_of_activations():
    """One large value costs its own group of 128 columns, not the rest of the row."""
    x = torch.randn(1, 256)
    x[0, 0] = 1e5
    eye = torch.eye(256).to(torch.float8_e4m3fn)
    blocks = QuantWeight("fp8_block", eye, torch.ones(2, 2), None, 128, 256, 256)
    channels = QuantWeight("fp8_channel", eye, torch.ones(256), None, 256, 256, 256)

    def far(held):
        return (quant_linear(x, held) - x)[0, 128:].abs().max()

    assert far(blocks) < 0.2 < far(channels)


def test_rounding_to_int8_is_half_to_even():
    values, scales = quantize_rows(torch.tensor([[127.0, 0.5, 1.5, -2.5]]), torch.int8)
    assert values.tolist() == [[127, 0, 2, -2]]
    assert scales.tolist() == [[1.0]]
