"""``--check``: prints what would be started, without starting it."""

from __future__ import annotations

import sys
from collections.abc import Iterator

from asyncllm.config import FLAGS, roles
from asyncllm.engine.build import num_parameters
from asyncllm.models.spec import ModelSpec
from asyncllm.server import transfer
from asyncllm.server.cluster import cluster_port
from asyncllm.server.launch import Boot
from asyncllm.server.loading import (
    Loaded,
    load_constrained_decoding,
    memory_plan,
    num_threads,
    rope_notes,
    torch_device,
    with_chats,
)
from asyncllm.text import ModelTokenizer


def check(boot: Boot, spec: ModelSpec, text: ModelTokenizer) -> None:
    """Print what would be started to standard output.

    Raises:
        StartupError: anything that a start would refuse before reading weights.
    """
    config = boot.config
    load_constrained_decoding(with_chats(Loaded(boot, spec, None, None, None, None, None), text))
    resolved, about = boot.resolved, [f"model: {boot.model_dir}, {spec.architecture}"]
    serving = f"{config.httpserver_workers} for HTTP"
    if boot.topology.ranks:
        plan = memory_plan(boot, spec)
        if config.run_mode in roles.NODES:
            transfer.refuse(boot, plan.window)
        resolved = resolved.with_slots(plan.num.full)
        about[0] += f", {num_parameters(spec, torch_device(boot)):,} weights"
        kinds = ", ".join((resolved.dtype, *resolved.kv_mode))
        about += [
            f"device: {resolved.device}, {kinds}, {_ranks(boot)}; {serving}",
            plan.text(resolved.max_req_total_len),
            plan.linears.text(resolved.dtype),
            *(f"warning: {line}" for line in plan.linears.warnings(resolved.dtype)),
        ]
    else:
        about.append(f"device: none; {serving}")
    limits = (
        "max_req_total_len", "running_max_req_size", "batch_max_tokens", "chunked_prefill_size",
        "eos_ids", "max_body_size",
    )  # fmt: skip
    lines = [
        about[0],
        f"served as: {', '.join(resolved.served_names)}",
        *about[1:],
        f"ports: {', '.join(_ports(boot))}",
        *(f"warning: {line}" for line in (*config.warnings, *resolved.warnings)),
        *(f"note: {note}" for note in resolved.notes),
        *(f"note: {note}" for note in rope_notes(spec, resolved.max_req_total_len)),
        f"sampling by default: {_sampling(resolved.generation_config)}",
        "limits:",
        *(f"  {name} = {getattr(resolved, name)}" for name in limits),
    ]
    for title, given in (("options given:", True), ("options by default:", False)):
        names = [n for n in FLAGS if (n in config.explicit) == given]
        lines += [title, *(f"  {name} = {_shown(name, getattr(config, name))}" for name in names)]
    sys.stdout.write("\n".join(lines) + "\n")
    sys.stdout.flush()


def _ranks(boot: Boot) -> str:
    config = boot.config
    text = f"{config.tp} rank{'s' * (config.tp > 1)}"
    if config.dp > 1:
        text += f" in {config.dp} groups"
    if config.nnodes > 1:
        text += f" on {config.nnodes} nodes"
    if boot.resolved.device == "cpu":
        text += f", {num_threads(boot)} threads each"
    return text


def _ports(boot: Boot) -> Iterator[str]:
    config = boot.config
    yield f"{'HTTPS' if config.ssl_certfile else 'HTTP'} {config.host}:{config.port}"
    if boot.rendezvous:
        yield "torch.distributed {}:{}".format(*boot.rendezvous)
    if config.nnodes > 1:
        yield f"nodes {config.nccl_host}:{config.multinode_httpmanager_port}"
        mine = [config.multinode_router_gloo_port + e.id for e in boot.topology.on(boot.me.node)]
        yield f"messages {', '.join(map(str, mine[: config.tp // config.nnodes]))}"
    if config.run_mode == roles.MASTER:
        yield f"nodes {config.host}:{cluster_port(config)}"
    if config.run_mode == roles.DECODE:
        taken = len(boot.topology.ranks) - 1
        first = config.pd_decode_rpyc_port
        yield f"K/V {boot.cluster_host}:{first}" + (f" to {first + taken}" if taken else "")
    if config.nnodes == 1 and boot.me.address.startswith("tcp"):
        yield "messages 127.0.0.1 (free ones)"


def _sampling(values: dict[str, object]) -> str:
    said = ", ".join(f"{name} {value}" for name, value in values.items())
    return f"{said} (generation_config.json)" if said else "that of each route"


def _shown(name: str, value: object) -> str:
    if isinstance(value, tuple):
        return f"{len(value)} given" if FLAGS[name].secret else " ".join(map(str, value)) or "-"
    if isinstance(value, bool):
        return "on" if value else "off"
    return "-" if value is None else str(value)
