"""Adds rows of draft tokens to a step, and takes back the wrong ones.

The part of the scheduler's state that knows of speculation; :mod:`asyncllm.core.speculation`
decides what pays off, :mod:`asyncllm.core.ngram_lookup` makes the guesses.
"""

from __future__ import annotations

from array import array

from asyncllm.core.ngram_lookup import NgramLookup
from asyncllm.core.request_lifecycle import RequestLifecycle
from asyncllm.core.speculation import READ_TOKENS, Speculation
from asyncllm.core.steps import NO_TOKEN, Lane, Request, Row, Step


class DraftScheduler(RequestLifecycle):
    """Requests whose next tokens may be guessed.

    The token after a draft is sampled exactly as it would be without it: with the same uniform
    number, which depends only on seed and position, and with penalties over the same tokens. So it
    is enough to keep the tokens sampled after correct ones, and outputs are the same with and
    without drafts. For a deterministic guess this is rejection sampling: a draft is accepted with
    the probability that the model gives it, and its replacement follows the model's distribution.

    Attributes:
        speculation: None: no drafts.
    """

    speculation: Speculation | None

    def _awaits_drafts(self, speculation: Speculation) -> bool:
        """Whether to plan nothing until the running step is over.

        Requests whose next mask depends on the tokens before are left out: they wait anyway.
        """
        if speculation.trying:
            return True
        self._read_texts()
        rows = [
            (req, lane)
            for req in self.running.values()
            if (lane := req.lane) and lane.fill_len <= lane.planned < req.final_len
        ]
        if len(rows) >= speculation.most_rows or not any(lane.inflight for _, lane in rows):
            return False
        chances = [self._chances(req, lane, speculation.most) for req, lane in rows]
        return speculation.waits([some for some in chances if some], len(rows))

    def _draft(self, speculation: Speculation, rows: list[Row], room: int) -> list[Row]:
        """The rows, which have one token each, followed by those of drafts; at most ``room``
        more."""
        if min(room, speculation.most_rows - len(rows)) <= 0:
            return rows
        chances, waits = [], False
        for req, lane, _ in rows:
            known = not req.ahead(lane)
            some = self._chances(req, lane, speculation.most) if known else []
            waits |= bool(some)
            if known and not some:
                some = self._path_chances(req, lane, speculation.most)
            chances.append(some)
        if not any(chances):
            return rows
        out: list[Row] = []
        nums = speculation.choose(chances, len(rows), room, waits=waits)
        for row, num in zip(rows, nums, strict=True):
            out.append(row)
            if num:
                req, lane, _ = row
                self._guess(req, lane, num)
                lane.inflight += num
                out += [row] * num
        return out

    @staticmethod
    def _guess(req: Request, lane: Lane, num: int) -> None:
        """Set the lane's drafts."""
        assert req.lookup is not None
        if req.constraint is not None and (path := req.constraint.path).tokens:
            lane.drafts, lane.masks = path.tokens[:num], path.masks[:num]
            num_predicted = path.num_predicted
        else:
            lane.drafts = req.lookup.guess(num)
            num_predicted = num if req.lookup.is_predicted else 0
        lane.num_counted = num_predicted if req.prediction else num

    def _chances(self, req: Request, lane: Lane, most: int) -> list[float]:
        """Acceptance probabilities of the drafts after the request's next row."""
        lookup, ahead = req.lookup, req.ahead(lane)
        if lookup is None or not lookup.guesses:
            return []
        most = min(most, req.final_len - lane.planned - 1)  # no token is sampled after the last
        if most <= 0 or not self._is_free(req, ahead + most):
            return []
        return lookup.chances(most, ahead)

    @staticmethod
    def _path_chances(req: Request, lane: Lane, most: int) -> list[float]:
        """The same, of drafts that each have a mask of their own."""
        if req.constraint is None or req.todo or req.lookup is None:
            return []
        most = min(most, req.final_len - lane.planned - 1)
        return req.constraint.path.chances[: max(most, 0)]

    @staticmethod
    def _is_free(req: Request, ahead: int) -> bool:
        """Whether that many tokens may follow by the mask of now, if there is one."""
        if (constraint := req.constraint) is None:
            return True
        return not req.todo and constraint.mask_is_stable_for(ahead)

    def _read_texts(self) -> None:
        """Index a bounded number of the tokens not indexed yet."""
        left = READ_TOKENS
        for req in self.running.values():
            if (lookup := req.lookup) is None:
                if req.todo:
                    continue  # some of its tokens are not outputs yet
                ids = req.prompt + req.outputs
                most, begun = len(req.prompt) + req.until, bool(req.outputs)
                lookup = req.lookup = NgramLookup(ids, most, req.prediction, begun=begun)
            if lookup.unread and left:
                left -= lookup.read(left)

    def _input(self, step: Step, req: Request, lane: Lane, start: int) -> int:
        """The token at ``start``, after those that the lane was opened with, for the next row of
        ``step``; if drafts were tried, the device may not have it as the lane's last token."""
        if req.lookup is None:
            return NO_TOKEN
        at = start - req.known_len
        if at < 0:
            return req.outputs[start - len(req.prompt)]
        if at >= len(lane.drafts):
            return NO_TOKEN
        step.drafts.add(len(step.plan.tokens))
        step.num_unmasked += not lane.masks
        if at < lane.num_counted:
            step.counted.add(len(step.plan.tokens))
            req.drafted += 1
        return lane.drafts[at]

    def _take_wrong(self) -> tuple[tuple[int, int], ...]:
        """(lane, number of slots to free) for wrong drafts."""
        if self.speculation is None:
            return ()
        wrong, self.speculation.wrong = self.speculation.wrong, []
        return tuple((lane.number, num) for lane, num in wrong if not lane.over)

    def _settle(self, step: Step, tokens: array[int]) -> array[int]:
        """``tokens`` of a step with drafts, without those after wrong drafts, whose positions are
        computed again."""
        kept, right = tokens[:], True
        wrong: dict[int, tuple[Lane, int]] = {}
        for i in sorted(step.drafts):
            _, lane, _ = step.rows[i]
            if i - 1 not in step.drafts:
                right = True
            right = right and tokens[i - 1] == step.plan.tokens[i]
            if not right:
                kept[i] = NO_TOKEN
                step.counted.discard(i)
                lane.planned -= 1
                wrong[lane.number] = lane, wrong.get(lane.number, (lane, 0))[1] + 1
        assert self.speculation is not None
        self.speculation.trying -= step.num_unmasked
        self.speculation.settled([*wrong.values()], len(step.drafts))
        return kept
