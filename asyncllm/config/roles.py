"""What a process of a cluster can be (``--run_mode``), and which options work in which role.

``docs/cluster.md`` has the same as a table. Knows names and values of options, nothing else.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from asyncllm.config.options import Config

NORMAL, PREFILL, DECODE, MASTER = "normal", "prefill", "decode", "pd_master"
CONFIG_SERVER = "config_server"
ROLES = (NORMAL, PREFILL, DECODE, MASTER, CONFIG_SERVER)
NODES = (PREFILL, DECODE)

ELASTIC = "elastic"
_FIXED = re.compile(r"([1-9]\d{0,3})p([1-9]\d{0,3})d")

# a role -> options that it cannot honour, with what would be so if it did
_REFUSED = {
    MASTER: {
        "nnodes": "it is one machine: prefill and decode nodes come to it by themselves",
        "tp": "it computes nothing: --tp belongs to the prefill and decode nodes",
        "dp": "it computes nothing: --dp belongs to the prefill and decode nodes",
        "mode": "it holds no K/V: --mode belongs to the prefill and decode nodes",
        "llm_kv_type": "it holds no K/V: --llm_kv_type belongs to the prefill and decode nodes",
    },
    **{
        role: {
            "nnodes": "a prefill or decode node is one machine; start several, each with its "
            "--tp and --dp",
        }
        for role in NODES
    },
}
# what only whoever computes looks at
_UNUSED = (
    "max_total_token_num", "mem_fraction", "batch_max_tokens", "chunked_prefill_size", "device",
    "data_type", "load_way", "disable_cudagraph", "disable_dynamic_prompt_cache", "diverse_mode",
)  # fmt: skip


def refusal(config: Config) -> str | None:
    """Why these options cannot be honoured in this role; None: they can."""
    for name, why in _REFUSED.get(config.run_mode, {}).items():
        value = getattr(config, name)
        if value not in (1, (), "None"):
            shown = " ".join(value) if isinstance(value, tuple) else value
            return f"--{name} {shown} with --run_mode {config.run_mode}: {why}"
    return None


def unused(config: Config) -> Iterator[str]:
    """A line for each option that was given and that this role never looks at."""
    if config.run_mode == MASTER:
        for name in sorted(config.explicit.intersection(_UNUSED)):
            yield f"--{name} has no effect: --run_mode {MASTER} computes nothing"


def counts(mode: str) -> tuple[int, int] | None:
    """(prefill nodes, decode nodes) that --pd_master_mode asks for; None: any."""
    if mode == ELASTIC:
        return None
    found = _FIXED.fullmatch(mode)
    assert found is not None, mode  # Config has checked it
    return int(found[1]), int(found[2])


def fixed_or_elastic(mode: str) -> str | None:
    """A check of --pd_master_mode's value."""
    if mode == ELASTIC or _FIXED.fullmatch(mode):
        return None
    return "must be elastic or numbers of nodes such as 2p1d (from 1 to 9999 each)"
