"""Outputs at random, and whether a value can be one, over single bytes: what tests of grammars share."""

from __future__ import annotations

import json
import random
from typing import Any

import numpy as np

from asyncllm.constrain.llguidance_backend import GrammarEngine, Matcher
from asyncllm.errors import RequestError

EOS = 256


def byte_grammars() -> GrammarEngine:
    """Grammars of a vocabulary whose tokens are the bytes, and an end token."""
    return GrammarEngine([*(bytes([byte]) for byte in range(256)), b""], 257, (EOS,))


def matcher(grammars: GrammarEngine, kind: str, text: str) -> Matcher:
    """At the beginning of an output. Raises RequestError."""
    grammars.keep(kind, text, grammars.build(kind, text))
    found = grammars.constrain(kind, text)
    found.start()
    return found


def allowed(at: Matcher) -> list[int]:
    bits = np.unpackbits(np.frombuffer(at.mask(), np.uint8), bitorder="little")
    return list(np.flatnonzero(bits).tolist())


def walk(at: Matcher, rng: random.Random, most: int = 1500, soft: int = 40) -> str | None:
    """Some output; None: it would be longer than ``most`` bytes. Ends soon after ``soft``."""
    at.restart()
    out = b""
    for i in range(most):
        may = allowed(at)
        if EOS in may and (i > soft or rng.random() < 0.3):
            return out.decode()
        closing = [token for token in may if token != EOS and token in b'"}]']
        if closing and (i > soft or rng.random() < 0.25):
            token = rng.choice(closing)
        else:
            may = [token for token in may if token != EOS]
            plain = [token for token in may if 32 <= token < 127] if rng.random() < 0.9 else []
            token = rng.choice(plain or may)
        out += bytes([token])
        if at.accept(token):
            return out.decode()
    return None


def takes(at: Matcher, text: str) -> bool:
    """``text`` is an output."""
    at.restart()
    data = text.encode(errors="surrogatepass")
    try:
        for i, byte in enumerate(data):
            if at.accept(byte):
                return i == len(data) - 1
    except RequestError:
        return False
    return EOS in allowed(at)


def written(value: Any, schema: Any) -> str:
    """A value in the style of outputs: properties in the order in which the schema names them."""
    names: dict[str, int] = {}

    def collect(node: Any) -> None:
        if isinstance(node, dict):
            for word in ("properties", "required"):
                if isinstance(named := node.get(word), dict | list):
                    for name in named:
                        names.setdefault(str(name), len(names))
            for inner in node.values():
                collect(inner)
        elif isinstance(node, list):
            for inner in node:
                collect(inner)

    def arranged(node: Any) -> Any:
        if isinstance(node, dict):
            keys = sorted(node, key=lambda key: names.get(key, len(names)))
            return {key: arranged(node[key]) for key in keys}
        return [arranged(item) for item in node] if isinstance(node, list) else node

    collect(schema)
    return json.dumps(arranged(value), ensure_ascii=False)
