"""Reads the header of a GGUF file: its metadata, and where its tensors are.

Knows only the format: neither models nor torch. Nothing is allocated by a number in the file that
has not been checked against the file's size.
"""

from __future__ import annotations

import mmap
import os
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from asyncllm.errors import StartupError, reason_of

Meta = Mapping[str, Any]  # the metadata of a file

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_ALIGNMENT = 32
_MOST_ENTRIES = 1 << 22  # per array, and of tensors or values: more than any vocabulary
_MOST_DIMS = 4
_SPLIT = re.compile(r".*-\d{5}-of-(\d{5})\.gguf")
_SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
_STRING, _ARRAY = 8, 9
# number -> (name, elements of a block, bytes of a block); others are not supported
KINDS = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    30: ("BF16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
}

# number -> name of types that are not read, for the error
_IQ = ("IQ2_XXS", "IQ2_XS", "IQ3_XXS", "IQ1_S", "IQ4_NL", "IQ3_S", "IQ2_S", "IQ4_XS")
_OTHERS = {10: "Q2_K", 11: "Q3_K", 29: "IQ1_M", 39: "MXFP4", **dict(enumerate(_IQ, 16))}


@dataclass(frozen=True, slots=True)
class TensorPlace:
    """A tensor of a file.

    Attributes:
        kind: name of its type.
        shape: the last dimension is contiguous; blocks are along it.
        block: elements of a block.
        start, nbytes: where it is in the file.
    """

    kind: str
    shape: tuple[int, ...]
    block: int
    start: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class GgufFile:
    """Attributes:
    meta: by name: numbers, booleans, strings and lists of these.
    tensors: by name.
    data: the whole file.
    header: bytes before the tensors.
    """

    path: Path
    meta: Meta
    tensors: Mapping[str, TensorPlace]
    data: mmap.mmap
    header: int

    def floats(self, name: str) -> list[float] | None:
        """Values of a small float32 tensor; None: there is none.

        Raises:
            StartupError: it has another type, or is large.
        """
        if (place := self.tensors.get(name)) is None:
            return None
        count = place.nbytes // 4
        if place.kind != "F32" or count > 1 << 16:
            raise StartupError(f"{self.path}: {name} has type {place.kind} and {count:,} values")
        return list(struct.unpack_from(f"<{count}f", self.data, place.start))


def read_gguf(path: Path) -> GgufFile:
    """Open the file ``path``, which stays memory-mapped.

    Raises:
        StartupError: it is not a GGUF file, damaged, one of several, or has a tensor of a type that
            is not read.
    """
    if (split := _SPLIT.fullmatch(path.name)) and int(split[1]) > 1:
        raise StartupError(
            f"{path} is one of {int(split[1])} files of a model: join them first "
            f"(llama-gguf-split --merge)"
        )
    try:
        about = path.stat()
        return _read(path, about.st_size, about.st_mtime_ns)
    except (OSError, ValueError) as error:  # mmap refuses empty files and folders with these
        raise StartupError(f"{path} cannot be read: {reason_of(error)}") from None


@lru_cache(maxsize=4)
def _read(path: Path, size: int, changed: int) -> GgufFile:
    with path.open("rb") as file:
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    try:
        return _HeaderReader(path, data).read()
    except StartupError:
        data.close()
        raise


def forget() -> None:
    """Let go of all files that have been read; who still holds one may go on."""
    _read.cache_clear()


class _HeaderReader:
    """Reads a header sequentially."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self._path, self._data, self._at = path, data, 0

    def read(self) -> GgufFile:
        if self._data[:4] != _MAGIC:
            raise self._fault("it does not begin with GGUF")
        self._at = 4
        version = self._number("I")
        if version not in _VERSIONS:
            swapped = int.from_bytes(version.to_bytes(4, "little"), "big") in _VERSIONS
            more = " (its bytes are in the other order)" if swapped else ""
            raise self._fault(f"version {version} is not read{more}, 2 and 3 are")
        num_tensors = self._count("tensors", 24)  # minimum bytes of each
        num_values = self._count("values", 12)
        meta: dict[str, object] = {}
        for _ in range(num_values):
            name = self._string()
            if name in meta:
                raise self._fault(f"{_said(name)} is there twice")
            meta[name] = self._value(self._number("I"))
        if meta.get("split.count", 0) not in (0, 1):
            raise self._fault(f"it is one of {meta['split.count']} files of a model: join them")
        found = [self._tensor() for _ in range(num_tensors)]
        header = self._at
        alignment = meta.get("general.alignment", _ALIGNMENT)
        if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
            raise self._fault(f"general.alignment {alignment!r} is not a power of 2")
        first = -(-header // alignment) * alignment
        tensors: dict[str, TensorPlace] = {}
        for name, place in found:
            if name in tensors:
                raise self._fault(f"tensor {_said(name)} is there twice")
            start = first + place.start
            if place.start % alignment or start + place.nbytes > len(self._data):
                raise self._fault(
                    f"tensor {_said(name)} would be at bytes {start:,} to "
                    f"{start + place.nbytes:,}, and the file has {len(self._data):,}"
                )
            tensors[name] = TensorPlace(place.kind, place.shape, place.block, start, place.nbytes)
        self._apart(tensors)
        return GgufFile(self._path, meta, tensors, self._data, header)

    def _apart(self, tensors: dict[str, TensorPlace]) -> None:
        end, last = 0, ""
        for name, place in sorted(tensors.items(), key=lambda item: item[1].start):
            if place.start < end:
                raise self._fault(f"tensors {_said(last)} and {_said(name)} overlap")
            end, last = place.start + place.nbytes, name

    def _tensor(self) -> tuple[str, TensorPlace]:
        """With ``start`` relative to where the tensors begin."""
        name = self._string()
        num_dims = self._number("I")
        if not 0 < num_dims <= _MOST_DIMS:
            raise self._fault(f"tensor {_said(name)} has {num_dims:,} dimensions")
        shape = tuple(self._number("Q") for _ in range(num_dims))[::-1]
        number, start = self._number("I"), self._number("Q")
        if number not in KINDS:
            served = ", ".join(kind for kind, _, _ in KINDS.values())
            kind = _OTHERS.get(number, str(number))
            raise self._fault(
                f"tensor {_said(name)} has type {kind}, which is not read; {served} are"
            )
        kind, block, block_bytes = KINDS[number]
        count = 1
        for size in shape:
            count *= size
        if not count or shape[-1] % block or count // block * block_bytes > len(self._data):
            raise self._fault(f"tensor {_said(name)} has type {kind} and shape {list(shape)}")
        return name, TensorPlace(kind, shape, block, start, count // block * block_bytes)

    def _value(self, kind: int) -> object:
        if kind in _SCALARS:
            return self._numbers(1, _SCALARS[kind])[0]
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY:
            raise self._fault(f"a value of type {kind} at byte {self._at:,}")
        inner = self._number("I")
        if inner == _STRING:
            return [self._string() for _ in range(self._count("strings", 8))]
        if inner not in _SCALARS:
            raise self._fault(f"an array of type {inner} at byte {self._at:,}")
        code = _SCALARS[inner]
        return self._numbers(self._count("numbers", struct.calcsize(code)), code)

    def _count(self, what: str, least: int) -> int:
        """Read a count of items that each take at least this many bytes."""
        count = self._number("Q")
        if count > min(_MOST_ENTRIES, (len(self._data) - self._at) // least):
            raise self._fault(
                f"{count:,} {what} at byte {self._at:,} of {len(self._data):,} cannot be"
            )
        return count

    def _number(self, code: str) -> int:
        return int.from_bytes(self._bytes(struct.calcsize(code)), "little")

    def _numbers(self, count: int, code: str) -> list[object]:
        return list(struct.unpack(f"<{count}{code}", self._bytes(count * struct.calcsize(code))))

    def _string(self) -> str:
        length = self._number("Q")
        if length > len(self._data) - self._at:
            raise self._fault(f"a string of {length:,} bytes at byte {self._at:,}")
        try:
            return self._bytes(length).decode()
        except UnicodeDecodeError:
            raise self._fault(f"a string at byte {self._at - length:,} is not UTF-8") from None

    def _bytes(self, length: int) -> bytes:
        if length > len(self._data) - self._at:
            raise self._fault(f"it ends at byte {len(self._data):,}, in the middle of its header")
        self._at += length
        return self._data[self._at - length : self._at]

    def _fault(self, what: str) -> StartupError:
        return StartupError(f"{os.fspath(self._path)} is not a GGUF file that can be read: {what}")


def _said(name: str) -> str:
    """An untrusted name, made safe for one line on a terminal."""
    return (name if name.isprintable() else ascii(name))[:200]
