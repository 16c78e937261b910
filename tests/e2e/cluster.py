"""A master with its prefill and decode nodes, each a server in processes of its own."""

from __future__ import annotations

import json
import urllib.error
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from tests.e2e.process import START_S, Server, free_port, wait_until

COMMON = ("--device", "cpu")
SLOTS = ("--max_total_token_num", "6000")


class Cluster:
    """Use it as a context manager; all are started together and it waits until all have joined.

    Args:
        model_dir: of all servers.
        logs: an empty folder.
        prefill, decode: more options of each node.
        master: more options of the master.
        node: more options of all nodes.
    """

    def __init__(
        self,
        model_dir: Path,
        logs: Path,
        *,
        prefill: Sequence[tuple[str, ...]] = ((),),
        decode: Sequence[tuple[str, ...]] = ((),),
        master: Sequence[str] = (),
        node: Sequence[str] = (),
    ) -> None:
        self.model_dir, self.logs, self.node_args = model_dir, logs, tuple(node)
        self.master_args = tuple(master)
        self.stack = ExitStack()
        self.started = 0
        self.master = self.start_master()
        self.prefill = [self.start_node("prefill", *more) for more in prefill]
        self.decode = [self.start_node("decode", *more) for more in decode]

    def __enter__(self) -> Cluster:
        try:
            self.wait_for(len(self.prefill), len(self.decode))
        except BaseException:
            self.stack.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stack.close()

    def _start(self, role: str, *args: str) -> Server:
        self.started += 1
        log = self.logs / f"{self.started}-{role}"
        server = Server(self.model_dir, log, "--run_mode", role, *args)
        self.stack.enter_context(server.failing())
        return server

    def start_master(self, port: int | None = None) -> Server:
        """A master, if need be in the place of another one. The last --port counts."""
        self.cluster_port = free_port() if port is None else self.cluster_port
        given = () if port is None else ("--port", str(port))
        master = self._start(
            "pd_master", "--cluster_port", str(self.cluster_port), *self.master_args, *given
        )
        if port is not None:
            master.port, master.url = port, f"http://{master.host}:{port}"
        return master

    def start_node(self, role: str, *args: str) -> Server:
        master = ("--pd_master_ip", self.master.host, "--pd_master_port", str(self.master.port))
        return self._start(role, *COMMON, *SLOTS, *self.node_args, *master, *args)

    def nodes(self) -> list[dict[str, Any]]:
        """What the master says of its nodes; none before it serves."""
        try:
            return list(json.loads(self.master.get("/pd_nodes")))
        except urllib.error.HTTPError as error:
            error.close()
        except (urllib.error.URLError, ConnectionError):
            pass
        return []

    def serving(self, role: str) -> set[str]:
        """Addresses of the nodes of a role that take requests."""
        rows = self.nodes()
        return {r["address"] for r in rows if r["role"] == role and r["state"] == "serving"}

    def wait_for(self, prefill: int, decode: int, timeout_s: float = START_S) -> None:
        """Until exactly so many nodes take requests."""
        found = wait_until(
            lambda: (
                (len(self.serving("prefill")), len(self.serving("decode"))) == (prefill, decode)
            ),
            timeout_s,
        )
        assert found, (self.nodes(), self.text())

    def text(self) -> str:
        """What all have logged."""
        return "\n".join(f"== {p.name}\n{p.read_text()}" for p in sorted(self.logs.iterdir()))

    def free(self, *servers: Server, timeout_s: float = 10.0) -> None:
        """Until no slot of these nodes is held by a request."""

        def held() -> dict[str, float]:
            return {s.log.name: s.metric("asyncllm_kv_slots_used") for s in servers}

        assert wait_until(lambda: not any(held().values()), timeout_s), held()
