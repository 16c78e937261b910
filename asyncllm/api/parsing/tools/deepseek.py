"""DeepSeek's markers, written with full-width bars and a block character for spaces."""

from __future__ import annotations

from typing import Final

BAR: Final = "\uff5c"
SPACE: Final = "\u2581"


def _mark(words: str) -> str:
    return f"<{BAR}{words.replace(' ', SPACE)}{BAR}>"


CALLS: Final = _mark("tool calls begin")
CALLS_END: Final = _mark("tool calls end")
CALL: Final = _mark("tool call begin")
CALL_END: Final = _mark("tool call end")
SEP: Final = _mark("tool sep")
