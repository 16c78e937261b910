"""Builds the device side of a rank: model, memory plan, engine, warm-up.

Everything here may block and synchronise; nothing here runs while serving.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from asyncllm import log
from asyncllm.codec import i32
from asyncllm.core.request import SamplingParams
from asyncllm.core.windows import PerSpace, SlotDivision, Window
from asyncllm.engine.device import CpuDevice, CudaDevice
from asyncllm.engine.engine import Engine
from asyncllm.engine.kernel_recording import DryDevice
from asyncllm.engine.parallel import AnyWorld, Group, SingleRank
from asyncllm.engine.sampling import PENALTY_ROWS
from asyncllm.engine.sharing import LEAST_ROWS
from asyncllm.engine.step_timing import even_plan
from asyncllm.environment import memory_available
from asyncllm.errors import StartupError
from asyncllm.models.attention import AttentionBackend
from asyncllm.models.checkpoint import read_checkpoint
from asyncllm.models.kv_format import PLAIN, KvMode
from asyncllm.models.model import Model, ModelContext
from asyncllm.models.ops import Ops, Product
from asyncllm.models.quantization import AS_STORED, LinearCounts, Quantisation, WeightTypes
from asyncllm.models.registry import MODELS
from asyncllm.models.spec import AttentionSpec, ModelSpec, shard_heads
from asyncllm.models.weights import READING_BYTES, load
from asyncllm.records import OpenedLane

TORCH_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
CPU_KV_BYTES = 4 << 30  # default limit of the K/V cache on a CPU
CUDA_RESERVE = 2 << 30  # context, cuBLAS workspace, graphs, fragmentation


def build_model(
    model_dir: Path,
    spec: ModelSpec,
    group: Group,
    *,
    dtype: str,
    device: torch.device,
    max_len: int,
    kv: KvMode = PLAIN,
    whole_experts: bool = False,
    load_way: str = "HF",
    asked: WeightTypes = AS_STORED,
    world: AnyWorld | None = None,
    symmetric: bool = True,
    progress: Callable[[int, int], None] = lambda done, total: None,
    begin: Callable[[Callable[[], None]], object] = lambda read: read(),
) -> Model:
    """The model of ``model_dir`` with this rank's weights on ``device``.

    Args:
        kv: K/V format and decode kernel.
        whole_experts: each rank has whole experts rather than a slice of each (expert parallelism).
        world: ranks among which experts are divided; None: those of ``group``.
        load_way: "HF" or "DS", the format of the checkpoint.
        asked: the requested quantisation of linear layers.
        symmetric: all-reduces may use symmetric memory.
        begin: is given the function that reads the weights, to call it then or later.

    Raises:
        StartupError: the checkpoint does not fit ``spec``, or nothing here can run it.
    """
    model = make_model(
        spec,
        group,
        world=world,
        dtype=dtype,
        device=device,
        max_len=max_len,
        where=device,
        kv=kv,
        whole_experts=whole_experts,
        asked=asked,
    )
    if symmetric:
        for ranks in (group,) if world in (None, group) else (group, world):
            ranks.use_symmetric_memory(spec.hidden_size, TORCH_DTYPES[dtype])

    @torch.no_grad()
    def read() -> None:
        with read_checkpoint(model_dir, load_way, spec) as checkpoint:
            load(checkpoint, model.targets(), model.ignores, progress, form=spec.stored)
        model.pack()

    begin(read)
    return model


def make_model(
    spec: ModelSpec,
    comm: Group,
    *,
    world: AnyWorld | None = None,
    dtype: str,
    device: torch.device,
    max_len: int,
    where: torch.device,
    kv: KvMode = PLAIN,
    whole_experts: bool = False,
    asked: WeightTypes = AS_STORED,
) -> Model:
    """One rank's model, its weights not loaded yet.

    Args:
        comm: ranks that share all layers except experts.
        world: ranks that share the experts; None: those of ``comm``.
        device: where it will run.
        max_len: positions for which rotary angles are computed.
        where: device of its tensors; ``meta`` only to measure its size.
        kv: K/V format, and decode kernel (CUDA only).
        whole_experts: each rank has whole experts rather than a slice of each (expert parallelism).
        asked: the requested quantisation of linear layers.

    Raises:
        StartupError: the device cannot run a layer's attention or has no products with its weights.
    """
    spec = drop_idle_windows(spec, max_len)
    layers = [layer.on(shard_heads(layer, comm.size, comm.rank)) for layer in spec.layers]
    kind = TORCH_DTYPES[dtype]
    if device.type == "cuda" and (reason := kv.refuse(dtype)):
        raise StartupError(reason)
    if any(layer.kind == "mla" for layer in layers) and kv.kernel is not None:
        raise StartupError(
            f"--mode {kv.kernel.name} is for attention with separate keys and values, not for the "
            f"latents of {spec.architecture}"
        )
    ops, attention = _operators(layers, kv, kind, device, max_len, where)
    for layer in dict.fromkeys(layers):
        if reason := attention.refuse(layer, attention.layout, device):
            raise StartupError(f"attention of {spec.architecture} that {reason} is not supported")
    site = ModelContext(
        comm=comm,
        world=world or comm,
        whole_experts=whole_experts,
        ops=ops,
        attention=attention,
        dtype=kind,
        device=where,
        quantisation=Quantisation(spec.stored, asked, dict(spec.gguf) if ops.packed else {}),
    )
    model = MODELS[spec.architecture].make(spec, site)
    if device.type == "cuda":  # imported here: without a GPU there may be no Triton
        from asyncllm.engine.quant_cuda import refuse

        if reason := refuse(site.quantisation.tally.served, device):
            raise StartupError(reason)
    return model


def _operators(
    layers: list[AttentionSpec],
    kv: KvMode,
    dtype: torch.dtype,
    device: torch.device,
    max_len: int,
    where: torch.device,
) -> tuple[Ops, AttentionBackend]:
    """The operators for ``device``, with tables on ``where``."""
    latent, fmt = any(layer.kind == "mla" for layer in layers), kv.format
    if device.type == "cuda":  # imported here: without a GPU there may be no Triton
        from asyncllm.engine.attention_cuda import TritonAttention, TritonPairs
        from asyncllm.engine.latent_cuda import TritonLatentAttention, TritonLatents
        from asyncllm.engine.ops_cuda import TritonOps

        if latent:
            latents = TritonLatents(layers, dtype, fmt)
            return TritonOps(), TritonLatentAttention(layers, latents, max_len, where)
        pairs = TritonPairs(layers, dtype, fmt)
        return TritonOps(), TritonAttention(layers, pairs, max_len, where, kv.kernel)
    from asyncllm.engine.attention_cpu import TorchAttention, TorchPairs
    from asyncllm.engine.latent_cpu import TorchLatentAttention, TorchLatents
    from asyncllm.engine.ops_cpu import TorchOps

    if latent:
        return TorchOps(), TorchLatentAttention(
            layers, TorchLatents(layers, dtype, fmt), max_len, where
        )
    return TorchOps(), TorchAttention(layers, TorchPairs(layers, dtype, fmt), max_len, where)


def drop_idle_windows(spec: ModelSpec, max_len: int) -> ModelSpec:
    """``spec`` for sequences up to ``max_len``: windows that never fill up are dropped."""
    layers = (
        replace(layer, window=None) if layer.window and layer.window >= max_len else layer
        for layer in spec.layers
    )
    return replace(spec, layers=tuple(layers))


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """How the device memory of one rank is divided, in bytes."""

    weights: int
    work: int  # activations, logits, lane tables
    num: PerSpace  # slots; equal numbers: one space
    division: SlotDivision
    linears: LinearCounts = field(default_factory=LinearCounts)  # kinds of the linear layers
    moving: int = 0  # of work: pages of K/V in transit between servers

    @property
    def window(self) -> Window | None:
        """The window of the sliding layers, if they have their own slot space."""
        return None if self.num.full == self.num.sliding else self.division.window

    @property
    def kv(self) -> int:
        """Bytes of all slots and one for padding."""
        return self.division.nbytes(self.num)

    def text(self, max_req_total_len: int) -> str:
        """The plan as a line for the log and for --check."""
        gib = 1 << 30
        pages = f" ({self.moving / gib:.2f} of it for K/V in transit)" if self.moving else ""
        return (
            f"memory per rank: weights {self.weights / gib:.2f} GiB, workspace "
            f"{self.work / gib:.2f} GiB{pages}, KV {self.kv / gib:.2f} GiB = {self._slots()}; "
            f"{self.num.full / max_req_total_len:.1f} requests of {max_req_total_len:,} tokens fit "
            "at once"
        )

    def _slots(self) -> str:
        num, slot = self.num, self.division.slot
        if self.window is None:
            return f"{num.full:,} slots of {sum(slot) / 1024:.1f} KiB"
        sliding = (
            f"{num.sliding:,} slots of {slot.sliding / 1024:.1f} KiB for layers that see "
            f"{self.window.size:,} tokens"
        )
        times = f"{num.full * sum(slot) / self.kv:.1f} times the tokens of one space for all"
        if self.division.unbacked:
            return f"{sliding}; {num.full:,} tokens of requests and prefix cache, {times}"
        return f"{num.full:,} slots of {slot.full / 1024:.1f} KiB and {sliding}, {times}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """What the memory plan depends on besides the model."""

    tp: int  # ranks that share the model
    world: int | None = None  # that share the experts; None: the same ranks
    ranks: int  # ranks that share this machine's memory on a CPU
    whole_experts: bool = False  # each rank has some whole experts, not a slice of each
    kv: KvMode = PLAIN
    dtype: str
    max_len: int
    num_lanes: int
    num_rows: int | None = None  # maximum sampled rows per step; None: one per request
    batch_max_tokens: int
    graph_tokens: int = 0  # of the largest graph; 0: there are none
    mem_fraction: float
    max_total_token_num: int | None
    asked: WeightTypes = AS_STORED  # requested for linear layers
    moving: int = 0  # tokens held in K/V pages in transit between servers


def plan_memory(spec: ModelSpec, sizes: Sizes, device: torch.device) -> MemoryPlan:
    """Compute how many slots fit into ``mem_fraction`` of the memory besides weights and workspace.

    Weights are measured on a meta model, so this works before they are loaded.

    Raises:
        StartupError: nothing is left for K/V, the given number of slots does not fit, or
            nothing here can run the model.
    """
    if (sizes.num_lanes + 1) * sizes.max_len >= 1 << 31:
        raise StartupError(
            f"--running_max_req_size {sizes.num_lanes:,} times --max_req_total_len "
            f"{sizes.max_len:,} is more than 2^31 positions; lower one of them"
        )
    model = model_on_paper(spec, sizes, device)
    division = division_of(spec, sizes.max_len, model)
    weights = model.nbytes
    moving = sizes.moving * division.slot.full
    work = work_bytes(model, sizes, cuda=device.type == "cuda") + moving
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        # memory that other processes hold on this GPU counts against our share
        share = int(total * sizes.mem_fraction) - (total - free)
        budget = share - weights - work
    else:
        share = int(memory_available() * sizes.mem_fraction / sizes.ranks)
        room = share - weights - work
        budget = room if sizes.max_total_token_num else min(room, CPU_KV_BYTES // sizes.ranks)
    wanted = sizes.max_total_token_num
    num = division.fit(max(budget, 0), wanted)
    fits = num.sliding if division.unbacked else num.full
    if wanted is not None and wanted > fits:
        needed = division.nbytes(division.balanced(wanted))
        raise StartupError(
            f"--max_total_token_num {wanted:,} needs {needed / 2**30:.2f} GiB of KV, but "
            f"{max(budget, 0) / 2**30:.2f} GiB = {fits:,} slots are left of "
            f"{_share(sizes, share, device)} after weights ({weights / 2**30:.2f} GiB) and "
            f"workspace ({work / 2**30:.2f} GiB)"
        )
    if fits < 1:
        # ranks share the memory of a machine; a GPU has its own
        fewer = "--tp, " * (device.type == "cpu" and sizes.ranks > 1)
        more = ""
        if device.type == "cuda":
            plain = sizes.asked == AS_STORED and spec.stored is None
            more = ", or use " + "8-bit weights (--quant_type) or " * plain + "a higher --tp"
        raise StartupError(
            f"no memory is left for KV: weights take {weights / 2**30:.2f} GiB, workspace "
            f"{work / 2**30:.2f} GiB of {_share(sizes, share, device)} (lower {fewer}"
            f"--batch_max_tokens or --running_max_req_size{more})"
        )
    return MemoryPlan(weights, work, num, division, model.site.quantisation.tally, moving)


def _share(sizes: Sizes, share: int, device: torch.device) -> str:
    """What a rank may take, in words."""
    text = f"{max(share, 0) / 2**30:.2f} GiB (--mem_fraction {sizes.mem_fraction}"
    if device.type == "cpu" and sizes.ranks > 1:
        text += f", divided among {sizes.ranks:,} ranks (--tp)"
    return f"{text})"


def division_of(spec: ModelSpec, max_len: int, model: Model) -> SlotDivision:
    """How K/V memory is divided among the slot spaces that ``model`` needs."""
    windows = [layer.window or 0 for layer in drop_idle_windows(spec, max_len).layers]
    return SlotDivision(
        slot=model.site.attention.layout.bytes_per_slot(),
        window=Window(max(windows)) if any(windows) else None,
        max_len=max_len,
    )


def model_on_paper(spec: ModelSpec, sizes: Sizes, device: torch.device) -> Model:
    """A rank's model for ``device``, with tensors without memory."""
    return _on_paper(
        spec,
        sizes.tp,
        sizes.dtype,
        device,
        sizes.max_len,
        kv=sizes.kv,
        whole_experts=sizes.whole_experts,
        world=sizes.world,
        asked=sizes.asked,
    )


def num_parameters(spec: ModelSpec, device: torch.device) -> int:
    """Parameters of the whole model, tied ones counted once."""
    plain = replace(spec, stored=None, gguf=())
    return _on_paper(plain, 1, "fp32", device, 1).nbytes // torch.float32.itemsize


def _on_paper(
    spec: ModelSpec,
    tp: int,
    dtype: str,
    device: torch.device,
    max_len: int,
    *,
    kv: KvMode = PLAIN,
    whole_experts: bool = False,
    world: int | None = None,
    asked: WeightTypes = AS_STORED,
) -> Model:
    """A rank's model on the meta device."""
    return make_model(
        spec,
        _Unmet(tp),
        world=_Unmet(world or tp, (world or tp) // tp),
        dtype=dtype,
        device=device,
        max_len=max_len,
        where=torch.device("meta"),
        kv=kv,
        whole_experts=whole_experts,
        asked=asked,
    )


class _Unmet(SingleRank):
    """Rank 0 of a group that is not connected: enough to measure its share of the weights and the
    shapes that it would gather.

    Args:
        num_groups: number of groups.
    """

    def __init__(self, size: int, num_groups: int = 1) -> None:
        self.size, self._num_groups = size, num_groups

    def gather_last(self, x: Tensor) -> Tensor:
        return x.new_empty(*x.shape[:-1], x.shape[-1] * self.size)

    def gather_tokens(self, x: Tensor) -> Tensor:
        return x.new_empty(self._num_groups * len(x), *x.shape[1:])

    gather_flags = gather_tokens

    def sum_tokens(self, product: Product, x: Tensor) -> Tensor:
        return product(x)[: len(x) // self._num_groups]


def work_bytes(model: Model, sizes: Sizes, *, cuda: bool) -> int:
    """Activations of a full step, float32 logits of all rows (a few copies), tables."""
    rows = min(sizes.num_rows or sizes.num_lanes, sizes.batch_max_tokens)
    counted = 0 if cuda else min(rows, PENALTY_ROWS)  # torch counts tokens in dense rows
    logits = (rows + counted) * model.vocab_size * 4 * 4
    attention = model.site.attention
    num_tables = 3 if all(attention.layout.bytes_per_slot()) else 2
    tables = num_tables * sizes.num_lanes * sizes.max_len * 4 + attention.nbytes
    reserve = 0
    if cuda:  # steps without a graph find no room among the activations of those that have one
        reserve = CUDA_RESERVE + READING_BYTES + model.work_bytes(sizes.graph_tokens)
    return model.work_bytes(sizes.batch_max_tokens) + logits + tables + reserve


def make_device(engine: Engine, num_threads: int) -> CpuDevice | CudaDevice:
    """The device that runs ``engine``'s steps."""
    if engine.device.type == "cuda":
        return CudaDevice(engine)
    return CpuDevice(engine, num_threads)


def warm_up(
    device: CpuDevice | CudaDevice | DryDevice,
    num_tokens: int,
    *,
    max_len: int,
    chunk: int | None = None,
    graphs: bool = True,
    in_step: bool = False,
) -> None:
    """Run each kind of step once, so that no request waits for compilation, and capture the CUDA
    graphs.

    Every rank must call this at the same time. Uses the first lanes and slot 0, which are still
    empty.

    Args:
        num_tokens: of the longest chunk.
        max_len: of a sequence; steps that do not fit are shortened or skipped.
        chunk: tokens of a full step of several requests; None: ``num_tokens``.
        graphs: False: every step is launched kernel by kernel (--disable_cudagraph).
        in_step: groups step together; their plans carry the common step size, which leads to other
            shapes and so to other kernels.
    """
    with log.phase("warm-up steps"):
        _try_steps(device, num_tokens, max_len, in_step)
    if graphs and not isinstance(device, CpuDevice):
        device.capture(chunk or num_tokens)
        with log.phase("steps by graphs"):  # replays load some modules at their first use
            _try_steps(device, 16, max_len, in_step)
    elif device.engine.sharing.costs is not None:
        _try_shared(device, max_len)  # captured with the graphs if there are any
    device.engine.sharing.saved = 0


def _try_shared(device: CpuDevice | CudaDevice | DryDevice, max_len: int) -> None:
    """Run steps whose rows share all tokens but one, in sizes where sharing saves time."""
    most = min(len(device.engine.table) - 1, device.engine.num_rows)
    for num in sorted({min(num, most) for num in (LEAST_ROWS, 4 * LEAST_ROWS, most)}):
        plan = even_plan([1] * num, max_len - 1, num_decode=num)
        shared_lens = i32([0] + [max_len - 1] * (num - 1))
        plan = replace(
            plan, samples=bytearray(num), prefix_order=plan.lanes, shared_lens=shared_lens
        )
        device.launch(plan).wait()


def _try_steps(
    device: CpuDevice | CudaDevice | DryDevice, num_tokens: int, max_len: int, in_step: bool
) -> None:
    greedy = SamplingParams(temperature=0.0)
    drawn = SamplingParams(temperature=1.0, top_p=0.9, logprobs=1)
    plain = SamplingParams(temperature=1.0, logprobs=0)
    changed = SamplingParams(presence_penalty=0.5, logit_bias=((0, 0.5),))
    steps = {greedy: (num_tokens, 16, 1, 1), drawn: (17, 1), plain: (17, 1), changed: (17, 1)}
    for params, sizes in steps.items():
        start = 0
        for i, wanted in enumerate(sizes, 1):
            size = min(wanted, max_len - start - (len(sizes) - i))  # leaves tokens for the rest
            if size < 1:
                continue
            plan = replace(
                even_plan([size], start, num_decode=int(size == 1)),
                opened=[OpenedLane(0, size, params, i32([]))] if start == 0 else [],
                common=size if in_step else 0,
                mixed=in_step and size > 1,
            )
            device.launch(plan).wait()
            start += size
