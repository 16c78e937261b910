"""Tells control tokens that users and tools merely spell from those that are meant as such.

While a chat template runs, spelled control tokens are replaced by marks that nobody else can write.
Afterwards the marks become text again, and control tokens that the template and the assistant wrote
get names that only the tokenizer knows. Works on text only: knows neither templates nor tokenizers.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterable, Mapping
from typing import Final

from asyncllm.plain import Json, JsonObject

# roles whose control tokens are kept: their text comes from the application or from the model
TRUSTED: Final = frozenset({"system", "developer", "assistant"})
OF_TOOLS: Final = ("tools", "listed")  # keys of a message that describe tools
MOST: Final = 60_000  # control tokens; each gets a character of its own
LONGEST: Final = 400  # characters per control token
_FIRST: Final = 0x100000  # in a private plane of Unicode
_SECRET: Final = range(0xF0000, 0xFFFFD)  # the other private plane


class _Trie(dict[str, "_Trie"]):
    """Texts by their next character; the key "" marks the end of one."""


class ControlTokens:
    """The control tokens of one vocabulary, with two secret alphabets for them.

    Args:
        spelled: for each token's text, whether its plain spelling must be split by ``cut``, because
            the vocabulary would otherwise make the token out of it.
        hidden, meant: prefixes of marks and names; "": drawn at random.

    Attributes:
        cut: a name that is not a token: the texts before and after it are encoded separately.
    """

    def __init__(self, spelled: Mapping[str, bool], hidden: str = "", meant: str = "") -> None:
        self.spelled = dict(spelled)
        self.hidden, self.meant = hidden or _secret(), meant or _secret()
        self.cut = self.meant + chr(_FIRST + len(spelled))
        self._edge = self.hidden + chr(_FIRST + len(spelled))
        self.names = {token: self.meant + chr(_FIRST + i) for i, token in enumerate(spelled)}
        self._marks = {token: self.hidden + chr(_FIRST + i) for i, token in enumerate(spelled)}
        self._of_mark = {mark: token for token, mark in self._marks.items()}
        self._any = re.compile(_any_of(spelled) if spelled else "(?!)")
        self._any_mark = re.compile(f"{self.hidden}(.)", re.DOTALL)
        self._heads = {token[:i] for token in spelled for i in range(1, len(token))}
        self._tails = {token[i:] for token in spelled for i in range(1, len(token))}
        self._longest = max(map(len, spelled), default=0)

    def hide(self, text: str) -> str:
        """Replace each control token spelled in ``text`` by a mark.

        If ``text`` begins or ends with a part of one, that part gets a mark too, so that none can
        form where texts are joined.
        """
        text = self._any.sub(lambda found: self._marks[found[0]], text)
        sizes = range(1, min(len(text), self._longest) + 1)
        before = self._edge if any(text[:n] in self._tails for n in sizes) else ""
        behind = self._edge if any(text[-n:] in self._heads for n in sizes) else ""
        return before + text + behind

    def hide_in(self, messages: list[JsonObject]) -> list[JsonObject]:
        """A conversation in template form, with marks in what users and tools write and in the
        descriptions of tools."""
        return [
            {
                key: value
                if key == "role" or (turn["role"] in TRUSTED and key not in OF_TOOLS)
                else self.within(value)
                for key, value in turn.items()
            }
            for turn in messages
        ]

    def reveal(self, prompt: str) -> tuple[str, str | None]:
        """Undo the marks in a prompt that a template rendered from such a conversation.

        Returns:
            The prompt's text, and the same text with names for the control tokens that are meant;
            None if all spelled control tokens are meant.
        """
        if self.hidden not in prompt:
            return prompt, None
        named = self._name(prompt)
        text = self._any_mark.sub(lambda found: self._of_mark.get(found[0], ""), prompt)
        named = self._any_mark.sub(lambda found: self._plain(found[0]), named)
        return text, None if self._name(text) == named else named

    def _name(self, text: str) -> str:
        return self._any.sub(lambda found: self.names[found[0]], text)

    def _plain(self, mark: str) -> str:
        """The text that a mark stands for, split where needed."""
        token = self._of_mark.get(mark, "")
        return token[:1] + self.cut + token[1:] if self.spelled.get(token) else token

    def within(self, value: Json) -> Json:
        """The value with marks in all its strings."""
        if isinstance(value, str):
            return self.hide(value)
        if isinstance(value, list):
            return [self.within(each) for each in value]
        if isinstance(value, dict):
            # a key that merely begins like one must stay, since templates look it up
            return {
                self.hide(key) if self._any.search(key) else key: self.within(each)
                for key, each in value.items()
            }
        return value


def _secret() -> str:
    return "".join(map(chr, (secrets.choice(_SECRET) for _ in range(4))))


def _any_of(texts: Iterable[str]) -> str:
    """A regular expression that matches the longest of ``texts``, in time independent of their
    number."""
    root = _Trie()
    for text in texts:
        node = root
        for character in text:
            node = node.setdefault(character, _Trie())
        node[""] = _Trie()
    return _written(root)


def _written(node: _Trie) -> str:
    branches = [re.escape(key) + _written(child) for key, child in node.items() if key]
    if len(branches) == 1 and "" not in node:
        return branches[0]
    return f"(?:{'|'.join(branches)}){'?' if '' in node else ''}" if branches else ""
