"""Which rows of a decode step have the same first slots, as attention is told on the device.

Plain torch: what a step is made of is known where there is no Triton.
"""

from dataclasses import dataclass

from torch import Tensor

MAX_GROUPS = 32  # of a step; a power of 2, since kernels look at all of them at once
MEMBERS = 2  # times the rows of a step: members of all groups at most


@dataclass(frozen=True, slots=True)
class SharedRows:
    """Groups of rows whose tables name the same slots over a range of tokens; int32 all.

    Rows are put into an order in which the members of each group follow one another. A row is a
    member of several groups where these lie inside one another: the tokens of an inner group follow
    those of the outer one without a gap, and the outermost begins with token 0.

        group     tokens          members
        0         [0, 512)        order[0:6]
        1         [512, 1536)     order[0:3]
        2         [512, 800)      order[3:5]

    There are ``MEMBERS`` memberships for each row of the step at most.
    """

    groups: Tensor  # [4, MAX_GROUPS] first token, token behind the last; first member, their number
    order: Tensor  # [num_rows] the members; behind them anything that is a row
    places: Tensor  # [num_rows] where a row is in ``order``; -1: in no group
    owns: Tensor  # [num_rows] the first token that no group of the row has; 0 where in none
