"""One process of a server, from load to exit code: children, signals, the end."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import sys
import threading
from dataclasses import replace
from typing import Any, NoReturn

import torch

from asyncllm.actors.system import ActorSystem
from asyncllm.actors.watchdog import EXIT_HUNG, Means, dump_stacks
from asyncllm.api.welcome import curl_line
from asyncllm.errors import FatalError, StartupError
from asyncllm.messages import Drain
from asyncllm.models.spec import ModelSpec
from asyncllm.server.assembly import place
from asyncllm.server.launch import (
    Boot,
    Children,
    Wires,
)
from asyncllm.server.loading import Parts, load_parts, num_threads
from asyncllm.server.signals import SHOW, Watch, draining
from asyncllm.text import Text

EXIT_STARTUP = 2
CULPRIT_S = 1.0
SWITCH_INTERVAL_S = 0.0005  # a helper thread that needs the GIL must not hold the loop for 5 ms

logger = logging.getLogger(__name__)


class Server:
    """One process of the server, from load to exit."""

    def __init__(
        self, boot: Boot, spec: ModelSpec, text: Text | None, wires: Wires | None, watch: Watch
    ) -> None:
        self._boot, self._spec, self._text = boot, spec, text
        self._wires, self._watch = wires, watch
        self._system: ActorSystem | None = None
        self._children: Children | None = None
        self._leaving = threading.Lock()

    async def run(self) -> int:
        """Load, run the actors until they stop; the exit code."""
        loop = asyncio.get_running_loop()
        leads = self._boot.endpoint == 0
        if leads:
            for number in draining():
                loop.add_signal_handler(number, self._signalled)
            self._children = children = Children(self._child_died)
            self._watch.leave = self._abandon
            self._watch.forward = lambda: children.signal(SHOW)
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
        parts = self._boot, self._spec, self._text
        try:
            return await loop.run_in_executor(None, load_parts, *parts)
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
            self._boot,
            endpoint=endpoint,
            parent=os.getpid(),
            **{"listen_fd": -1, "store_fd": -1, **changes},
        )
        self._children.start(boot, num_threads(boot))

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
        self._watch.state = system.state
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
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
        host = f"[{host}]" if ":" in host else host
        scheme = "https" if boot.config.ssl_certfile else "http"
        url = f"{scheme}://{host}:{boot.config.port}"
        line = curl_line(url, names[0], secured=bool(boot.config.api_key))
        sys.stdout.write(f"asyncllm is ready: {url} serves {names[0]}\n{line}\n")
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
