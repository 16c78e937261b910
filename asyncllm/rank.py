"""What every server process runs: rank 0 prepares and serves; children get their role."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NoReturn

import torch
import uvloop

from asyncllm import log
from asyncllm.actors.heartbeats import Heartbeats
from asyncllm.api.common.defaults import read_defaults
from asyncllm.config import Config, ResolvedConfig, quantisation, resolve_limits, roles
from asyncllm.constrain.llguidance_backend import library
from asyncllm.environment import CUDA_VISIBLE, cache_dir, cuda_visible, use_interface
from asyncllm.errors import StartupError
from asyncllm.hub import names_of, resolve_model_dir
from asyncllm.kernels.autotune import device_facts
from asyncllm.models.checkpoint import as_stored, read_checkpoint
from asyncllm.models.spec import ModelSpec, generation_config
from asyncllm.server import config_server
from asyncllm.server.check import check
from asyncllm.server.cluster import open_channel
from asyncllm.server.compile_helper import CompileHelper
from asyncllm.server.compile_kernels import job, job_name
from asyncllm.server.early_ranks import EarlyRanks
from asyncllm.server.endpoint_assignment import (
    EndpointAssignment,
    assign_on_nodes,
    assign_on_one_node,
)
from asyncllm.server.keys import with_all_keys
from asyncllm.server.launch import (
    Boot,
    NodeWires,
    ZmqAddresses,
    bind_http,
    tls_context,
)
from asyncllm.server.lease import take_lease
from asyncllm.server.loading import load_text
from asyncllm.server.process import EXIT_STARTUP, NodeResources, Server
from asyncllm.server.signals import SignalWatcher, hold_draining
from asyncllm.text import ModelTokenizer
from asyncllm.topology import HTTP, Topology

logger = logging.getLogger(__name__)


def serve(
    config: Config, ahead: CompileHelper | None = None, early: EarlyRanks | None = None
) -> int:
    """Run a whole server as rank 0 until it is told to stop; returns the exit code.

    Args:
        ahead: the helper that compiles kernels meanwhile.
        early: other ranks, which import meanwhile.

    Raises:
        StartupError: the server cannot start as configured.
    """
    config = with_all_keys(config)
    for line in config.warnings:
        logger.warning("%s", line)
    tls_context(config)
    if config.run_mode == roles.CONFIG_SERVER:
        return config_server.serve(config)
    if config.output_constraint_mode != "none":
        library()
    watch = SignalWatcher(f"rank {config.node_rank * config.tp // config.nnodes}", leads=True)
    with contextlib.ExitStack() as stack:
        sock = stack.enter_context(bind_http(config.host, config.port))  # before any download
        load_way = None if config.run_mode == roles.MASTER else config.load_way
        model_dir = resolve_model_dir(config.model_dir, cache_dir(), load_way=load_way)
        spec, text = _read(config, model_dir)
        resolved = resolve(config, spec, model_dir, text)
        _tell(resolved)
        channel, cluster_host = open_channel(config, stack)
        assignment = _assign_endpoint(config, spec, resolved, model_dir, stack)
        watch.leave = partial(_leave, assignment.wires)
        serves = HTTP in assignment.topology[assignment.endpoint].roles
        boot = Boot(
            endpoint=assignment.endpoint,
            topology=assignment.topology,
            keys=(assignment.keys.public, assignment.keys.secret),
            config=config,
            resolved=resolved,
            model_dir=str(model_dir),
            rendezvous=assignment.rendezvous,
            listen_fd=sock.fileno() if serves else -1,
            parent=0,
            store_fd=assignment.store_fd,
            heartbeats_fd=_heartbeats_fd(assignment, early),
            interface=assignment.interface,
            advertised=assignment.advertised,
            cluster_host=cluster_host,
            incarnation="" if channel is None else channel.info.incarnation,
        )
        if config.check:
            check(boot, spec, text)
            if config.nnodes == 1:
                return 0
        if ahead is not None:
            _compile(ahead, boot, spec)
        node = NodeResources(
            assignment, status=None if serves else sock, channel=channel, ahead=ahead, early=early
        )
        return uvloop.run(Server(boot, spec, text, node, watch).run())


def _tell(resolved: ResolvedConfig) -> None:
    for line in resolved.warnings:
        logger.warning("%s", line)
    for note in resolved.notes:
        logger.info("%s", note)


def _heartbeats_fd(assignment: EndpointAssignment, early: EarlyRanks | None) -> int:
    """Memory for heartbeats; -1: there are no other processes."""
    if not assignment.wires.address(0):
        return -1
    return Heartbeats.create() if early is None else early.heartbeats_fd


def _assign_endpoint(
    config: Config,
    spec: ModelSpec,
    resolved: ResolvedConfig,
    model_dir: Path,
    stack: contextlib.ExitStack,
) -> EndpointAssignment:
    """Join the other nodes, waiting for them, and return this process's endpoint."""
    if config.run_mode == roles.MASTER:
        if not config.check:
            hold_draining()
        topology = Topology.of_master(config.httpserver_workers)
        if roles.asks_config_server(config):
            topology = topology.with_config_client()
        return assign_on_one_node(config, topology, stack)
    topology = Topology.on_nodes(
        config.nnodes,
        config.tp,
        config.httpserver_workers,
        config.dp,
        in_step=spec.shares_experts,
    )
    if config.speculative != "none" and topology.in_step:
        raise StartupError(
            f"--speculative {config.speculative} with --dp {config.dp}: the groups of "
            f"{spec.architecture} share experts and take the same steps, which drafts would delay"
        )
    if config.run_mode in roles.NODES:
        topology = topology.as_node()
    if roles.asks_config_server(config):
        topology = topology.with_config_client()
    # --check on a single node contacts nobody
    meets = config.nnodes > 1 or not config.check
    first_node = take_lease(config, stack) if meets else None
    if config.nnodes > 1:
        assignment = assign_on_nodes(config, resolved, model_dir, topology, first_node, stack)
        hold_draining()  # while it waited there was nothing to drain
        return assignment
    if not config.check:
        hold_draining()  # from here on there is a folder to clean up
    return assign_on_one_node(config, topology, stack)


def _read(config: Config, model_dir: Path) -> tuple[ModelSpec, ModelTokenizer]:
    """The checkpoint's model spec and its tokenizer; a master does not look at weights."""
    config_spec = ModelSpec.from_dir(model_dir)
    if config.run_mode == roles.MASTER:
        return config_spec, load_text(config, str(model_dir), config_spec)
    with read_checkpoint(model_dir, config.load_way, config_spec) as checkpoint:
        text = load_text(config, str(model_dir), config_spec)
        spec = as_stored(config_spec, checkpoint)
    if spec.tie_embeddings != config_spec.tie_embeddings:
        logger.warning(
            "config.json ties the output matrix to the embedding, but %s is a different matrix: "
            "using it",
            f"{spec.head}.weight",
        )
    return spec, text


def _compile(ahead: CompileHelper, boot: Boot, spec: ModelSpec) -> None:
    """Have the kernels compiled that a rank of ``boot`` will launch."""
    if boot.resolved.device != "cuda":
        ahead.give("", "")
        return
    facts = device_facts(torch.device("cuda", 0))
    ahead.give(job(boot, facts), job_name(boot, spec, facts))


def _leave(wires: ZmqAddresses | NodeWires, code: int) -> NoReturn:
    wires.close()
    os._exit(code)


def resolve(
    config: Config, spec: ModelSpec, model_dir: Path, text: ModelTokenizer | None = None
) -> ResolvedConfig:
    """Derive the limits from the options, the model and this machine. Without ``text`` no
    tokenizer is read."""
    cuda = config.run_mode != roles.MASTER and torch.cuda.is_available()
    if config.device == "cuda" and not cuda:
        raise StartupError("--device cuda: torch finds no CUDA device (--device cpu)")
    device = "cuda" if cuda and config.device != "cpu" else "cpu"
    if device == "cuda" and config.tp // config.nnodes > torch.cuda.device_count():
        hidden = f" ({CUDA_VISIBLE}={cuda_visible()})" if cuda_visible() is not None else ""
        nodes = f" on {config.nnodes} nodes" * (config.nnodes > 1)
        raise StartupError(
            f"--tp {config.tp} needs as many GPUs{nodes}, "
            f"{torch.cuda.device_count()} are visible{hidden}"
        )
    if max(config.eos_id, default=0) >= spec.vocab_size:
        raise StartupError(
            f"--eos_id {max(config.eos_id)} is not below the vocabulary size {spec.vocab_size}"
        )
    end = None if text is None else text.eos_id
    ends = [] if end is None or end >= spec.vocab_size else [end]
    resolved = resolve_limits(
        config,
        device="cuda" if device == "cuda" else "cpu",
        gpu_memory=torch.cuda.get_device_properties(0).total_memory if device == "cuda" else None,
        checkpoint_dtype=spec.dtype,
        model_limit=spec.max_position,
        model_eos=(*spec.eos_ids, *ends),
        model_dir_names=names_of(model_dir),
        has_experts=spec.has_experts,
        kv_format=spec.kv_format,
    )
    used = {} if config.generation_config == "none" else generation_config(model_dir)
    resolved = replace(resolved, generation_config=read_defaults(used))
    if config.run_mode == roles.MASTER:
        return resolved
    asked = quantisation.asked(config, spec)
    said = (*resolved.notes, *quantisation.notes(asked, spec, device))
    return replace(resolved, quant=quantisation.to_text(asked), notes=said)


def child() -> int:
    """Run a child process, which gets its ``Boot`` on standard input."""
    if not (text := sys.stdin.read()):
        return 1  # rank 0 is already gone
    try:
        boot = Boot.from_json(text)
    except StartupError as error:
        sys.stderr.write(f"asyncllm: {error}\n")
        return EXIT_STARTUP
    if boot.interface:  # this process may have been started before it was known
        use_interface(boot.interface)
    log.setup(boot.config.log_level, boot.config.log_json, boot.name.replace(" ", ""))
    watch = SignalWatcher(boot.name, leads=False)
    try:
        model_dir = Path(boot.model_dir)
        spec = ModelSpec.from_dir(model_dir)
        with read_checkpoint(model_dir, boot.config.load_way, spec) as checkpoint:
            spec = as_stored(spec, checkpoint)
        return uvloop.run(Server(boot, spec, None, NodeResources(), watch).run())
    except StartupError as error:
        logger.critical("%s cannot start: %s", boot.name, error)
        return EXIT_STARTUP
