"""Formats of K/V, decode kernels by name, and which of them go together. Knows no tensors.

The names are LightLLM's, of ``--mode`` and ``--llm_kv_type``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

from asyncllm.errors import StartupError

Element = Literal["int8", "fp8"]
SCALE_BYTES = 2

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class KvFormat:
    """An 8-bit format of K and V with scales.

    Attributes:
        element: whole numbers, or floats with 4 bits of exponent and 3 of mantissa (e4m3).
        group: channels of a head that share a scale; None: all of them.
    """

    name: str
    element: Element
    group: int | None = None

    def num_scales(self, dim: int) -> int:
        """Number of scales of ``dim`` channels of one head of one token."""
        return 1 if self.group is None else dim // self.group

    def row_bytes(self, dim: int) -> int:
        """Of ``dim`` channels of one head of one token."""
        return dim + SCALE_BYTES * self.num_scales(dim)


@dataclass(frozen=True, slots=True)
class DecodeKernel:
    """How attention of rows of one new token is divided among programs.

    Attributes:
        split: the keys of a row may be split over several programs.
        grouped: a program handles all query heads of a KV head, so that K and V are read once.
        halves: it only reads 16-bit K/V.
    """

    name: str
    split: bool
    grouped: bool
    halves: bool = False


FORMATS = {
    found.name: found
    for found in (
        KvFormat("triton_int8kv", "int8"),
        KvFormat("ppl_int8kv", "int8", 8),
        KvFormat("triton_fp8kv", "fp8"),
    )
}
DECODE_KERNELS = {
    found.name: found
    for found in (
        DecodeKernel("ppl_fp16", split=False, grouped=False, halves=True),
        DecodeKernel("triton_flashdecoding", split=True, grouped=False),
        DecodeKernel("triton_gqa_attention", split=False, grouped=True),
        DecodeKernel("triton_gqa_flashdecoding", split=True, grouped=True),
    )
}
KV_TYPES = {"None": None, "int8kv": "triton_int8kv", "fp8kv": "triton_fp8kv"}


@dataclass(frozen=True, slots=True)
class KvMode:
    """The requested K/V format and decode kernel.

    Attributes:
        format: of K/V; None: the model's own type.
        kernel: of decode steps; None: the fastest one of each step.
    """

    format: KvFormat | None = None
    kernel: DecodeKernel | None = None

    @classmethod
    def named(cls, modes: Sequence[str], kv_type: str = "None") -> KvMode:
        """From ``--mode`` and ``--llm_kv_type``: one format and one kernel that reads it.

        Raises:
            StartupError: an unknown name, or two that are incompatible.
        """
        asked = {f"--mode {name}": name for name in modes}
        if kv_type not in KV_TYPES:
            raise StartupError(f"--llm_kv_type {kv_type} is none of {', '.join(KV_TYPES)}")
        if (name := KV_TYPES[kv_type]) is not None:
            asked[f"--llm_kv_type {kv_type}"] = name
        for said, name in asked.items():
            if name not in FORMATS and name not in DECODE_KERNELS:
                known = ", ".join([*FORMATS, *DECODE_KERNELS])
                raise StartupError(f"{said} is none of {known}")
        found = cls(
            _one(asked, FORMATS, "formats of K/V"), _one(asked, DECODE_KERNELS, "decode kernels")
        )
        if found.format is not None and found.kernel is not None and found.kernel.halves:
            by_name = {name: said for said, name in asked.items()}
            raise StartupError(
                f"{by_name[found.kernel.name]} does not read {by_name[found.format.name]}: it is "
                f"for K/V in 16 bits"
            )
        return found

    def refuse(self, dtype: str) -> str | None:
        """Why a model that computes in ``dtype`` ("bf16", ...) cannot run so; None: it can."""
        if self.kernel is not None and self.kernel.halves and dtype == "fp32":
            return f"--mode {self.kernel.name} is for K/V in 16 bits, and these are in fp32"
        return None


def _one(asked: dict[str, str], table: dict[str, T], what: str) -> T | None:
    """The requested entry of ``table`` under any of its names; two are refused."""
    first: str | None = None
    for said, name in asked.items():
        if name not in table:
            continue
        if first is not None and asked[first] != name:
            raise StartupError(f"{first} and {said} are two {what}: give one")
        first = first or said
    return None if first is None else table[asked[first]]


PLAIN = KvMode()
