"""Token healing: a prompt's last tokens are removed, and the output must begin with their text.

A word that the end of the prompt has cut into unusual tokens is thereby tokenized again. Knows the
text that is still to be repeated; knows neither prompts nor how texts become tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

from asyncllm.constrain.protocol import Constraint
from asyncllm.constrain.vocabulary import Vocabulary


class Healing(Constraint):
    """A :class:`asyncllm.constrain.protocol.Constraint`.

    Tokens only get longer: one that repeats a part of the text is no shorter than the token that it
    takes the place of. So a likely " " does not begin what " very" said.

    Args:
        pieces: bytes of the tokens that have been taken off, none of them empty. As many may come
            without counting as output.
    """

    def __init__(self, vocab: Vocabulary, pieces: Sequence[bytes]) -> None:
        self._vocab, self._pieces, self._left = vocab, list(pieces), len(pieces)
        self._uncounted = 0

    def mask(self) -> bytes:
        if not self._pieces:
            return b""
        return self._vocab.agreeing_with(b"".join(self._pieces), len(self._pieces[0]))

    def mask_is_stable_for(self, ahead: int) -> bool:
        return ahead == 0 or not self._pieces

    def accept(self, token: int) -> bool:
        size = len(self._vocab.piece(token))
        if self._pieces and size <= sum(map(len, self._pieces)) and self._left:
            self._left -= 1
            self._uncounted += 1
        while self._pieces and size:
            said = self._pieces[0][:size]
            size -= len(said)
            self._pieces[0] = self._pieces[0][len(said) :]
            if not self._pieces[0]:
                del self._pieces[0]
        return False

    def uncounted(self) -> int:
        """Tokens since the last call that said nothing new, as far as they are not to count."""
        num, self._uncounted = self._uncounted, 0
        return num
