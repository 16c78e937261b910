"""The configuration: every option, and the limits resolved from it."""

from asyncllm.config import roles
from asyncllm.config.flag import Flag
from asyncllm.config.limits import ResolvedConfig, resolve_limits
from asyncllm.config.options import FLAGS, OPERATION, TOPICS, Config

__all__ = [
    "FLAGS",
    "OPERATION",
    "TOPICS",
    "Config",
    "Flag",
    "ResolvedConfig",
    "resolve_limits",
    "roles",
]
