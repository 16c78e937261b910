"""Entry of every process of a server: prepare, load, place the actors, run, leave with a code.

The placement table says which actors live where; nothing else here knows what they do.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn, cast

import torch
import uvloop

from asyncllm import __version__, log
from asyncllm.actors.allocator import Allocator
from asyncllm.actors.base import Actor
from asyncllm.actors.detokenizer import Detokenizer
from asyncllm.actors.frontend import Frontend, Limits
from asyncllm.actors.gate import Access
from asyncllm.actors.grammar import GrammarKeeper
from asyncllm.actors.runner import Runner
from asyncllm.actors.scheduler import Scheduler
from asyncllm.actors.system import ActorSystem
from asyncllm.actors.tokenizer import Tokenizer
from asyncllm.actors.watchdog import EXIT_HUNG, Duty, Means, Watchdog, dump_stacks
from asyncllm.api.answer import Vocab
from asyncllm.api.chat import variables
from asyncllm.api.generation import Served
from asyncllm.api.parts import Dialect, dialect_of
from asyncllm.config import FLAGS, Config, Resolved, resolve_limits
from asyncllm.constraining import load_constraints, load_grammars
from asyncllm.core.constraints import Constraints
from asyncllm.engine.build import MemoryPlan, Sizes, build_model, make_device, plan_memory, warm_up
from asyncllm.engine.device import CpuDevice, CudaDevice
from asyncllm.engine.engine import Engine
from asyncllm.engine.grammar import Grammars
from asyncllm.engine.jit_monitor import JitMonitor
from asyncllm.engine.parallel import Alone, Group, TensorParallel
from asyncllm.environment import CUDA_VISIBLE, cache_dir, cpu_count, cuda_visible
from asyncllm.errors import FatalError, StartupError
from asyncllm.hub import resolve_model_dir
from asyncllm.launch import (
    Boot,
    Children,
    Wires,
    bind_http,
    die_with_parent,
    endpoint_name,
    rendezvous,
    tls_context,
)
from asyncllm.messages import Drain
from asyncllm.models.registry import check_architecture
from asyncllm.models.spec import ModelSpec
from asyncllm.text import Mode, Text, load_tokenizer

EXIT_STARTUP = 2
CULPRIT_S = 1.0
SWITCH_INTERVAL_S = 0.0005  # a helper thread that needs the GIL must not hold the loop for 5 ms

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Parts:
    """What a process has loaded; the actors are made from it."""

    boot: Boot
    spec: ModelSpec
    text: Text | None
    device: CpuDevice | CudaDevice | None
    group: Group
    num_slots: int
    grammars: Grammars | None = None  # of rank 0, unless constrained output is off
    constraints: Constraints | None = None  # of rank 0


# -- start ---------------------------------------------------------------------------------------


def serve(config: Config) -> int:
    """Run a whole server from rank 0 until it is told to stop; the exit code.

    Raises:
        StartupError: it cannot start as configured.
    """
    tls_context(config)
    with contextlib.ExitStack() as stack:
        sock = stack.enter_context(bind_http(config.host, config.port))  # before any download
        model_dir = resolve_model_dir(config.model_dir, cache_dir())
        spec = ModelSpec.from_dir(model_dir)
        check_architecture(spec.architecture)
        resolved = _resolve(config, spec, model_dir)
        for note in resolved.notes:
            logger.info("%s", note)
        wires = Wires(config.zmq_mode, config.tp + config.httpserver_workers - 1)
        stack.callback(wires.close)
        boot = Boot(
            endpoint=0,
            endpoints=wires.addresses,
            config=config,
            resolved=resolved,
            model_dir=str(model_dir),
            rendezvous=rendezvous(config) if config.tp > 1 else "",
            listen_fd=sock.fileno(),
            parent=0,
        )
        if config.check:
            return _check(boot, spec)
        return uvloop.run(_Server(boot, spec, wires).run())


def _resolve(config: Config, spec: ModelSpec, model_dir: Path) -> Resolved:
    cuda = torch.cuda.is_available()
    if config.device == "cuda" and not cuda:
        raise StartupError("--device cuda: torch finds no CUDA device (--device cpu)")
    device = "cuda" if cuda and config.device != "cpu" else "cpu"
    if device == "cuda" and config.tp > torch.cuda.device_count():
        hidden = f" ({CUDA_VISIBLE}={cuda_visible()})" if cuda_visible() is not None else ""
        raise StartupError(
            f"--tp {config.tp} needs as many GPUs, {torch.cuda.device_count()} are visible{hidden}"
        )
    if max(config.eos_id, default=0) >= spec.vocab_size:
        raise StartupError(
            f"--eos_id {max(config.eos_id)} is not below the vocabulary size {spec.vocab_size}"
        )
    return resolve_limits(
        config,
        device="cuda" if device == "cuda" else "cpu",
        checkpoint_dtype=spec.dtype,
        model_limit=spec.max_position,
        model_eos=spec.eos_ids,
        model_dir_name=model_dir.name,
    )


def _check(boot: Boot, spec: ModelSpec) -> int:
    """``--check``: what would be started, on standard output."""
    plan, config = _memory(boot, spec), boot.config
    resolved = boot.resolved.with_slots(plan.num_slots)
    _load_text(boot)  # what the start would refuse is refused here as well
    ranks = f"{config.tp} rank{'s' * (config.tp > 1)}"
    if resolved.device == "cpu":
        ranks += f", {_num_threads(boot)} threads each"
    ports = [f"{'HTTPS' if config.ssl_certfile else 'HTTP'} {config.host}:{config.port}"]
    if boot.rendezvous:
        ports.append(f"torch.distributed {boot.rendezvous}")
    limits = (
        "max_req_total_len", "running_max_req_size", "batch_max_tokens", "chunked_prefill_size",
        "eos_ids",
    )  # fmt: skip
    lines = [
        f"model: {boot.model_dir}, {spec.architecture}, {spec.num_parameters():,} weights",
        f"served as: {', '.join(resolved.served_names)}",
        f"device: {resolved.device}, {resolved.dtype}, {ranks}; {config.httpserver_workers} for HTTP",
        plan.text(resolved.max_req_total_len),
        f"ports: {', '.join(ports + [a for a in boot.endpoints if a.startswith('tcp')])}",
        *(f"note: {note}" for note in resolved.notes),
        "limits:",
        *(f"  {name} = {getattr(resolved, name)}" for name in limits),
    ]
    for title, given in (("options given:", True), ("options by default:", False)):
        names = [n for n in FLAGS if (n in config.explicit) == given]
        lines += [title, *(f"  {name} = {_shown(name, getattr(config, name))}" for name in names)]
    sys.stdout.write("\n".join(lines) + "\n")
    return 0


def _shown(name: str, value: Any) -> str:
    if FLAGS[name].secret:
        return f"{len(value)} given"
    if isinstance(value, tuple):
        return " ".join(map(str, value)) or "-"
    if isinstance(value, bool):
        return "on" if value else "off"
    return "-" if value is None else str(value)


def _memory(boot: Boot, spec: ModelSpec) -> MemoryPlan:
    config, resolved = boot.config, boot.resolved
    sizes = Sizes(
        tp=config.tp,
        dtype=resolved.dtype,
        max_len=resolved.max_req_total_len,
        num_lanes=resolved.running_max_req_size,
        batch_max_tokens=resolved.batch_max_tokens,
        mem_fraction=config.mem_fraction,
        max_total_token_num=config.max_total_token_num,
    )
    return plan_memory(spec, sizes, _torch_device(boot))


def _load_text(boot: Boot) -> Text:
    mode = cast("Mode", boot.config.tokenizer_mode)
    return load_tokenizer(boot.model_dir, mode, boot.config.trust_remote_code)


def _torch_device(boot: Boot) -> torch.device:
    if boot.resolved.device == "cuda":
        return torch.device("cuda", boot.endpoint)
    return torch.device("cpu")


def _num_threads(boot: Boot) -> int:
    return max(1, cpu_count() // boot.config.tp)


# -- load ----------------------------------------------------------------------------------------


def load_parts(boot: Boot, spec: ModelSpec) -> Parts:
    """Load what this process needs: tokenizer, and weights and K/V on a tp rank. Blocks."""
    config = boot.config
    text = None
    if boot.listen_fd >= 0:
        with log.phase("load tokenizer"):
            text = _load_text(boot)
    if boot.endpoint >= config.tp:
        return Parts(boot, spec, text, None, Alone(), boot.resolved.num_slots)
    where = _torch_device(boot)
    if where.type == "cuda":
        torch.cuda.set_device(where)  # what is launched from this thread goes to our device
    group: Group = Alone()
    if config.tp > 1:
        with log.phase("meet the other ranks"):
            group = TensorParallel(boot.endpoint, config.tp, boot.rendezvous, where)
    plan = _memory(boot, spec)
    num_slots = group.minimum(plan.num_slots)
    resolved = boot.resolved.with_slots(num_slots)
    if boot.endpoint == 0:
        for note in resolved.notes[len(boot.resolved.notes) :]:
            logger.info("%s", note)
        logger.info("%s", replace(plan, num_slots=num_slots).text(resolved.max_req_total_len))
    boot = replace(boot, resolved=resolved)
    device = _load_device(boot, spec, group, where, num_slots)
    parts = Parts(boot, spec, text, device, group, num_slots)
    if boot.endpoint == 0 and text is not None:
        _load_constraints(parts, text)
    return parts


def _load_constraints(parts: Parts, text: Text) -> None:
    config, eos_ids = parts.boot.config, parts.boot.resolved.eos_ids
    model = text, _dialect(parts.boot, text), parts.spec.vocab_size, eos_ids
    with log.phase("load grammars"):
        if config.output_constraint_mode != "none":
            parts.grammars = load_grammars(*model)
        parts.constraints = load_constraints(
            *model, grammars=parts.grammars, heals=config.token_healing_mode
        )


def _dialect(boot: Boot, text: Text) -> Dialect:
    config = boot.config
    dialect = dialect_of(text.templates, config.tool_call_parser, config.reasoning_parser)
    return replace(dialect, variables=variables(text.templates, text.special_tokens))


def _load_device(
    boot: Boot, spec: ModelSpec, group: Group, where: torch.device, num_slots: int
) -> CpuDevice | CudaDevice:
    resolved = boot.resolved
    torch.set_num_threads(_num_threads(boot))
    total = sum(f.stat().st_size for f in Path(boot.model_dir).glob("*.safetensors"))
    with log.phase("load weights"), log.Progress("load weights", total) as bar:
        model = build_model(
            Path(boot.model_dir),
            spec,
            group,
            dtype=resolved.dtype,
            device=where,
            max_len=resolved.max_req_total_len,
            symmetric=not boot.config.disable_symm_mem_allreduce,
            progress=lambda done, _: bar.advance(done - bar.done_bytes),
        )
    with log.phase("allocate KV"):
        engine = Engine(
            model,
            group,
            num_slots=num_slots,
            num_lanes=resolved.running_max_req_size,
            max_len=resolved.max_req_total_len,
            eos_ids=resolved.eos_ids,
        )
        device = make_device(engine, _num_threads(boot))
    with log.phase("warm up"):
        chunk = min(resolved.chunked_prefill_size, resolved.max_req_total_len // 2)
        warm_up(device, chunk, graphs=not boot.config.disable_cudagraph)
    return device


# -- placement -----------------------------------------------------------------------------------


def _allocator(p: Parts) -> Actor[Any]:
    return Allocator(p.num_slots, use_tree=not p.boot.config.disable_dynamic_prompt_cache)


def _scheduler(p: Parts) -> Actor[Any]:
    resolved = p.boot.resolved
    assert p.constraints is not None
    return Scheduler(
        num_lanes=resolved.running_max_req_size,
        num_slots=p.num_slots,
        batch_max_tokens=resolved.batch_max_tokens,
        chunked_prefill_size=resolved.chunked_prefill_size,
        eos_ids=resolved.eos_ids,
        runners=range(p.boot.config.tp),
        share_prompts=p.boot.config.diverse_mode,
        constrain=p.constraints.of,
    )


def _runner(p: Parts) -> Actor[Any]:
    assert p.device is not None
    monitor = JitMonitor()
    if p.boot.resolved.device == "cuda":
        monitor.arm()
    return Runner(p.device, reports=p.boot.endpoint == 0, jit_after_warmup=lambda: monitor.count)


def _detokenizer(p: Parts) -> Actor[Any]:
    assert p.text is not None
    return Detokenizer(p.text)


def _tokenizer(p: Parts) -> Actor[Any]:
    assert p.text is not None
    resolved = p.boot.resolved
    return Tokenizer(
        p.text,
        limit=resolved.max_req_total_len,
        vocab_size=p.spec.vocab_size,
        input_limit=resolved.max_req_input_len,
        truncation=p.boot.config.long_truncation_mode,
        heals=p.boot.config.token_healing_mode,
    )


def _frontend(p: Parts, on_open: Callable[[], None]) -> Actor[Any]:
    assert p.text is not None
    config, resolved, text = p.boot.config, p.boot.resolved, p.text
    pieces = text.pieces
    num_frontends = config.httpserver_workers
    return Frontend(
        served=Served(
            name=resolved.served_names[0],
            listed=resolved.served_names[:1] + config.served_model_name[1:],
            accepted=frozenset(resolved.served_names),
            model_name=resolved.model_name,
            max_len=resolved.max_req_total_len,
            vocab_size=p.spec.vocab_size,
            created=int(time.time()),
            tgi=config.use_tgi_api,
            dialect=_dialect(p.boot, text),
        ),
        vocab=Vocab(
            piece=lambda i: pieces[i] if i < len(pieces) else b"",
            decode=text.decode,
            special=text.special,
        ),
        sockets=[socket.socket(fileno=os.dup(p.boot.listen_fd))],
        limits=Limits(
            max_live=-(-(resolved.running_max_req_size + config.max_waiting) // num_frontends),
            keep_alive_s=config.sse_keep_alive,
        ),
        access=Access(
            keys=config.api_key, origins=config.cors_allow_origins, tls=tls_context(config)
        ),
        info=_info(p),
        peers=(0, *range(config.tp, config.tp + num_frontends - 1)),
        on_open=on_open,
    )


def _info(p: Parts) -> dict[str, Any]:
    """All options but the secret ones, as they were resolved."""
    config, resolved = p.boot.config, p.boot.resolved
    values = {name: getattr(config, name) for name in FLAGS if not FLAGS[name].secret}
    values |= {name: getattr(resolved, name) for name in values if hasattr(resolved, name)}
    return values | {"max_total_token_num": resolved.num_slots, "version": __version__}


# Names in order of start; they stop in reverse, so that the frontend's last answers still find
# the others.
PLACEMENT: dict[str, tuple[str, ...]] = {
    "leader": (
        "allocator", "grammar", "scheduler", "runner", "detokenizer", "tokenizer", "frontend",
        "watchdog",
    ),
    "follower": ("runner", "watchdog"),
    "http": ("detokenizer", "tokenizer", "frontend", "watchdog"),
}  # fmt: skip


def role(endpoint: int, tp: int) -> str:
    """The row of the placement table for an endpoint."""
    if endpoint == 0:
        return "leader"
    return "follower" if endpoint < tp else "http"


class _Server:
    """One process of the server, from load to exit."""

    def __init__(self, boot: Boot, spec: ModelSpec, wires: Wires | None) -> None:
        self._boot, self._spec, self._wires = boot, spec, wires
        self._system: ActorSystem | None = None
        self._children: Children | None = None
        self._leaving = threading.Lock()

    async def run(self) -> int:
        """Load, run the actors until they stop; the exit code."""
        loop = asyncio.get_running_loop()
        leads = self._boot.endpoint == 0
        if leads:
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.add_signal_handler(number, self._signalled)
            self._children = Children(self._child_died)
            for endpoint in range(1, self._boot.config.tp):
                self._start_child(endpoint)
        try:
            parts = await self._load()
            if leads and self._boot.listen_fd >= 0:
                self._start_workers(parts)
            await self._run_actors(parts)
        except FatalError as error:
            await self._wait_for_culprit()
            logger.critical("%s ends: %s", self._boot.name, error)
            self._abandon(1)
        except StartupError:
            self._stop_children()
            raise
        if self._children:
            await self._children.close()
        parts.group.close()
        return 0

    async def _load(self) -> Parts:
        loop = asyncio.get_running_loop()
        try:
            return await loop.run_in_executor(None, load_parts, self._boot, self._spec)
        except (torch.OutOfMemoryError, MemoryError) as error:
            raise StartupError(
                f"out of memory while loading: {error} (--mem_fraction, --max_total_token_num, --tp)"
            ) from None
        except RuntimeError:
            await self._wait_for_culprit()
            raise

    async def _wait_for_culprit(self) -> None:
        """A collective also fails because a child died; ``_child_died`` then has the reason."""
        if self._children:
            await self._children.wait(CULPRIT_S)
        self._stop_children()

    def _stop_children(self) -> None:
        if self._children:
            self._children.kill()

    def _start_child(self, endpoint: int, **changes: Any) -> None:
        assert self._children is not None
        boot = replace(
            self._boot, endpoint=endpoint, parent=os.getpid(), **{"listen_fd": -1, **changes}
        )
        self._children.start(boot, _num_threads(boot))

    def _start_workers(self, parts: Parts) -> None:
        """HTTP workers start last: they must know the limits that the K/V size decides."""
        config = self._boot.config
        for i in range(config.httpserver_workers - 1):
            self._start_child(
                config.tp + i, listen_fd=self._boot.listen_fd, resolved=parts.boot.resolved
            )

    async def _run_actors(self, parts: Parts) -> None:
        boot = parts.boot
        system = ActorSystem(boot.endpoint, list(boot.endpoints) or None)
        self._system = system
        means = Means(exit=self._abandon)
        for actor in place(parts, means, self._ready if boot.endpoint == 0 else lambda: None):
            system.add(actor)
        gc.collect()
        gc.freeze()  # a full collection over what start-up made would stop the loop for 100 ms
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        await system.run()

    def _ready(self) -> None:
        boot = self._boot
        names = boot.resolved.served_names
        host = boot.config.host
        host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, host)
        scheme = "https" if boot.config.ssl_certfile else "http"
        url = f"{scheme}://{host}:{boot.config.port}"
        body = f'{{"model": "{names[0]}", "stream": true, "temperature": 0, "max_tokens": 100, '
        body += '"messages": [{"role": "user", "content": "Why is the sky blue?"}]}'
        key = " -H 'Authorization: Bearer KEY'" if boot.config.api_key else ""
        sys.stdout.write(
            f"asyncllm is ready: {url} serves {names[0]}\n"
            f"curl -N {url}/v1/chat/completions -H 'Content-Type: application/json'{key} -d '{body}'\n"
        )
        sys.stdout.flush()

    def _signalled(self) -> None:
        if self._system is None:
            logger.info("stopped while starting")
            self._abandon(0)
        else:
            drain = Drain(self._boot.config.drain_timeout)
            self._system.ref("watchdog").tell(drain, urgent=True)

    def _child_died(self, name: str, code: int) -> None:
        """The server is one: what remains of it cannot serve."""
        if code == 0 and self._system is not None and self._system.over:
            return  # it was told to end
        logger.critical("%s ended with exit code %d: stopping the server", name, code)
        if code == EXIT_HUNG:
            dump_stacks()  # a collective hangs everywhere; this may be the side that shows why
        self._abandon(code if code in (EXIT_STARTUP, EXIT_HUNG) else 1)

    def _abandon(self, code: int) -> NoReturn:
        """Leave at once: other threads may hang in a collective or on a device. From any thread."""
        self._leaving.acquire()  # never released: the first reason counts
        self._stop_children()
        if self._wires:
            self._wires.close()
        sys.stdout.flush()
        logging.shutdown()
        os._exit(code)


def place(parts: Parts, means: Means, on_open: Callable[[], None]) -> list[Actor[Any]]:
    """The actors of this process, in order of start.

    Args:
        means: how the watchdog ends the process.
        on_open: called when this process has begun to serve HTTP.
    """
    boot = parts.boot
    config, resolved = boot.config, boot.resolved
    made: dict[str, Actor[Any]] = {}
    makers: dict[str, Callable[[Parts], Actor[Any]]] = {
        "allocator": _allocator,
        "grammar": lambda p: GrammarKeeper(p.grammars),
        "scheduler": _scheduler,
        "runner": _runner,
        "detokenizer": _detokenizer,
        "tokenizer": _tokenizer,
        "frontend": lambda p: _frontend(p, on_open),
    }
    for name in PLACEMENT[role(boot.endpoint, config.tp)]:
        if name != "watchdog":
            made[name] = makers[name](parts)
    runner = made.get("runner")
    num_endpoints = max(1, len(boot.endpoints))
    duty = Duty(
        endpoint=boot.endpoint,
        names={e: endpoint_name(e, config.tp) for e in range(num_endpoints)},
        frontends=(0, *range(config.tp, num_endpoints)),
        model_name=resolved.served_names[0],
        max_len=resolved.max_req_total_len,
        step_timeout_s=config.step_timeout,
    )
    if isinstance(runner, Runner):
        duty = replace(duty, busy_since=runner.busy_since, in_flight=runner.in_flight)
    return [*made.values(), Watchdog(duty, means)]


def main() -> int:
    """Entry of a child process: its ``Boot`` comes on standard input."""
    if not (text := sys.stdin.read()):
        return 1  # rank 0 has gone already
    boot = Boot.from_json(text)
    die_with_parent(boot.parent)
    log.setup(boot.config.log_level, boot.config.log_json, boot.name.replace(" ", ""))
    try:
        spec = ModelSpec.from_dir(Path(boot.model_dir))
        return uvloop.run(_Server(boot, spec, None).run())
    except StartupError as error:
        logger.critical("%s cannot start: %s", boot.name, error)
        return EXIT_STARTUP


if __name__ == "__main__":
    sys.exit(main())
