"""Grammar rules: their parts, which of them can end, and the engine's notation for them.

Knows neither where rules come from nor the engine but for its notation (Lark's).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from math import inf
from typing import Final


@dataclass(frozen=True, slots=True)
class Chars:
    """One character of a class: the engine's text of it, what is in it that JSON must spell, and
    whether letters stand for both cases."""

    text: str
    special: frozenset[int] = frozenset()
    any_case: bool = False


@dataclass(frozen=True, slots=True)
class Term:
    """What a terminal matches, in the engine's notation; in grammars only."""

    text: str


@dataclass(frozen=True, slots=True)
class Seq:
    items: tuple[Expr, ...] = ()


@dataclass(frozen=True, slots=True)
class Alt:
    items: tuple[Expr, ...]  # none: nothing matches


@dataclass(frozen=True, slots=True)
class Repeat:
    item: Expr
    low: int = 0
    high: float = inf

    @property
    def items(self) -> tuple[Expr]:
        return (self.item,)


@dataclass(frozen=True, slots=True)
class Anchor:
    at: str  # "^" or "$"


@dataclass(frozen=True, slots=True)
class RuleRef:
    """Another rule; in grammars only."""

    name: str


Expr = Chars | Term | Seq | Alt | Repeat | Anchor | RuleRef
Rules = dict[str, Expr]
EMPTY: Final = Seq()
NOTHING: Final = Alt(())
STRIDE: Final = 16


def seq(*items: Expr) -> Expr:
    """One after the other."""
    return items[0] if len(items) == 1 else Seq(items)


def alt(*items: Expr) -> Expr:
    """One of them."""
    return items[0] if len(items) == 1 else Alt(items)


def rebuilt(node: Expr, call: Callable[[Expr], Expr]) -> Expr:
    """The node with what ``call`` makes of each part in its place."""
    match node:
        case Seq() | Alt():
            return type(node)(tuple(map(call, node.items)))
        case Repeat():
            return Repeat(call(node.item), node.low, node.high)
        case _:
            return node


def finite(rules: Rules, root: str) -> Rules:
    """The rules that ``root`` needs, without what can never end; none: root itself cannot."""
    users: dict[str, set[str]] = {name: set() for name in rules}
    for name, rule in rules.items():
        for ref in _refs(rule):
            users[ref].add(name)
    ending: set[str] = set()
    # those that a rule refers to come before it, so that most are looked at once
    queue = deque(_bottom_up(rules, root))
    queued = set(queue)
    while queue:
        name = queue.popleft()
        queued.discard(name)
        if name not in ending and ends(rules[name], ending):
            ending.add(name)
            again = users[name] - queued
            queue += again
            queued |= again
    if root not in ending:
        return {}
    used: Rules = {}
    waiting = [root]
    while waiting:
        name = waiting.pop()
        if name not in used:
            used[name] = _pruned(rules[name], ending)
            waiting += _refs(used[name])
    return used


def parts(node: Expr) -> Iterator[Expr]:
    """The node and all that it is made of."""
    yield node
    if isinstance(node, Seq | Alt | Repeat):
        for item in node.items:
            yield from parts(item)


def _refs(node: Expr) -> list[str]:
    return [part.name for part in parts(node) if isinstance(part, RuleRef)]


def ends(part: Expr, ending: Collection[str] = ()) -> bool:
    """Whether any text matches, if the rules ``ending`` are those that some text matches."""
    match part:
        case RuleRef():
            return part.name in ending
        case Seq():
            return all(ends(item, ending) for item in part.items)
        case Alt():
            return any(ends(item, ending) for item in part.items)
        case Repeat():
            return part.low == 0 or ends(part.item, ending)
        case _:
            return True


def _pruned(part: Expr, ending: set[str]) -> Expr:
    if isinstance(part, Alt):
        part = Alt(tuple(item for item in part.items if ends(item, ending)))
    if isinstance(part, Repeat) and not ends(part.item, ending):
        return EMPTY
    return rebuilt(part, lambda item: _pruned(item, ending))


def in_case(chars: Chars, text: str) -> str:
    """The engine's ``text`` of some of ``chars``, in both cases where they are."""
    return f"(?i:{text})" if chars.any_case else text


def times(low: int, high: float) -> str:
    """How often, in the engine's notation."""
    count = f"{{{low},{'' if high == inf else high}}}"
    return {"{0,}": "*", "{1,}": "+", "{0,1}": "?"}.get(count, count)


def written(rules: Rules, root: str) -> str:
    """The engine's grammar."""
    names = {name: f"r{i}" for i, name in enumerate(rules)}
    terminals: dict[str, str] = {}
    lines = [f"{names[name]}: {_text(rule, names, terminals)}" for name, rule in rules.items()]
    lines += [f"{name}: {text}" for text, name in terminals.items()]
    # The engine reads the rules that a rule refers to within it, on the stack. So those that refer
    # to the fewest come first, behind what never comes.
    shallow = _bottom_up(rules, root)[STRIDE - 1 :: STRIDE]
    if not shallow:
        return "\n".join([f"start: {names[root]}", *lines])
    first = " | ".join(f"NEVER {names[name]}" for name in shallow)
    return "\n".join(
        [f"start: first | {names[root]}", f"first: {first}", r"NEVER: /[^\x00-\x{10FFFF}]/", *lines]
    )


def _bottom_up(rules: Rules, root: str) -> list[str]:
    """All rules, each after those that it refers to unless they refer to it too."""
    found: dict[str, None] = {}
    begun = {root}
    path = [(root, _refs(rules[root]))]
    while path:
        name, left = path[-1]
        if not left:
            found[name] = None
            path.pop()
        elif (ref := left.pop()) not in begun:
            begun.add(ref)
            path.append((ref, _refs(rules[ref])))
    return list(found)


def _text(part: Expr, names: dict[str, str], terminals: dict[str, str]) -> str:
    match part:
        case RuleRef():
            return names[part.name]
        case Chars():
            return terminals.setdefault(f"/{in_case(part, part.text)}/", f"T{len(terminals)}")
        case Term():
            return terminals.setdefault(part.text, f"T{len(terminals)}")
        case Seq():
            return " ".join(_text(item, names, terminals) for item in part.items) or '""'
        case Alt():
            return f"({' | '.join(_text(item, names, terminals) for item in part.items)})"
        case Repeat(high=0):
            return '""'
        case Repeat():
            return f"({_text(part.item, names, terminals)}){times(part.low, part.high)}"
        case Anchor():
            raise AssertionError(part)
