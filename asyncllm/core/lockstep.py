"""Agreement between groups on the steps that they run together.

Knows step numbers and sizes; knows neither rows nor how messages travel.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class CommonStep:
    """What every group knows about a step before any of them launches it.

    Attributes:
        num_tokens: the largest number of tokens in a group.
        mixed: some group has rows of more than one token.
    """

    step: int
    num_tokens: int
    mixed: bool


class StepAgreement:
    """Steps 1, 2, 3, ... of all groups; each is agreed once every group has announced its share.

    The first group to announce has tokens; a group without any joins with 0. So no steps run while
    all groups are idle.
    """

    def __init__(self, num_groups: int) -> None:
        self._groups = range(num_groups)
        self._next = 1
        self._brings: dict[int, tuple[int, bool]] = {}

    def offer(
        self, group: int, step: int, num_tokens: int, mixed: bool
    ) -> tuple[list[int], CommonStep | None]:
        """The groups to ask to join, and the step if all have joined.

        Raises:
            ValueError: this is not the group's next step.
        """
        if step != self._next or group in self._brings:
            raise ValueError(f"group {group} brings step {step}, {self._next} is due")
        first = not self._brings
        self._brings[group] = num_tokens, mixed
        if len(self._brings) < len(self._groups):
            return [other for other in self._groups if first and other != group], None
        common = CommonStep(
            step,
            max(num for num, _ in self._brings.values()),
            any(mixed for _, mixed in self._brings.values()),
        )
        self._brings.clear()
        self._next += 1
        return [], common
