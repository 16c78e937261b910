"""Kernels that begin while the one before still runs, read as text: what would race on a GPU looks
right in the interpreter, and on a GPU mostly too."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import asyncllm.kernels

FOLDER = Path(asyncllm.kernels.__file__ or "").parent
WAITS = {"begun", "waited", "begun_early"}
MEMORY = {"load", "store", "gather", "scatter"}  # and what is atomic
CONSTANT = {"scales_ptr", "weight_scale_ptr"}  # nobody writes them while serving


def kernels() -> Iterator[tuple[str, ast.FunctionDef, ast.Module]]:
    """Those that are told whether to begin early, with their files."""
    for path in sorted(FOLDER.rglob("*.py")):
        tree = ast.parse(path.read_text())
        for node in tree.body:
            if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel"):
                names = {arg.arg for arg in node.args.args}
                if "EARLY" in names:
                    yield node.name, node, tree


KERNELS = {name: (node, tree) for name, node, tree in kernels()}


def called(node: ast.AST) -> str:
    """The name of what is called: of ``tl.load`` the last part."""
    if not isinstance(node, ast.Call):
        return ""
    func = node.func
    return func.attr if isinstance(func, ast.Attribute) else getattr(func, "id", "")


def touches_memory(name: str) -> bool:
    return name in MEMORY or name.startswith("atomic_")


def waits(statement: ast.stmt) -> bool:
    """At the top level of a kernel, or where nothing but EARLY decides."""
    if isinstance(statement, ast.If) and getattr(statement.test, "id", "") == "EARLY":
        return any(map(waits, statement.body))
    return isinstance(statement, ast.Expr) and called(statement.value) in WAITS


def test_there_are_some() -> None:
    assert len(KERNELS) >= 9


@pytest.mark.parametrize("name", KERNELS)
def test_nothing_is_touched_before_the_wait(name: str) -> None:
    """By no program and in no branch, but constants; helpers are called behind it."""
    body = KERNELS[name][0].body
    (at,) = [i for i, statement in enumerate(body) if waits(statement)]
    for node in (node for statement in body[:at] for node in ast.walk(statement)):
        assert not isinstance(node, ast.Return)
        if touches_memory(called(node)):
            assert called(node) == "load"
            assert isinstance(node, ast.Call)
            assert CONSTANT & {n.id for n in ast.walk(node.args[0]) if isinstance(n, ast.Name)}


@pytest.mark.parametrize("name", KERNELS)
def test_who_is_launched_early_is_told_so(name: str) -> None:
    """A launch has the attribute exactly if its kernel has been compiled to wait."""
    tree = KERNELS[name][1]
    asked = {
        ast.unparse(node.args[0])
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and called(node) == "launched_early"
    }
    told = {
        ast.unparse(key.value)
        for key in ast.walk(tree)
        if isinstance(key, ast.keyword) and key.arg == "EARLY"
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Dict):
            pairs = zip(node.keys, node.values, strict=True)
            told |= {ast.unparse(v) for k, v in pairs if getattr(k, "value", "") == "EARLY"}
    assert told == asked != set()


def test_nobody_else_is_launched_early() -> None:
    for path in sorted(FOLDER.rglob("*.py")):
        text = path.read_text()
        early = path.name == "early.py"
        assert ("launch_pdl" in text or "gdc_" in text) == early, path
