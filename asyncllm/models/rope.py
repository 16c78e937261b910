"""Reads the parameters of rotary position embeddings from a config.json.

Does not know tensors; the angles are computed in ``models/rope_tables.py``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from asyncllm.errors import StartupError
from asyncllm.models.config_numbers import count, number

ConfigDict = dict[str, Any]  # contents of a file
_POSITIONS = 2048  # if a file names none


@dataclass(frozen=True, slots=True)
class LinearScaling:
    """Every frequency is divided by ``factor`` (position interpolation)."""

    factor: float
    longest: int  # positions that it supports


@dataclass(frozen=True, slots=True)
class Dynamic:
    """The base grows with the longest sequence served, beyond ``trained`` positions (NTK-aware)."""

    factor: float
    trained: int


@dataclass(frozen=True, slots=True)
class Llama3Scaling:
    """Long wavelengths are divided by ``factor``, short ones kept, those between blended."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    trained: int


@dataclass(frozen=True, slots=True)
class Yarn:
    """As Llama3, blended by how often a dimension turns within ``trained`` positions."""

    factor: float
    trained: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True  # the borders of the blend are whole dimensions


@dataclass(frozen=True, slots=True)
class LongRope:
    """Each frequency has its own divisor: ``long`` if sequences may exceed ``trained``."""

    short: tuple[float, ...]
    long: tuple[float, ...]
    trained: int


Scaling = LinearScaling | Dynamic | Llama3Scaling | Yarn | LongRope


@dataclass(frozen=True, slots=True, kw_only=True)
class Rope:
    """Rotary embedding of the first ``dim`` elements of a head (of a part that MLA cuts off).

    Attributes:
        interleaved: pairs are (2i, 2i + 1) instead of (i, i + dim / 2).
        attention_factor: multiplies cosines and sines, so scores by its square.
    """

    theta: float
    dim: int
    scaling: Scaling | None = None
    interleaved: bool = False
    attention_factor: float = 1.0


def notes(ropes: Iterable[Rope | None], max_len: int) -> list[str]:
    """A line for the log about each kind of angles that depends on ``max_len``."""
    lines = []
    for scaling in dict.fromkeys(rope.scaling for rope in ropes if rope):
        if not isinstance(scaling, Dynamic | LongRope):
            continue
        longer = max_len > scaling.trained
        if isinstance(scaling, LongRope):
            chosen = f"longrope: {'long' if longer else 'short'} factors"
        else:
            chosen = f"dynamic rope: {'a larger base' if longer else 'its own base'}"
        lines.append(
            f"{chosen} for all requests, since --max_req_total_len {max_len:,} is "
            f"{'beyond' if longer else 'within'} {scaling.trained:,} positions"
        )
    return lines


def reach(ropes: Iterable[Rope | None], said: int) -> int:
    """Positions that the angles support: ``max_position_embeddings``, or the result of scaling the
    original positions.

    Files for YaRN and linear ones often keep the former, and the base of dynamic ones begins to
    grow there.
    """
    scalings = [rope.scaling for rope in ropes if rope]
    stretched = [int(s.factor * s.trained) for s in scalings if isinstance(s, Dynamic | Yarn)]
    return max([said, *stretched, *(s.longest for s in scalings if isinstance(s, LinearScaling))])


def yarn_mscale(factor: float, mscale: float = 1.0) -> float:
    """YaRN's scale of queries and keys (Peng et al., 2023, §3.4), with DeepSeek's weight."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def rope_values(hf: ConfigDict) -> ConfigDict:
    """What a config.json says of its rotary embedding, in the spelling that transformers prefers
    if there are two; {} if it says nothing."""
    given: ConfigDict = hf.get("rope_scaling") or hf.get("rope_parameters") or {}
    return given


def read_rope(hf: ConfigDict, head_dim: int, layer_type: str | None = None) -> Rope:
    """The rotary embedding of a config.json, for layers of ``layer_type`` if it distinguishes them.

    Knows ``rope_parameters`` of transformers 5 and ``rope_theta``, ``rope_scaling`` and
    ``partial_rotary_factor`` of transformers 4.

    Raises:
        StartupError: an unsupported variant, or missing parameters of the variant.
    """
    given = rope_values(hf)
    if layer_type is not None and layer_type in given:
        # nothing that stands beside them counts
        given, hf = given[layer_type] or {}, {**hf, _TRAINED: None}
    kind = given.get("rope_type") or given.get("type") or "default"
    if kind not in _READERS:
        raise StartupError(f"rope scaling {kind!r} is not available yet")
    reader, keys = _READERS[kind]
    known = {*_KEYS, *keys.split()}
    if strange := sorted(key for key, value in given.items() if key not in known and value):
        raise StartupError(f"rope scaling {kind!r} with {strange[0]!r} is not available yet")
    part = given.get("partial_rotary_factor", hf.get("partial_rotary_factor"))
    dim = head_dim if part is None else int(head_dim * float(part))
    if dim % 2 or not 0 < dim <= head_dim:
        raise StartupError(f"partial_rotary_factor {part} of heads of {head_dim} gives no pairs")
    theta = given.get("rope_theta", hf.get("rope_theta"))
    try:
        scaling, attention_factor = reader(given, hf, dim)
    except KeyError as error:
        raise StartupError(f"rope scaling {kind!r} has no {error}") from None
    base = _positive("rope_theta", 10000.0 if theta is None else theta)
    if base <= 1:
        raise StartupError(f"rope_theta {base} is not more than 1")
    return Rope(
        theta=base,
        dim=dim,
        scaling=scaling,
        attention_factor=attention_factor,
    )


def _default(given: ConfigDict, hf: ConfigDict, dim: int) -> tuple[Scaling | None, float]:
    return None, 1.0


def _linear(given: ConfigDict, hf: ConfigDict, dim: int) -> tuple[Scaling | None, float]:
    factor = _positive("factor", given["factor"])
    longest = count(hf, "max_position_embeddings", _POSITIONS)
    if given.get(_TRAINED) is None:  # otherwise the former counts scaled positions
        longest = int(longest * factor)
    return LinearScaling(factor, longest), 1.0


def _dynamic(given: ConfigDict, hf: ConfigDict, dim: int) -> tuple[Scaling | None, float]:
    if dim == 2:
        raise StartupError("dynamic rotary embedding wants more than one pair of elements")
    return Dynamic(_positive("factor", given["factor"]), count(hf, "max_position_embeddings")), 1.0


def _llama3(given: ConfigDict, hf: ConfigDict, dim: int) -> tuple[Scaling | None, float]:
    names = "factor", "low_freq_factor", "high_freq_factor"
    factor, low, high = (_positive(name, given[name]) for name in names)
    if low >= high:
        raise StartupError(f"low_freq_factor {low} is not less than high_freq_factor {high}")
    return Llama3Scaling(factor, low, high, trained_positions(given, hf)), 1.0


def _yarn(given: ConfigDict, hf: ConfigDict, dim: int) -> tuple[Scaling | None, float]:
    trained = trained_positions(given, hf)
    factor = _factor(given, hf, trained)
    scaling = Yarn(
        factor,
        trained,
        _positive("beta_fast", given.get("beta_fast") or 32),
        _positive("beta_slow", given.get("beta_slow") or 1),
        bool(given.get("truncate", True)),
    )
    told, more = given.get("attention_factor"), given.get("attn_factor")
    if told is not None:
        if more is not None:
            raise StartupError("rope scaling 'yarn' has both attention_factor and attn_factor")
        return scaling, _positive("attention_factor", told)
    over, under = given.get("mscale"), given.get("mscale_all_dim")
    usual = yarn_mscale(factor, number("mscale", over) if over and under else 1.0)
    if over and under:
        usual /= yarn_mscale(factor, number("mscale_all_dim", under))
    # as YaRN's authors, vLLM and SGLang read it; transformers ignores it
    return scaling, usual if more is None else usual * _positive("attn_factor", more)


def _longrope(given: ConfigDict, hf: ConfigDict, dim: int) -> tuple[Scaling | None, float]:
    trained = trained_positions(given, hf)
    short, long = (
        tuple(_positive(name, f) for f in given[name]) for name in ("short_factor", "long_factor")
    )
    if len(short) != dim // 2 or len(long) != dim // 2:
        raise StartupError(
            f"longrope has {len(short)} short and {len(long)} long factors, not {dim // 2} each"
        )
    if (told := given.get("attention_factor")) is not None:
        return LongRope(short, long, trained), _positive("attention_factor", told)
    factor = _factor(given, hf, trained)
    scale = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(trained))
    return LongRope(short, long, trained), scale


def trained_positions(given: ConfigDict, hf: ConfigDict) -> int:
    """Positions before the scaling; a value beside the parameters, as in Phi-3's file, wins."""
    for place in (hf, given):
        if place.get(_TRAINED) is not None:
            return count(place, _TRAINED)
    return count(hf, "max_position_embeddings")


def _factor(given: ConfigDict, hf: ConfigDict, trained: int) -> float:
    """The factor by which positions were extended."""
    if (found := given.get("factor")) is None:
        return count(hf, "max_position_embeddings") / trained
    return _positive("factor", found)


def _positive(name: str, value: object) -> float:
    return number(f"{name} of the rotary embedding", value)


# for any kind; the last two repeat other keys or describe the training
_KEYS = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
_KEYS |= {"max_position_embeddings", "finetuned"}
_TRAINED = "original_max_position_embeddings"
_LONGROPE = f"short_factor long_factor factor attention_factor {_TRAINED}"
# the reader of each kind, and its keys
_READERS = {
    "default": (_default, ""),
    "linear": (_linear, f"factor {_TRAINED}"),
    "dynamic": (_dynamic, "factor"),
    "llama3": (_llama3, f"factor low_freq_factor high_freq_factor {_TRAINED}"),
    "yarn": (
        _yarn,
        "factor attention_factor attn_factor beta_fast beta_slow mscale mscale_all_dim truncate "
        f"{_TRAINED}",
    ),
    "longrope": (_longrope, _LONGROPE),
}
