"""All options: those of the process itself here, the others by topic; and checks across options.

Knows neither argparse, torch nor models.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from asyncllm.config import roles
from asyncllm.config.access import AccessOptions
from asyncllm.config.batches import BatchOptions
from asyncllm.config.cluster import PORT, ParallelOptions, SeparationOptions
from asyncllm.config.flag import (
    Flag,
    Single,
    above_zero,
    at_least,
    between,
    flag,
    not_empty,
)
from asyncllm.config.model import AttentionOptions, ModelOptions
from asyncllm.errors import StartupError
from asyncllm.models.kv_format import KvMode

# options that may differ between the nodes of one server; the others determine its answers
OF_ONE_NODE = frozenset(
    {"host", "port", "node_rank", "api_key_file", "ssl_certfile", "ssl_keyfile", "check",
     "log_level", "log_json", "model_dir", "nccl_host", "nccl_port", "advertise_host",
     "cluster_key_file", "make_cluster_key", "node_timeout"}
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class BasicOptions:
    """The kind of process, and where it listens."""

    run_mode: str = flag(
        "normal", choices=roles.ROLES,
        help="kind of process; normal: a whole server by itself; pd_master: the HTTP API in "
        "front of prefill and decode nodes; prefill: computes prompts and sends their K/V to "
        "decode nodes; decode: generates the remaining tokens; config_server: registers all "
        "pd_masters and tells nodes about them; it needs no model",
    )  # fmt: skip
    host: str = flag("127.0.0.1", help="address to listen on", check=not_empty)
    port: int = flag(8000, help="port to listen on", check=PORT)
    httpserver_workers: int = flag(
        1, check=between(1, 256),
        help="number of processes that serve HTTP, including rank 0; they share one port",
    )  # fmt: skip
    zmq_mode: str = flag(
        "ipc:///tmp/", choices=("tcp://", "ipc:///tmp/"),
        help="how processes of this server communicate: TCP on loopback, or sockets in a private "
        "folder (mode 0700, one per server) under /tmp",
    )  # fmt: skip
    use_tgi_api: bool = flag(
        False,
        help="/generate, /generate_stream and / use text-generation-inference's protocol",
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class OperationOptions:
    """Checks, time limits and logging."""

    check: bool = flag(
        False,
        help="print the resolved configuration, memory plan and ports, then exit with code 0; with "
        "--nnodes on all nodes at once: also test the connections between them",
    )  # fmt: skip
    drain_timeout: float = flag(
        30.0, check=at_least(0), metavar="SECONDS",
        help="time for running requests to finish after SIGTERM; a second SIGTERM ends the "
        "server at once",
    )  # fmt: skip
    step_timeout: float = flag(
        120.0, check=above_zero, metavar="SECONDS",
        help="a step that takes longer counts as a hang: the server logs all stacks and ends with "
        "exit code 70",
    )  # fmt: skip
    dead_after: float = flag(
        10.0, check=at_least(0.5), metavar="SECONDS",
        help="a process of this server that is silent for longer counts as dead: for a rank the "
        "server ends, or only its group (--dp); an HTTP worker is replaced",
    )  # fmt: skip
    log_level: str = flag(
        "info", choices=("debug", "info", "warning", "error"),
        help="lowest severity to log",
    )  # fmt: skip
    log_json: bool = flag(False, help="log one JSON object per line")


OPERATION = "Operation and logging"
# the chapters of LightLLM's option reference, then our own
TOPICS = {
    "Basic configuration": BasicOptions,
    "Prefill/decode separation": SeparationOptions,
    "Model configuration": ModelOptions,
    "Memory and batch processing": BatchOptions,
    "Parallel modes": ParallelOptions,
    "Attention type": AttentionOptions,
    "Access": AccessOptions,
    OPERATION: OperationOptions,
}


@dataclass(frozen=True, kw_only=True)
class Config(
    OperationOptions,
    AccessOptions,
    AttentionOptions,
    ParallelOptions,
    BatchOptions,
    ModelOptions,
    SeparationOptions,
    BasicOptions,
):
    """All options of one server, checked; equal in each of its processes.

    The fields are in the order of ``TOPICS``: those of the last base class come first.

    Raises:
        StartupError: a value out of range, or one that cannot be honoured in this mode.
    """

    # not flags: names of the options that were given, and a line about each that has no effect
    explicit: frozenset[str] = frozenset()
    warnings: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, same in roles.second_names(self):
            own, given = getattr(self, name), name in self.explicit
            if own != same and (given or own != FLAGS[name].default):
                raise StartupError(
                    f"--{name} {own} and --config_server_{name} {same}: with --run_mode "
                    f"{self.run_mode} they mean the same; give one"
                )
            object.__setattr__(self, name, same)
        values = {name: getattr(self, name) for name in FLAGS}
        changed = {name for name, value in values.items() if value != FLAGS[name].default}
        object.__setattr__(self, "explicit", self.explicit | changed)
        for name, value in values.items():
            if (wrong := FLAGS[name].complaint(value)) is not None:
                raise StartupError(f"--{name} {wrong}")
        if (wrong := roles.indivisible(self) or roles.refusal(self)) is not None:
            raise StartupError(wrong)
        KvMode.named(self.mode, self.llm_kv_type)
        warnings = [line for name in sorted(changed) for line in self._moot(name, values[name])]
        warnings += roles.unused(self)
        object.__setattr__(self, "warnings", tuple(dict.fromkeys((*self.warnings, *warnings))))

    def applies(self, name: str) -> bool:
        """Whether this option has an effect beside the others; if not, ``warnings`` has a line."""
        needs = FLAGS[name].needs
        return needs is None or needs.met(self)

    def _moot(self, name: str, value: Single | tuple[Single, ...]) -> Iterator[str]:
        """A line if this option has no effect. Raises StartupError if it cannot be honoured."""
        needs = FLAGS[name].needs
        if needs is not None and not self.applies(name):
            line = f"{_as_typed(name, value)} has no effect: it only applies with {needs.text}"
            if needs.vital:
                raise StartupError(line)
            yield line

    def digest(self) -> str:
        """Hash of the options that all processes of one server must share."""
        shared = {name: getattr(self, name) for name in FLAGS if name not in OF_ONE_NODE}
        return _hash(shared)[:12]

    def shared(self) -> tuple[tuple[str, str], ...]:
        """(name, value) of those options; a secret value is hashed to a short digest that cannot be
        guessed."""
        values = {name: getattr(self, name) for name in FLAGS if name not in OF_ONE_NODE}
        return tuple(
            (name, f"hidden ({_hash(value)[:4]})" if FLAGS[name].secret else json.dumps(value))
            for name, value in values.items()
        )

    def to_json(self) -> str:
        """All fields as one line, for a child process."""
        return json.dumps(asdict(self), default=sorted)

    @classmethod
    def from_json(cls, text: str) -> Config:
        """The inverse of ``to_json``; ``Config.from_json(c.to_json()) == c``."""
        loaded: dict[str, Any] = json.loads(text)
        explicit = frozenset(loaded.pop("explicit"))
        values: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in loaded.items()
        }
        return cls(**values, explicit=explicit)


def _hash(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _as_typed(name: str, value: object) -> str:
    """``--tp 2``, ``--mode a b``, ``--check``: the option as typed on the command line."""
    if value is True:
        return f"--{name}"
    return f"--{name} {' '.join(map(str, value)) if isinstance(value, tuple) else value}"


def _flags() -> dict[str, Flag]:
    """The options by field name, each with chapter, name and element type filled in."""
    kinds = {"int": int, "float": float, "str": str, "bool": bool}
    found = {}
    for title, topic in TOPICS.items():
        for item in fields(topic):
            base = str(item.type).removesuffix(" | None")
            kind = kinds[base.removeprefix("tuple[").removesuffix(", ...]")]
            made = item.metadata["flag"]
            found[item.name] = replace(made, group=title, name=item.name, kind=kind)
    return found


FLAGS = _flags()
