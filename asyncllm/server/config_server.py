"""``--run_mode config_server``: runs this single process, which has no model."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import logging
import socket
import sys

import uvloop
from torch._C._distributed_c10d import TCPStore

from asyncllm import __version__
from asyncllm.actors.channel import Channel
from asyncllm.actors.registry import Registry
from asyncllm.actors.system import ActorSystem
from asyncllm.actors.transport import netloc
from asyncllm.config import Config, roles
from asyncllm.core.metrics import ProcessCounters
from asyncllm.errors import FatalError, StartupError
from asyncllm.server.cluster import ANY_ADDRESS, cluster_port, open_channel
from asyncllm.server.launch import bind_http
from asyncllm.server.rendezvous import listen_at
from asyncllm.server.signals import SignalWatcher, handle_draining
from asyncllm.server.status import JSON, TEXT, Page, StatusPages
from asyncllm.topology import Topology

OK, HEALTHY = b'{"status":"ok"}', b'{"message":"Ok"}'

log = logging.getLogger(__name__)


def serve(config: Config) -> int:
    """Run a config_server until it is told to stop; returns the exit code.

    Args:
        config: its options, with all API keys.

    Raises:
        StartupError: the server cannot start as configured.
    """
    watch = SignalWatcher(roles.CONFIG_SERVER, leads=True)
    with contextlib.ExitStack() as stack:
        sock = stack.enter_context(bind_http(config.host, config.port))
        channel, _ = open_channel(config, stack)
        assert channel is not None
        if config.check:
            sys.stdout.write(
                f"config_server\nports: HTTP {netloc(config.host, config.port)}, "
                f"channel {netloc(config.host, cluster_port(config))}\n"
            )
            return 0
        return uvloop.run(_run(config, sock, channel, watch))


async def _run(config: Config, sock: socket.socket, channel: Channel, watch: SignalWatcher) -> int:
    system = ActorSystem(topology=Topology.of_config_server())
    registry = Registry(channel, functools.partial(open_store, config.host))
    system.add(registry)
    system.use_channel(channel, "registry")
    watch.state = system.state
    handle_draining(asyncio.get_running_loop(), system.stop)
    where = json_page(b'{"port":%d}' % channel.port)

    def metrics() -> tuple[int, str, bytes]:
        actors = [(a.name, a.depth, a.busy_s, a.take_longest()) for a in system.actors]
        process = ProcessCounters(actors, system.dead_letters, *system.counted())
        return 200, TEXT, registry.registered(process).exposition()

    pages: dict[str, Page] = {
        **dict.fromkeys(("/health", "/healthz", "/ping"), json_page(HEALTHY)),
        **dict.fromkeys(("/liveness", "/readiness"), json_page(OK)),
        "/cluster": where,
        "/version": json_page(json.dumps({"version": __version__}).encode()),
        "/metrics": metrics,
        "/registered_objects": lambda: (200, JSON, registry.objects()),
    }
    status = StatusPages(pages, config, "this is a config_server; send requests to a pd_master")
    await status.open(sock)
    scheme = "https" if config.ssl_certfile else "http"
    host = ANY_ADDRESS.get(config.host, config.host)
    sys.stdout.write(
        f"asyncllm is ready: config_server at {scheme}://{netloc(host, config.port)}\n"
    )
    sys.stdout.flush()
    try:
        await system.run()
    except FatalError as error:
        log.critical("the config_server ends: %s", error)
        return 1
    finally:
        await status.close()
    return 0


def json_page(body: bytes) -> Page:
    """A page with a constant body."""
    return lambda: (200, JSON, body)


def open_store(own_host: str, host: str, port: int) -> object:
    """A torch.distributed store that listens on one address until it is garbage-collected.

    Args:
        own_host: the config_server's --host; if that means every address, ``host`` is used.
        host, port: where the ranks look for the store.

    Raises:
        StartupError: that address cannot be listened on.
    """
    sock = listen_at(host if own_host in ANY_ADDRESS else own_host, port)
    address = str(sock.getsockname()[0])
    try:
        return TCPStore(
            address,
            port,
            is_master=True,
            wait_for_workers=False,
            master_listen_fd=sock.detach(),
        )
    except RuntimeError as error:
        line = str(error).partition("\n")[0]
        raise StartupError(f"no store at {netloc(address, port)}: {line}") from None
