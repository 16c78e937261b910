"""Tokenizers of grammars are made once for each vocabulary: they never change."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from asyncllm.constrain.llguidance_backend import GrammarEngine


@pytest.fixture(scope="session", autouse=True)
def _tokenizers_made_once() -> Iterator[None]:
    original, known = GrammarEngine._tokenizer, dict[Any, Any]()

    def made(self: GrammarEngine, texts: list[bytes], ends: list[int]) -> Any:
        key = (tuple(texts), tuple(ends))
        if key not in known:
            known[key] = original(self, texts, ends)
        return known[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GrammarEngine, "_tokenizer", made)
        yield
