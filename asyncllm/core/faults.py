"""Turns a bug in the work for one request into an error of that request instead of the server.

For work that threads do: grammars, masks, prompts. Knows no particular work.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from asyncllm.constrain.protocol import ResampleToken
from asyncllm.errors import RequestError, RequestFault

P = ParamSpec("P")
T = TypeVar("T")

log = logging.getLogger(__name__)


def contained(work: Callable[P, T], *args: P.args, **options: P.kwargs) -> T:
    """``work(*args)``.

    Raises:
        RequestError, ResampleToken: as ``work`` does.
        RequestFault: it raises something else, which is logged.
    """
    try:
        return work(*args, **options)
    except (RequestError, ResampleToken):
        raise
    except Exception:
        log.exception("the work for a request failed")
        raise RequestFault from None
