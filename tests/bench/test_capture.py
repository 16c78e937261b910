"""What the check of graphs compares: steps that give the same bits each time, and where they differ."""

from __future__ import annotations

from asyncllm.engine.step_inputs import unpack
from bench import capture
from bench.capture import Answer, differ, first_differences


def test_no_row_reads_what_another_writes() -> None:
    """Else two runs of a step differ, whatever the kernels do."""
    named: dict[int, int] = {}  # lane -> the first position whose slot the table has
    for plan in capture.steps(64, 256):
        rows = unpack(plan, capture.MAX_LEN)
        slots = rows.slots.tolist()
        assert len({*slots}) == len(slots)
        assert 0 not in slots  # which is read where the table names none
        assert max(slots) < capture.SLOTS
        for lane, start in zip(rows.lanes.tolist(), rows.starts.tolist(), strict=True):
            assert named.get(lane, start) >= start
            named[lane] = start


def test_the_first_layer_that_differs_is_told() -> None:
    kept = Answer(7, [1, 2], [10, 20, 30])
    later, ends = Answer(7, [1, 3], [10, 21, 31]), Answer(7, [2, 2], [10, 20, 30])
    assert first_differences([kept, kept], [kept, kept]) == []
    assert first_differences([kept, kept, kept], [kept, later, ends]) == [
        "7 tokens of 2 rows: from the K/V of layer 1 on",
        "7 tokens of 2 rows: behind the K/V of all layers",
    ]
    assert differ([kept, kept], [kept, later]) == 0.25
