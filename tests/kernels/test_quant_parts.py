"""Into how many parts the inputs of a product are divided, and where they wait."""

from types import SimpleNamespace

import pytest
import torch

from asyncllm.kernels.quant import parts

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("tiles", "steps", "per_sm", "want"),
    [
        (
            96,
            16,
            3,
            4,
        ),  # 384 programs, 3 to a multiprocessor with 4 steps each: 12, of 11.6 at best
        (96, 16, 2, 2),  # 2 with 8 steps are no better than one with 16, but ask for more at once
        (64, 16, 2, 4),
        (64, 16, 3, 4),  # not 6, which makes 3 of 3 steps: 9
        (448, 16, 1, 1),
        (448, 16, 7, 2),
        (64, 3, 6, 3),
        (64, 16, 0, 1),
        (1, 4096, 8, 16),
    ],
)
def test_the_multiprocessor_with_the_most_steps_has_the_fewest(
    tiles: int, steps: int, per_sm: int, want: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts, "num_sms", lambda device: 132)
    assert parts.num_parts(tiles, 64 * 8, steps, per_sm, CPU) == want


@pytest.mark.parametrize(
    ("tiles", "per_sm", "want"), [(96, 4, 5), (64, 4, 8), (96, 2, 2), (448, 4, 1), (1, 8, 16)]
)
def test_programs_that_begin_early_leave_no_room(
    tiles: int, per_sm: int, want: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts, "num_sms", lambda device: 132)
    assert parts.num_parts(tiles, 64 * 8, 16, per_sm, CPU, early=True) == want


def test_parts_fit_into_their_space() -> None:
    assert parts.num_parts(1, 2**21, 64, 50, CPU) == 2
    assert parts.num_parts(1, 2**22, 64, 50, CPU) == 1
    assert parts.num_parts(2**15, 1, 64, 2**16, CPU) == 1


def test_products_of_two_streams_have_spaces_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """At start, weights are prepared on one while the warm-up runs on another."""
    streams = iter([1, 2, 1])
    monkeypatch.setattr(
        torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=next(streams))
    )
    monkeypatch.setattr(torch, "empty", lambda size, **_: ["parts", size])
    monkeypatch.setattr(torch, "zeros", lambda size, **_: ["counters", size])
    parts._space_of.cache_clear()
    first, second, again = (parts.space(torch.device("cuda", 0)) for _ in range(3))
    parts._space_of.cache_clear()
    assert all(a is not b for a, b in zip(first, second, strict=True))
    assert all(a is b for a, b in zip(first, again, strict=True))
