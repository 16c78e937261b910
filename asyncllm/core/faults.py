"""Makes a fault of ours in the work for one request that request's error, instead of the server's.

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
