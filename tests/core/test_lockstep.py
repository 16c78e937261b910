"""Groups agree on each step: one asks, all join, the largest counts."""

from __future__ import annotations

import pytest

from asyncllm.core.lockstep import CommonStep, StepAgreement


def test_a_step_is_agreed_when_every_group_has_said_what_it_brings() -> None:
    groups = StepAgreement(3)
    assert groups.offer(1, 1, 5, False) == ([0, 2], None)
    assert groups.offer(0, 1, 0, False) == ([], None)
    assert groups.offer(2, 1, 7, True) == ([], CommonStep(1, 7, mixed=True))
    assert groups.offer(0, 2, 4, False) == ([1, 2], None)
    groups.offer(2, 2, 0, False)
    assert groups.offer(1, 2, 0, False) == ([], CommonStep(2, 4, mixed=False))


@pytest.mark.parametrize(("group", "step"), [(0, 1), (1, 2), (1, 0)])
def test_what_is_not_a_groups_turn_is_refused(group: int, step: int) -> None:
    groups = StepAgreement(2)
    groups.offer(0, 1, 3, False)
    with pytest.raises(ValueError, match=f"group {group} brings step {step}, 1 is due"):
        groups.offer(group, step, 3, False)
    assert groups.offer(1, 1, 0, False) == ([], CommonStep(1, 3, mixed=False))
