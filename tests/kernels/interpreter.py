"""Triton's interpreter without what it does again and again; what it computes stays the same."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from types import ModuleType
from typing import Any


def hasten(interpreter: ModuleType) -> None:
    """Half of an interpreted kernel's time goes into three things that nothing depends on.

    Of ``triton.runtime.interpreter``; what another version does not have is left alone.
    """
    if hasattr(interpreter, "_patch_lang") and hasattr(interpreter, "_LangPatchScope"):
        _patch_once(interpreter)
    if hasattr(interpreter, "_get_np_dtype"):
        _one_table(interpreter)
    builder = getattr(interpreter, "interpreter_builder", None)
    options = getattr(builder, "options", None)
    if hasattr(options, "sanitize_overflow") and not options.debug:
        # each sum of integers is made twice, for an assertion that only debug looks at
        builder.options = replace(options, sanitize_overflow=False)


def _patch_once(interpreter: Any) -> None:
    """A kernel patches the language before it runs; each function that it calls would look through
    all members of the language again, to find that they are patched."""
    tl, original = interpreter.tl, interpreter._patch_lang
    is_builtin = tl.core.is_builtin

    @cache
    def languages(fn: Any) -> list[Any]:
        return [each for each in (tl, tl.core) if any(each is v for v in fn.__globals__.values())]

    def patch(fn: Any) -> Any:
        if any(is_builtin(each.load) or is_builtin(tl.tensor.__add__) for each in languages(fn)):
            return original(fn)
        return interpreter._LangPatchScope()

    interpreter._patch_lang = patch


def _one_table(interpreter: Any) -> None:
    """The type of NumPy for one of Triton's is found in a table, which was made for each look."""
    original, scalar_type = interpreter._get_np_dtype, interpreter.tl.dtype
    known = cache(original)

    def found(kind: Any) -> Any:
        scalar = kind.scalar
        return known(scalar) if type(scalar) is scalar_type else original(kind)

    interpreter._get_np_dtype = found
