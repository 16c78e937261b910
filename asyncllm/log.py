"""Logging and progress bars on stderr, set up the same way in every process of a server.

Owns the format of a line and the live bar below it; knows nothing of what is logged.
"""

from __future__ import annotations

import logging
import math
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from json import dumps
from typing import Self, TextIO

QUIET = ("aiohttp.access", "asyncio", "filelock", "httpcore", "httpx", "huggingface_hub",
         "transformers", "urllib3")  # fmt: skip
REDRAW_S = 0.1
LINE_S = 5.0
SELDOM_S = 60.0

_log = logging.getLogger("asyncllm.start")


def setup(level: str = "info", json: bool = False, who: str = "rank0") -> None:
    """Log to stderr from now on; calling again replaces the earlier set-up.

    Args:
        level: lowest severity to log, a name such as "info".
        json: one JSON object per line instead of ``HH:MM:SS.mmm LEVEL who module: message``.
        who: this process, e.g. "rank0" or "http1".
    """
    root = logging.getLogger()
    for old in [h for h in root.handlers if isinstance(h, StderrHandler)]:
        root.removeHandler(old)
        old.close()
    handler = StderrHandler(live=not json)
    handler.setFormatter(JsonFormatter(who) if json else LineFormatter(who))
    root.addHandler(handler)
    root.setLevel(level.upper())
    logging.captureWarnings(True)
    for name in QUIET:
        logging.getLogger(name).setLevel(max(logging.WARNING, root.level))


class RateLimitedLog:
    """Rate-limited warnings: at most one a minute, with a count of those suppressed.

    Args:
        logger: where they go, as warnings.
        clock: seconds, for tests.
    """

    def __init__(self, logger: logging.Logger, clock: Callable[[], float] = time.monotonic) -> None:
        self._logger, self._clock = logger, clock
        self._next, self._kept_back = -math.inf, 0

    def warning(self, text: str, *args: object) -> None:
        """As ``Logger.warning``; the next line counts what was suppressed."""
        if (now := self._clock()) < self._next:
            self._kept_back += 1
            return
        more = f" (and {self._kept_back} more since the last such line)" if self._kept_back else ""
        self._next, self._kept_back = now + SELDOM_S, 0
        self._logger.warning("%s%s", text % args, more)


@contextmanager
def phase(name: str) -> Iterator[None]:
    """Log ``name: 1.2 s`` when the block has ended; nothing if it raised."""
    start = time.monotonic()
    yield
    _log.info("%s: %.1f s", name, time.monotonic() - start)


class ProgressBar:
    """Progress of a download or a load; a context manager, for one thread.

    On a terminal it is a bar that is redrawn in place; elsewhere (a file, CI, --log_json) it is one
    log line per quarter or 5 s, whichever comes first. The end is always shown.

    Args:
        label: what is being done, e.g. "download SmolLM2".
        total_bytes: expected size; 0 if unknown.
        stream: where the bar is drawn; default: the current sys.stderr.
        clock: seconds, for tests.
    """

    def __init__(
        self,
        label: str,
        total_bytes: int,
        *,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.label, self.total_bytes, self.done_bytes = label, total_bytes, 0
        self._stream = stream if stream is not None else sys.stderr
        self._clock = clock
        self._start = self._shown = clock()
        self._quarter = 0
        self.live = self._stream.isatty() and all(h.live for h in _handlers())

    def __enter__(self) -> Self:
        if self.live:
            StderrHandler.bar = self
            self.draw()
        return self

    def advance(self, num_bytes: int) -> None:
        """Add ``num_bytes`` to the progress."""
        self.done_bytes += num_bytes
        waited = self._clock() - self._shown
        if self.live:
            if waited >= REDRAW_S:
                self.draw()
            return
        quarter = 4 * self.done_bytes // self.total_bytes if self.total_bytes else 0
        # the final line reports the last quarter
        if self._quarter < quarter < 4 or (waited >= LINE_S and quarter < 4):
            self._quarter, self._shown = max(quarter, self._quarter), self._clock()
            _log.info("%s", self.text())

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self.live:
            self.draw()
            self._stream.write("\n")
            self._stream.flush()
            StderrHandler.bar = None
        elif kind is None:
            _log.info("%s", self.text())

    def text(self) -> str:
        """``label: 42.0 of 93.1 MB (45 %), 12.3 MB/s``."""
        done, total = self.done_bytes / 1e6, self.total_bytes / 1e6
        speed = done / max(self._clock() - self._start, 1e-3)
        of = f" of {total:.1f} MB ({100 * done / total:.0f} %)" if total else " MB"
        return f"{self.label}: {done:.1f}{of}, {speed:.1f} MB/s"

    def draw(self) -> None:
        """Redraw the line in place, cut to the width of the terminal."""
        self._shown = self._clock()
        share = min(self.done_bytes / self.total_bytes, 1.0) if self.total_bytes else 0.0
        bar = f"[{'#' * round(20 * share):.<20}] "
        width = shutil.get_terminal_size().columns - 1
        self._stream.write(f"\r\x1b[K{(bar + self.text())[:width]}")
        self._stream.flush()

    def clear(self) -> None:
        """Remove the bar, to make room for a log line."""
        self._stream.write("\r\x1b[K")


class StderrHandler(logging.Handler):
    """Writes to the current sys.stderr (it may be replaced); keeps a live bar below the lines."""

    bar: ProgressBar | None = None

    def __init__(self, live: bool) -> None:
        super().__init__()
        self.live = live

    def emit(self, record: logging.LogRecord) -> None:
        try:
            line = self.format(record)
            if self.bar is not None:
                self.bar.clear()
            sys.stderr.write(line + "\n")
            sys.stderr.flush()
            if self.bar is not None:
                self.bar.draw()
        except (OSError, ValueError, TypeError):  # closed stderr, wrong arguments of a log call
            self.handleError(record)


class LineFormatter(logging.Formatter):
    """``12:34:56.789 INFO rank0 engine.device: message``, then a traceback if there is one."""

    def __init__(self, who: str) -> None:
        super().__init__(
            f"%(asctime)s.%(msecs)03d %(levelname)s {who} %(module_name)s: %(message)s",
            datefmt="%H:%M:%S",
        )

    def format(self, record: logging.LogRecord) -> str:
        record.module_name = record.name.removeprefix("asyncllm.")
        return super().format(record)


class JsonFormatter(logging.Formatter):
    """One object per line: time (UTC), level, who, module, message, and error if there is one."""

    def __init__(self, who: str) -> None:
        super().__init__()
        self.converter = time.gmtime
        self.who = who

    def format(self, record: logging.LogRecord) -> str:
        stamp = self.formatTime(record, "%Y-%m-%dT%H:%M:%S")
        entry = {
            "time": f"{stamp}.{int(record.msecs):03d}Z",
            "level": record.levelname,
            "who": self.who,
            "module": record.name.removeprefix("asyncllm."),
            "message": record.getMessage(),
        }
        if record.exc_info:
            entry["error"] = self.formatException(record.exc_info)
        return dumps(entry, ensure_ascii=False)


def _handlers() -> list[StderrHandler]:
    return [h for h in logging.getLogger().handlers if isinstance(h, StderrHandler)]
