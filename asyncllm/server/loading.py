"""Loads what a process needs before its actors start: tokenizer, weights, KV, grammars.

Knows no actors. Work on a GPU during the start, by thread and stream:

- the thread of :func:`load_endpoint`, on the GPU's default stream: parameters, K/V and tables are
  allocated and zeroed. The stream of steps begins behind that (``CudaDevice``).
- "weights" and its readers, on the default stream: copies, quantising, preparing products. The
  thread waits for all of it before it ends.
- "warm-up", at the same time, on the stream of steps: steps and the capture of graphs. What they
  compute of weights that are not there yet is not used.
- the first thread again, when both have ended, on the stream of steps: steps that are measured.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import cast

import torch

from asyncllm import log, templates
from asyncllm.actors.kv_listener import KvListener
from asyncllm.api.common.chat_template import USED
from asyncllm.api.parsing import reasoning, tools
from asyncllm.api.parsing.output_parser import Dialect, dialect_of
from asyncllm.config import Config, ResolvedConfig, quantisation
from asyncllm.constrain.factory import ConstraintFactory, unconstrained
from asyncllm.constrain.llguidance_backend import GrammarEngine
from asyncllm.constrain.reasoning import ReasoningMarks
from asyncllm.constrain.vocabulary import Vocabulary
from asyncllm.core.speculation import step_rows
from asyncllm.core.step_times import StepTimes
from asyncllm.core.windows import NO_SLOTS, PerSpace, Window
from asyncllm.engine.build import MemoryPlan, Sizes, build_model, make_device, plan_memory, warm_up
from asyncllm.engine.device import CpuDevice, CudaDevice
from asyncllm.engine.engine import Engine
from asyncllm.engine.graphs import decode_sizes, mixed_sizes
from asyncllm.engine.kernel_recording import DryDevice
from asyncllm.engine.parallel import Group, Ranks, SingleRank
from asyncllm.engine.step_timing import measure
from asyncllm.environment import cores_each
from asyncllm.errors import StartupError
from asyncllm.models import rope
from asyncllm.models.checkpoint import weight_files
from asyncllm.models.kv_format import KvMode
from asyncllm.models.model import Model
from asyncllm.models.quantization import REPACKED
from asyncllm.models.spec import ModelSpec
from asyncllm.server import preflight, transfer
from asyncllm.server.compile_helper import CompileHelper
from asyncllm.server.launch import Boot
from asyncllm.templates import TemplateSet
from asyncllm.text import Mode, ModelTokenizer, load_tokenizer, with_controls
from asyncllm.topology import KV_TRANSFER, MASTER, Topology

STOP_S = 1.0  # for one side of the start to end when the other has failed

logger = logging.getLogger(__name__)


class Stopped(Exception):
    """Weights are read no further, since the start has failed elsewhere."""


@dataclass(slots=True)
class Loaded:
    """What a process has loaded; the actors are made from it."""

    boot: Boot
    spec: ModelSpec
    text: ModelTokenizer | None  # on leaders and processes that serve HTTP, as are the next two
    dialect: Dialect | None
    chats: TemplateSet | None
    device: CpuDevice | CudaDevice | None
    ranks: Ranks | None  # None: there is only one
    num_slots: PerSpace = NO_SLOTS
    window: Window | None = None  # for layers with a separate slot space
    # on leaders and masters, unless constrained output is off
    grammars: GrammarEngine | None = None
    constraints: ConstraintFactory | None = None  # on leaders
    linears: tuple[tuple[str, int], ...] = ()  # on ranks: (kind of weights, number)
    times: StepTimes = field(default_factory=StepTimes)  # of a leader's steps
    listener: KvListener | None = None  # on ranks that receive K/V from other servers


# -- start ---------------------------------------------------------------------------------------


def memory_plan(boot: Boot, spec: ModelSpec) -> MemoryPlan:
    return plan_memory(spec, sizes_of(boot), torch_device(boot))


def sizes_of(boot: Boot) -> Sizes:
    """The sizes that the memory plan is based on."""
    config, resolved = boot.config, boot.resolved
    return Sizes(
        tp=len(boot.group),
        world=len(boot.topology.ranks) if boot.topology.in_step else None,
        ranks=len(boot.topology.ranks),
        whole_experts=config.enable_ep_moe,
        kv=KvMode.named(resolved.kv_mode),
        asked=quantisation.from_text(resolved.quant),
        dtype=resolved.dtype,
        max_len=resolved.max_req_total_len,
        num_lanes=resolved.running_max_req_size,
        num_rows=most_rows(boot),
        batch_max_tokens=resolved.batch_max_tokens,
        graph_tokens=_graph_tokens(boot),
        mem_fraction=config.mem_fraction,
        max_total_token_num=config.max_total_token_num,
        moving=moving_tokens(config) if KV_TRANSFER in boot.me.roles else 0,
    )


def _graph_tokens(boot: Boot) -> int:
    """Tokens of the largest CUDA graph; 0: there are none."""
    if boot.config.disable_cudagraph:
        return 0
    sizes = mixed_sizes(boot.resolved.chunked_prefill_size), decode_sizes(most_rows(boot))
    return max(size[-1] for size in sizes)


def moving_tokens(config: Config) -> int:
    """Tokens in all pages of K/V in transit, and in one more for what nobody reads any longer."""
    return (config.pd_kv_page_num + 1) * config.pd_kv_page_size


def most_rows(boot: Boot) -> int:
    """Maximum one-token rows of a step: one per request, plus drafts, within the step's tokens."""
    config, rows = boot.config, boot.resolved.running_max_req_size
    if config.speculative != "none":
        rows = step_rows(rows, config.speculative_tokens)
    return min(rows, boot.resolved.batch_max_tokens)


def rope_notes(spec: ModelSpec, max_len: int) -> list[str]:
    """Notes on RoPE settings that follow from the longest request."""
    return rope.notes((layer.rope for layer in spec.layers), max_len)


def load_text(config: Config, model_dir: str, spec: ModelSpec) -> ModelTokenizer:
    mode = cast("Mode", config.tokenizer_mode)
    with log.phase("load tokenizer"):
        return load_tokenizer(model_dir, mode, config.trust_remote_code, spec.vocab_size)


def torch_device(boot: Boot) -> torch.device:
    if boot.resolved.device == "cuda" and boot.me.device is not None:
        return torch.device("cuda", boot.me.device)
    return torch.device("cpu")


def num_threads(boot: Boot) -> int:
    """Threads for a rank's CPU computations: the node's ranks share its cores."""
    ours = [rank for rank in boot.topology.ranks if rank.node == boot.me.node]
    return cores_each(len(ours))


def load_endpoint(
    boot: Boot,
    spec: ModelSpec,
    text: ModelTokenizer | None = None,
    ahead: CompileHelper | None = None,
) -> Loaded:
    """Load what this process needs: tokenizer, and weights and K/V on a tp rank. Blocks.

    Everything that may refuse the start is checked before loading weights, which takes long.

    Args:
        text: the tokenizer, if it is loaded already.
        ahead: the helper that compiles this node's kernels.
    """
    if boot.me.device is None:
        return _load_requests(boot, spec, text)
    where = torch_device(boot)
    _use(where)
    ranks: Ranks | None = None
    with ThreadPoolExecutor(1, "requests") as thread:  # which mostly waits for a helper
        requests = thread.submit(_load_requests, boot, spec, text)
        if len(boot.topology.ranks) > 1:
            with log.phase("meet the other ranks"):
                ranks = preflight.join_ranks(boot, where)
        with log.phase("plan memory"):
            plan = memory_plan(boot, spec)
        loaded = requests.result()
    listener = None
    if KV_TRANSFER in boot.me.roles:
        transfer.refuse(boot, plan.window)
        listener = transfer.open_kv_listener(boot)
    if ranks is not None:  # equal in all groups: any of them may get any request
        plan = replace(plan, num=PerSpace(*map(ranks.minimum, plan.num)))
    resolved = boot.resolved.with_slots(plan.num.full)
    if boot.coordinates:
        _log_plan(boot, spec, resolved, plan)
    boot = replace(boot, resolved=resolved)
    device, times = _load_device(boot, spec, ranks, where, plan, ahead)
    return replace(
        loaded,
        boot=boot,
        device=device,
        ranks=ranks,
        num_slots=plan.num,
        times=times,
        window=plan.window,
        linears=plan.linears.counts(resolved.dtype),
        listener=listener,
    )


def _log_plan(boot: Boot, spec: ModelSpec, resolved: ResolvedConfig, plan: MemoryPlan) -> None:
    """Log what is known only now, once for the whole server."""
    for note in (
        *resolved.notes[len(boot.resolved.notes) :],
        *rope_notes(spec, resolved.max_req_total_len),
        plan.text(resolved.max_req_total_len),
        plan.linears.text(resolved.dtype),
    ):
        logger.info("%s", note)
    for line in plan.linears.warnings(resolved.dtype):
        logger.warning("%s", line)


def _load_requests(boot: Boot, spec: ModelSpec, text: ModelTokenizer | None) -> Loaded:
    """What becomes of requests before and after the model, where this process does that."""
    leads = boot.me.device is not None and boot.topology.leads(boot.endpoint)
    if text is None and (boot.listen_fd >= 0 or leads):
        text = load_text(boot.config, boot.model_dir, spec)
    loaded = Loaded(boot, spec, None, None, None, None, None)
    if text is not None:
        loaded = with_chats(loaded, text)
    if leads or MASTER in boot.me.roles:
        load_constrained_decoding(loaded)
    return loaded


def load_constrained_decoding(loaded: Loaded) -> None:
    """Load the constrained-decoding backend. Raises StartupError."""
    assert loaded.text is not None
    assert loaded.dialect is not None
    config, eos_ids = loaded.boot.config, loaded.boot.resolved.eos_ids
    model = loaded.text, loaded.dialect, loaded.spec.vocab_size, eos_ids
    with log.phase("load grammars"):
        if config.output_constraint_mode != "none":
            loaded.grammars = load_grammars(*model)
        loaded.constraints = load_constraints(
            *model, grammars=loaded.grammars, heals=config.token_healing_mode
        )


def with_chats(loaded: Loaded, text: ModelTokenizer) -> Loaded:
    """``loaded`` with the tokenizer, the model's output format and its chat renderer.

    A template that does not compile disables chats only.

    Raises:
        StartupError: control tokens in content must be text, but cannot be distinguished.
    """
    config = loaded.boot.config
    known = config.tool_call_parser, config.reasoning_parser
    reason = ""
    used = {name: text.templates[name] for name in USED if name in text.templates}
    if config.control_tokens_in_content == "text" and used:
        try:
            text = with_controls(text)
        except StartupError as error:
            reason = str(error)
    chats = TemplateSet(used, text.special_tokens, text.controls)
    with log.phase("read chat templates"):
        try:
            dialect, mixes = templates.read_dialect(chats, *known)
        except StartupError as error:
            chats = replace(chats, templates={}, controls=None, fault=str(error))
            dialect, mixes = dialect_of({}, *known), False
    if mixes:
        reason = "the chat template changes what users or tools say, so that marks in it are lost"
        chats, text = replace(chats, controls=None), replace(text, controls=None)
    if reason and "control_tokens_in_content" in config.explicit:
        raise StartupError(f"--control_tokens_in_content text: {reason}")
    if loaded.boot.coordinates:
        for line in _about_chats(chats.fault, reason):
            logger.warning("%s", line)
    return replace(loaded, text=text, dialect=dialect, chats=chats)


def _about_chats(fault: str, reason: str) -> Iterator[str]:
    if fault:
        yield f"chats are refused, other prompts are not: {fault}"
    if reason:
        yield (
            f"control tokens that users and tools spell are taken for these tokens "
            f"(--control_tokens_in_content token): {reason}"
        )


def share_memory(topology: Topology, group: int) -> bool:
    """Whether all ranks that sum with those of a group are on one node."""
    together = topology.ranks if topology.in_step else topology.group(group)
    return len({rank.node for rank in together}) == 1


def _load_device(
    boot: Boot,
    spec: ModelSpec,
    ranks: Ranks | None,
    where: torch.device,
    plan: MemoryPlan,
    ahead: CompileHelper | None,
) -> tuple[CpuDevice | CudaDevice, StepTimes]:
    """Ready for steps; with the times of some."""
    group = SingleRank() if ranks is None else ranks.group
    torch.set_num_threads(num_threads(boot))
    files = weight_files(Path(boot.model_dir), boot.config.load_way)
    total = sum(f.stat().st_size for f in files)
    bar = log.ProgressBar("load weights", total)

    stays, later = _stays(spec, plan, where), list[Callable[[], None]]()
    failed = threading.Event()

    def advance(done: int, _: int) -> None:
        if failed.is_set():
            raise Stopped
        bar.advance(done - bar.done_bytes)

    def load(read: Callable[[], None]) -> None:
        _use(where)
        with log.phase("load weights"), bar:
            read()
            if where.type == "cuda":
                torch.cuda.current_stream(where).synchronize()

    begin = later.append if stays else load
    model = _model_of(boot, spec, ranks, where, progress=advance, begin=begin)
    with log.phase("allocate KV"):
        device = make_device(engine_of(boot, model, group, plan.num), num_threads(boot))

    def prepare() -> None:
        _use(where)
        if ahead is not None:
            with log.phase("wait for kernels"):
                ahead.wait()
        if ranks is not None:
            ranks.minimum(0)  # no rank compiles what the helper is still compiling
        with log.phase("warm up"):
            warm(boot, device)

    run_beside([partial(load, read) for read in later], prepare, failed)
    with log.phase("measure steps"):
        times = StepTimes([] if boot.topology.in_step else measure(device, *_longest(boot)))
    return device, times


def _model_of(
    boot: Boot,
    spec: ModelSpec,
    ranks: Ranks | None,
    where: torch.device,
    *,
    progress: Callable[[int, int], None],
    begin: Callable[[Callable[[], None]], object],
) -> Model:
    """The model of a rank; ``progress`` and ``begin`` as of :func:`build_model`."""
    resolved = boot.resolved
    return build_model(
        Path(boot.model_dir),
        spec,
        SingleRank() if ranks is None else ranks.group,
        dtype=resolved.dtype,
        device=where,
        max_len=resolved.max_req_total_len,
        load_way=boot.config.load_way,
        whole_experts=boot.config.enable_ep_moe,
        kv=KvMode.named(resolved.kv_mode),
        asked=quantisation.from_text(resolved.quant),
        world=None if ranks is None else ranks.world,
        symmetric=not boot.config.disable_symm_mem_allreduce
        and share_memory(boot.topology, boot.me.group),
        progress=progress,
        begin=begin,
    )


def _use(where: torch.device) -> None:
    """This thread launches on our device; others begin with the first one."""
    if where.type == "cuda":
        torch.cuda.set_device(where)


def run_beside(
    reading: Sequence[Callable[[], None]], warm_up: Callable[[], None], failed: threading.Event
) -> None:
    """Read weights and warm up at the same time, in a thread each.

    The first error is raised as soon as there is one. Reading ends when ``failed`` is set; a
    warm-up cannot be interrupted, and is left to end with the process.
    """
    names = [*["weights"] * len(reading), "warm-up"]
    pools = [ThreadPoolExecutor(1, name) for name in names]
    sides = [pool.submit(run) for pool, run in zip(pools, [*reading, warm_up], strict=True)]
    for pool in pools:
        pool.shutdown(wait=False)
    ended, _ = wait(sides, return_when=FIRST_EXCEPTION)
    failed.set()
    wait(sides[:-1], STOP_S)  # their progress bar ends before the error is told
    for side in ended:
        side.result()


def _stays(spec: ModelSpec, plan: MemoryPlan, where: torch.device) -> bool:
    """Whether weights stay where they are from the beginning, so that graphs can be captured while
    they are read: on a GPU, if none are repacked."""
    return (
        where.type == "cuda" and not spec.has_experts and REPACKED.isdisjoint(plan.linears.served)
    )


def engine_of(boot: Boot, model: Model, group: Group, num: PerSpace) -> Engine:
    """The engine of a rank; ``num``: its slots."""
    resolved = boot.resolved
    return Engine(
        model,
        group,
        num_slots=num.full,
        num_sliding=None if num.full == num.sliding else num.sliding,
        num_lanes=resolved.running_max_req_size,
        num_rows=most_rows(boot),
        max_len=resolved.max_req_total_len,
        eos_ids=resolved.eos_ids,
        shares_prefixes=not (
            boot.config.disable_shared_prefix_attention or boot.config.disable_dynamic_prompt_cache
        ),
    )


def warm(boot: Boot, device: CpuDevice | CudaDevice | DryDevice) -> None:
    """Warm a rank's device up."""
    num_tokens, max_len = _longest(boot)
    warm_up(
        device,
        num_tokens,
        max_len=max_len,
        chunk=boot.resolved.chunked_prefill_size,
        graphs=not boot.config.disable_cudagraph,
        in_step=boot.topology.in_step,
    )


def _longest(boot: Boot) -> tuple[int, int]:
    """Tokens of a chunk and of a sequence in the warm-up."""
    resolved = boot.resolved
    max_len = resolved.max_req_total_len
    return min(resolved.chunked_prefill_size, max_len // 2), max_len


def load_grammars(
    text: ModelTokenizer, dialect: Dialect, vocab_size: int, eos_ids: Sequence[int]
) -> GrammarEngine:
    """Grammars of the model's tokens; special ones are not text, except for the marks of calls."""
    marks = tools.special_tokens(dialect.calls)
    encode = partial(text.encode, add_special_tokens=False)
    return GrammarEngine(text.pieces, vocab_size, eos_ids, text.special, marks, encode)


def load_constraints(
    text: ModelTokenizer,
    dialect: Dialect,
    vocab_size: int,
    eos_ids: tuple[int, ...],
    *,
    grammars: GrammarEngine | None,
    heals: bool,
) -> ConstraintFactory:
    """The factory of requests' constraints.

    Args:
        grammars: None: constrained output is off.
        heals: for --token_healing_mode.

    Raises:
        StartupError: tokens cannot be healed.
    """
    if heals and text.table is None:
        raise StartupError(
            "--token_healing_mode: this tokenizer's tokens have no text of their own"
        )
    style, vocab, thinking = dialect.reasoning, None, None
    if style or heals:
        vocab = Vocabulary(text.pieces, vocab_size, text.special)
        if style:
            thinking = ReasoningMarks(vocab, reasoning.tags(style, frozenset(text.pieces)), eos_ids)
    return ConstraintFactory(
        vocab_size,
        eos_ids,
        unconstrained if grammars is None else grammars.constrain,
        thinking,
        vocab,
    )
