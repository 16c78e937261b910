"""Loads checkpoint tensors into parameters, file by file, only this rank's share of each.

Knows names and spans; knows neither models nor file formats.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from asyncllm.errors import StartupError
from asyncllm.models.checkpoint import Checkpoint
from asyncllm.models.packed import PackedNibbles, QuantSource, ScaledWeights
from asyncllm.models.quant_config import StoredForm
from asyncllm.models.quantization import BLOCK, INT4_ZERO, QuantWeight
from asyncllm.models.quantize import quantize_blocks, quantize_rows
from asyncllm.models.tensors import FLOATS, FP8, Index, OpenFiles, TensorSource

_CHUNK = 1 << 22  # elements read, or quantised, at a time
_READERS = 4  # threads
_COPIES = 16  # bytes for each element of a chunk: what has been read, and float32 copies
# what reading takes of a GPU's memory beside the weights, at most, of rows up to 32,768 elements
READING_BYTES = _READERS * _CHUNK * _COPIES


class TensorMismatch(ValueError):
    """A tensor is not what config.json says; the text lacks its name."""


SliceSpan = tuple[int, int, int]  # (start in the checkpoint tensor, start in the parameter, length)


@dataclass(frozen=True, slots=True)
class Target:
    """Where a checkpoint tensor goes: spans along ``dim``, of which it has ``size``, to ours.

    ``param`` may be a view, such as one expert of a stack or a transposed weight, and have any
    number of dimensions. A checkpoint tensor that has several targets goes to all of them.
    """

    param: Tensor
    dim: int
    size: int
    spans: tuple[SliceSpan, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the checkpoint tensor."""
        wanted = list(self.param.shape)
        wanted[self.dim] = self.size
        return tuple(wanted)

    def pieces(self) -> Iterator[tuple[Index, Tensor]]:
        """Slices of the checkpoint tensor of bounded size, each with its destination."""
        for start, into, length in self.spans:
            place = self.param.narrow(self.dim, into, length)
            index = [slice(0, size) for size in self.shape]
            index[self.dim] = slice(start, start + length)
            first, num_rows = index[0].start, len(place)
            step = max(1, _CHUNK * num_rows // max(1, place.numel()))
            for row in range(0, num_rows, step):
                end = min(row + step, num_rows)
                yield (slice(first + row, first + end), *index[1:]), place[row:end]

    def fill(self, source: TensorSource) -> None:
        for index, place in self.pieces():
            place.copy_(source.read(index, place.device))


def whole(param: Tensor) -> Target:
    """The checkpoint tensor unchanged."""
    return Target(param, 0, param.shape[0], ((0, 0, param.shape[0]),))


@dataclass(frozen=True, slots=True)
class QuantTarget:
    """Where a checkpoint's matrix goes in one of few bits: spans along ``dim``, as of ``Target``.

    Attributes:
        form: of the checkpoint, whose codes and scales are taken; None: ours are made, of each row
            (block) as this rank has it.
        order: gets the columns in the order of their groups; they are stored so.
        rows: of ``weight`` that belong to the matrix, padding included.
    """

    weight: QuantWeight
    form: StoredForm | None
    order: Tensor | None
    dim: int
    size: int
    spans: tuple[SliceSpan, ...]
    rows: slice

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the checkpoint's matrix."""
        if self.dim == 0:
            return self.size, self.weight.in_features
        return self.weight.out_features, self.size

    def fill(self, source: TensorSource | QuantSource) -> None:
        """Raises TensorMismatch: the source is not of the form that was expected."""
        if self.form is None:
            self._quantise(source)
        elif isinstance(source, ScaledWeights | PackedNibbles):
            self._take(source)
        else:
            raise TensorMismatch("is not quantised, and config.json says that it is")

    def _quantise(self, source: TensorSource) -> None:
        weight, device = self.weight, self.weight.data.device
        first, end, _ = self.rows.indices(weight.out_features)
        step = max(BLOCK, _CHUNK // weight.in_features // BLOCK * BLOCK)
        for begin in range(first, end, step):
            stop = min(begin + step, end)
            made = torch.zeros(stop - begin, weight.in_features, device=device)
            for start, into, length in self.spans:
                if self.dim == 1:
                    index = (slice(begin, stop), slice(start, start + length))
                    made[:, into : into + length] = source.read(index, device).to(device)
                    continue
                low, high = max(begin, into), min(stop, into + length)
                if low < high:
                    index = (
                        slice(low - into + start, high - into + start),
                        slice(0, self.shape[1]),
                    )
                    made[low - begin : high - begin] = source.read(index, device).to(device)
            rows = slice(begin, stop)
            if weight.kind == "fp8_block":
                blocks = slice(begin // BLOCK, -(-stop // BLOCK))
                weight.data[rows], weight.scales[blocks] = quantize_blocks(made)
            else:
                weight.data[rows], scales = quantize_rows(made, weight.data.dtype)
                weight.scales[rows] = scales[:, 0]

    def _take(self, source: QuantSource) -> None:
        """Codes, scales and zeros of the spans."""
        if not any(length for _, _, length in self.spans):  # all of it is other ranks'
            return
        weight, device, order = self.weight, self.weight.data.device, source.order
        scales, zeros = source.scales(device), source.zeros(device)
        if zeros is not None and weight.zeros is None and bool((zeros != INT4_ZERO).any()):
            raise TensorMismatch(
                f"has zeros other than {INT4_ZERO}: config.json says it is symmetric"
            )
        if self.order is not None and order is not None:
            self.order.copy_(order)
        for start, into, length in self.spans:
            here = slice(into, into + length)
            if self.dim == 0:
                rows, columns = here, slice(0, weight.in_features)
                offset = start - into, 0
            else:
                rows, columns = slice(0, weight.out_features), here
                offset = 0, start - into
            self._copy_codes(source, rows, columns, offset, order)
            for made, given in ((_scales(weight), scales), (_zeros(weight), zeros)):
                if made is None or given is None:
                    continue
                ours = _block_of(weight)
                at = [
                    torch.arange(cut.start // by, -(-cut.stop // by), device=device)
                    for cut, by in zip((rows, columns), ours, strict=True)
                ]
                found = given
                for dim in (0, 1):
                    of = (at[dim] * ours[dim] + offset[dim]) // source.block[dim]
                    found = found.index_select(dim, of)
                made[at[0][0] : at[0][-1] + 1, at[1][0] : at[1][-1] + 1] = found

    def _copy_codes(
        self,
        source: QuantSource,
        rows: slice,
        columns: slice,
        offset: tuple[int, int],
        order: Tensor | None,
    ) -> None:
        weight, device = self.weight, self.weight.data.device
        cut = slice(columns.start + offset[1], columns.stop + offset[1])
        step = max(1, _CHUNK // max(1, weight.in_features))
        for begin in range(rows.start, rows.stop, step):
            stop = min(begin + step, rows.stop)
            codes = source.codes(slice(begin + offset[0], stop + offset[0]), cut, device)
            if order is not None:
                codes = codes[:, order.to(device)]
            if weight.kind == "int4_group":
                packed = codes[:, ::2] | codes[:, 1::2] << 4
                weight.data[begin:stop, columns.start // 2 : columns.stop // 2] = packed
            else:
                weight.data[begin:stop, columns] = codes


def _block_of(weight: QuantWeight) -> tuple[int, int]:
    """Rows and columns that share a scale."""
    return (BLOCK, BLOCK) if weight.kind == "fp8_block" else (1, weight.group)


def _scales(weight: QuantWeight) -> Tensor:
    """As rows and columns of blocks."""
    match weight.kind:
        case "fp8_block":
            return weight.scales
        case "int4_group":
            return weight.scales.t()
        case _:
            return weight.scales.unsqueeze(1)


def _zeros(weight: QuantWeight) -> Tensor | None:
    return None if weight.zeros is None else weight.zeros.t()


class CustomTarget(Protocol):
    """A destination that copies the tensor in its own way."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the checkpoint's tensor."""

    def fill(self, source: TensorSource) -> None:
        """Raises TensorMismatch: the source is not of the form that was expected."""


AnyTarget = Target | QuantTarget | CustomTarget


@dataclass(frozen=True, slots=True)
class _LoadJob:
    """What to load from where."""

    checkpoint: Checkpoint
    wanted: dict[str, list[AnyTarget]]
    form: StoredForm | None
    counted: _Counted


def load(
    checkpoint: Checkpoint,
    targets: Iterable[tuple[str, AnyTarget]],
    ignores: Callable[[str], bool],
    progress: Callable[[int, int], None],
    *,
    form: StoredForm | None = None,
) -> None:
    """Fill every target from the files of ``checkpoint``.

    Files are memory-mapped where they can be, and read once; nothing but the slices that this rank
    keeps is copied.

    Args:
        progress: told (bytes done, bytes in all) after each tensor, as if those of a file were of
            one size; by one thread at a time. What it raises ends the loading.
        form: how its quantised weights are stored. A plain target gets what they stand for. None:
            the checkpoint is not quantised.

    Raises:
        StartupError: a damaged file, a tensor of unexpected shape or type, a scale that is missing
            or too many, a parameter that no file fills, or a tensor that nobody wants.
    """
    wanted: dict[str, list[AnyTarget]] = {}
    for name, target in targets:
        wanted.setdefault(name, []).append(target)
    _check_names(checkpoint, wanted, ignores, form)
    groups: dict[tuple[Path, ...], list[str]] = {files: [] for files in checkpoint.groups}
    of = {path: files for files in groups for path in files}
    for name in sorted(wanted):
        groups[of[checkpoint.tensors[_main(checkpoint, name, form)].files[0]]].append(name)
    sizes = {files: sum(f.stat().st_size for f in files) for files in groups}
    counted = _Counted(progress, sum(sizes.values()))
    work = _LoadJob(checkpoint, wanted, form, counted)
    # pickles come from one process, and those that cannot be mapped are whole in its memory
    mapped = all(path.suffix == ".safetensors" for path in of)
    with ThreadPoolExecutor(_READERS if mapped else 1) as pool:
        parts = [
            pool.submit(_load_files, work, files, groups[files], sizes[files]) for files in groups
        ]
        try:
            for part in as_completed(parts):
                part.result()
        finally:
            counted.ended = True  # where one has failed
            pool.shutdown(wait=False, cancel_futures=True)


class _Counted:
    """Passes on how much has been read.

    Attributes:
        ended: the loading has failed; whoever counts then is to read no further.
    """

    def __init__(self, progress: Callable[[int, int], None], total: int) -> None:
        self._progress, self._total, self._done = progress, total, 0
        self._lock = threading.Lock()
        self.ended = False

    def add(self, num_bytes: int) -> None:
        """Raises CancelledError: it has ended; and what ``progress`` raises."""
        if self.ended:
            raise CancelledError
        with self._lock:
            self._done += num_bytes
            self._progress(self._done, self._total)


def _main(checkpoint: Checkpoint, name: str, form: StoredForm | None) -> str:
    """The tensor of the checkpoint that has the values of ``name``."""
    if form is None or form.method == "scaled" or name in checkpoint.tensors:
        return name
    return name.removesuffix("weight") + form.main if name.endswith(".weight") else name


def _check_names(
    checkpoint: Checkpoint,
    wanted: dict[str, list[AnyTarget]],
    ignores: Callable[[str], bool],
    form: StoredForm | None,
) -> None:
    found = checkpoint.tensors.keys()
    needed = {_main(checkpoint, name, form) for name in wanted}
    if missing := sorted(needed - found):
        where = checkpoint.placed.get(missing[0], checkpoint.folder)
        raise StartupError(f"{where} lacks {len(missing)} tensors, the first: {missing[0]}")

    def known(name: str) -> bool:
        if ignores(name):
            return True
        if form is None:
            return False
        if form.method == "scaled":  # some name their weights otherwise
            of = name.removesuffix(form.suffix)
        else:
            layer, _, end = name.rpartition(".")
            of = f"{layer}.weight" if end in form.parts else name
        return of != name and (of in wanted or ignores(of))

    if strangers := sorted(n for n in found - wanted.keys() if not known(n)):
        where = checkpoint.placed[strangers[0]]
        raise StartupError(
            f"{where} holds {len(strangers)} unknown tensors, the first: {_said(strangers[0])}"
        )


def _said(name: str) -> str:
    """An untrusted name, made safe for one line on a terminal."""
    return (name if name.isprintable() else ascii(name))[:200]


def _load_files(work: _LoadJob, files: tuple[Path, ...], names: list[str], num_bytes: int) -> None:
    share = num_bytes // max(1, len(names))
    with work.checkpoint.open() as opened:
        for name in names:
            label = f"{files[0]}: {name}"
            source = _source(work, opened, name, label)
            for target in work.wanted[name]:
                _copy(label, source, target)
            work.counted.add(share)
    work.counted.add(num_bytes - share * len(names))


def _source(work: _LoadJob, opened: OpenFiles, name: str, label: str) -> TensorSource:
    """The tensor ``name``, dequantised if it has scales."""
    tensors, form = work.checkpoint.tensors, work.form
    main = _main(work.checkpoint, name, form)
    if form is not None and main != name:
        layer = name.removesuffix("weight")
        beside = {end: f"{layer}{end}" for end in form.parts if f"{layer}{end}" in tensors}
        found = {end: opened.tensor(tensors[each]) for end, each in beside.items()}
        return PackedNibbles(label, form, found)
    source = opened.tensor(tensors[name])
    if form is not None and form.method == "scaled":
        scale_name = f"{name}{form.suffix}"
        scaled = scale_name in tensors
        if source.kind == form.element:
            if not scaled:
                raise StartupError(
                    f"{label} has type {source.kind}, and there are no scales ({scale_name})"
                )
            return ScaledWeights(label, form, source, opened.tensor(tensors[scale_name]))
        if scaled:
            raise StartupError(
                f"{label} has scales ({scale_name}), and type {source.kind}, not {form.element}"
            )
    if source.kind == FP8:
        raise StartupError(
            f"{label} has type {FP8}, and config.json has no quantization_config that says how it "
            f"is scaled"
        )
    if source.kind not in FLOATS:
        raise StartupError(
            f"{label} has type {source.kind}: weights of quantized integers are not read"
        )
    return source


@torch.no_grad()
def _copy(label: str, source: TensorSource, target: AnyTarget) -> None:
    if source.shape != target.shape:
        raise StartupError(
            f"{label} has shape {list(source.shape)}, config.json wants {list(target.shape)}"
        )
    try:
        target.fill(source)
    except TensorMismatch as error:
        raise StartupError(f"{label} {error}") from None
