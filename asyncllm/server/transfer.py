"""Sets up K/V transfer on a rank of a prefill or decode node: socket, pages and actor.

Knows options; the transfer itself is in ``actors/kv_transfer.py``.
"""

from __future__ import annotations

import errno
import logging
import socket
from functools import cache

import torch
import zmq

from asyncllm.actors.kv_listener import KvListener
from asyncllm.actors.kv_receiver import KvReceiver
from asyncllm.actors.kv_sender import KvSender
from asyncllm.actors.kv_thread import KvShard
from asyncllm.actors.kv_transfer import KvTransfer
from asyncllm.actors.transport import CurveKeys, tcp
from asyncllm.config import Config, roles
from asyncllm.core.windows import Window
from asyncllm.engine import kv_transports
from asyncllm.engine.engine import Engine
from asyncllm.engine.kv_pages import KvBytes, warm_up
from asyncllm.errors import StartupError
from asyncllm.models.spec import AttentionSpec, ModelSpec, shard_heads
from asyncllm.records import KvWireFormat
from asyncllm.server.cluster import meets_others
from asyncllm.server.launch import Boot, address_of
from asyncllm.server.secret import TRANSFER, cluster_keys

log = logging.getLogger(__name__)


def refuse(boot: Boot, window: Window | None) -> None:
    """Raises StartupError: K/V cannot be moved in this format, or in the requested way."""
    config = boot.config
    kv_transports.refuse(config.pd_trans_mode, torch.device(boot.resolved.device))
    if window is not None:
        raise StartupError(
            f"--run_mode {config.run_mode}: K/V of layers that see {window.size:,} tokens cannot "
            f"be moved; with --max_req_total_len {window.size} all layers see all tokens"
        )


def transfer_keys(config: Config) -> tuple[CurveKeys, ...]:
    """Of the sockets on which K/V travel. Raises StartupError, see ``cluster_keys``."""
    return cluster_keys(config, TRANSFER, meets_others(config))


def open_kv_listener(boot: Boot) -> KvListener | None:
    """Where this rank of a decode node takes K/V; None: it is of a prefill node.

    Raises:
        StartupError: a given --pd_decode_rpyc_port is busy. A busy default is replaced by a free
            one.
    """
    config = boot.config
    if config.run_mode != roles.DECODE:
        return None
    keys, host = transfer_keys(config)[0], _own(boot.cluster_host)
    port = config.pd_decode_rpyc_port + boot.topology.ranks.index(boot.me)
    given = "pd_decode_rpyc_port" in config.explicit
    try:
        if port > roles.MOST_PORT:
            raise zmq.ZMQError(errno.EINVAL, "there is no such port")
        if port == config.port and roles.same_address(config.host, host):
            raise zmq.ZMQError(errno.EADDRINUSE, "HTTP is served there (--port)")
        return KvListener(keys, host, port)
    except zmq.ZMQError as error:
        if given:
            raise StartupError(_cannot(host, port, error)) from None
    try:
        return KvListener(keys, host, 0)
    except zmq.ZMQError as error:
        raise StartupError(_cannot(host, 0, error)) from None


def _cannot(host: str, port: int, error: zmq.ZMQError) -> str:
    where = f"{host}:{port or '(any port)'}"
    return f"K/V cannot be taken at {where}: {error} (--pd_decode_rpyc_port, --advertise_host)"


def _own(host: str) -> str:
    """The address of this machine that ``host`` names; of another, such as that of a gateway: all
    of this machine's. Raises StartupError: it names none."""
    address = address_of(host, "--advertise_host")
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        try:
            probe.bind((address, 0))
        except OSError:
            return "::" if family == socket.AF_INET6 else "0.0.0.0"
    return address


def make_transfer(
    boot: Boot, spec: ModelSpec, engine: Engine, listener: KvListener | None
) -> KvTransfer:
    """The actor of this rank.

    Args:
        spec: of the whole model.
        listener: where it listens; None: it sends.

    Raises:
        StartupError: this machine lacks what --pd_trans_mode requires.
    """
    config, me = boot.config, boot.me
    layout = engine.model.site.attention.layout
    kv = KvBytes(engine.kv, layout)
    heads = layout.heads(layout.layers[0])
    wire = KvWireFormat(
        format=" ".join(boot.resolved.kv_mode),
        dtype=boot.resolved.dtype,
        num_layers=len(spec.layers),
        num_heads=1 if spec.layers[0].kind == "mla" else spec.layers[0].num_kv_heads,
        head_bytes=kv.slot_bytes // (heads * len(spec.layers)),
        latent=spec.layers[0].kind == "mla",
        tp=len(boot.group),
    )
    share = KvShard(
        name=f"{boot.name} of {boot.cluster_host}:{config.port}",
        rank=me.group_rank,
        wire=wire,
        kv=kv,
        held=lambda tp: held(spec, tp),
    )
    size = config.pd_kv_page_size * kv.slot_bytes
    mode, num = config.pd_trans_mode, config.pd_kv_page_num
    pages, transports = kv_transports.make_ways(mode, num, size, engine.device)
    warm_up(pages, kv, engine.num_slots)
    if listener is None:
        return KvTransfer(KvSender(share, pages, transports, keys=transfer_keys(config)))
    address = tcp(boot.cluster_host, listener.port)
    return KvTransfer(
        KvReceiver(share, pages, transports, node=boot.incarnation, listener=listener), address
    )


@cache
def held(spec: ModelSpec, tp: int) -> tuple[tuple[tuple[int, ...], ...], ...]:
    """The heads of K/V on each of so many ranks, in each layer; latents are on all of them."""

    @cache
    def of(layer: AttentionSpec) -> tuple[tuple[int, ...], ...]:
        if layer.kind == "mla":
            return ((0,),) * tp
        return tuple(shard_heads(layer, tp, rank).kv_heads for rank in range(tp))

    return tuple(of(layer) for layer in spec.layers)
