"""Counts and logs kernels compiled while serving: each of them stalls steps for seconds."""

from __future__ import annotations

import logging

log = logging.getLogger(__name__)


class JitMonitor:
    """Counts Triton compilations from :meth:`arm` on; earlier ones are part of the start-up."""

    def __init__(self) -> None:
        self.count = 0

    def arm(self) -> None:
        """Start counting. Triton keeps one hook for the process."""
        from triton import knobs

        knobs.runtime.jit_post_compile_hook = self._compiled

    def _compiled(self, *_: object, **details: object) -> None:
        self.count += 1
        kernel = details.get("fn")
        name = getattr(kernel, "name", None) or details.get("repr", "a kernel")
        log.warning("%s was compiled while serving: warm-up missed this variant", name)
