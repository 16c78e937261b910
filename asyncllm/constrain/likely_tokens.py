"""Which tokens are likely to come under a grammar: those guessed, and those of what it forces.

Knows token ids and masks; knows no grammar.
"""

from __future__ import annotations

from collections.abc import Callable

from asyncllm.constrain.protocol import NO_PATH, Path
from asyncllm.constrain.spelling import Spelling
from asyncllm.constrain.vocabulary import passes


class LikelyTokens:
    """Which token is likely to come next: the one guessed if it is allowed, else the first of what
    the grammar forces.

    Args:
        rate: how often forced text is spelled as by the tokenizer.

    Attributes:
        num_guessed: how many tokens were the guessed ones: the first.
    """

    def __init__(self, guess: Path, spelling: Spelling, rate: float) -> None:
        self._guess, self._spelling, self._rate = guess, spelling, rate
        self.num_guessed, self._chance = 0, 1.0
        self._text = b""  # forced
        self._spelled: list[int] = []  # tokens of it

    def next(self, mask: bytes, forced_text: Callable[[], bytes]) -> tuple[int, float, bool] | None:
        """The token after those before, how likely it is after them, and whether its text is
        forced; None: not known.

        Args:
            mask: of the tokens that may come.
            forced_text: what the grammar forces after those before.
        """
        if not self._text:
            self._text, self._spelled = forced_text(), []
        guess, at, rate = self._guess, self.num_guessed, 0.0
        if at < len(guess.tokens) and passes(mask, guess.tokens[at]):
            token, chance = guess.tokens[at], guess.chances[at]
            rate = chance / self._chance if chance else 0.0  # what never came fades to 0
            self.num_guessed, self._chance = at + 1, chance
        else:
            self._guess = NO_PATH
            self._spelled = self._spelled or self._spelling.of(self._text)[:]
            if not self._spelled or not passes(mask, self._spelled[0]):
                return None
            token = self._spelled[0]
        forced = bool(self._text)
        piece = self._spelling.pieces[token]
        self._spelled = self._spelled[1:] if self._spelled[:1] == [token] else []
        self._text = self._text[len(piece) :] if self._text.startswith(piece) else b""
        return token, max(rate, self._rate) if forced else rate, forced
