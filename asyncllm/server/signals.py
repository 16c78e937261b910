"""Signal handling: draining a server, logging its state, ending it at once.

Knows signals and threads; the process supplies the actions.
"""

from __future__ import annotations

import ctypes
import faulthandler
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    import asyncio

STDERR = 2
PR_SET_PDEATHSIG = 1
DRAIN = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
SHOW = signal.SIGUSR1
# for whole groups of processes: a terminal's Ctrl-C, Ctrl-\ and hang-up, systemd's stop
_GROUP = (*DRAIN, signal.SIGQUIT)
# these do not end a process by default, or report a crash
_OTHERS = {
    signal.SIGKILL, signal.SIGSTOP, signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU, signal.SIGCONT,
    signal.SIGCHLD, signal.SIGURG, signal.SIGWINCH, signal.SIGPIPE, signal.SIGXFSZ, signal.SIGSEGV,
    signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGABRT, signal.SIGTRAP, signal.SIGSYS,
}  # fmt: skip

log = logging.getLogger(__name__)


def _deadly() -> set[int]:
    """Signals that would end this process without a trace and have no handler here."""
    rest = set(signal.valid_signals()) - {*DRAIN, SHOW, *_OTHERS}
    return {number for number in rest if signal.getsignal(number) is signal.SIG_DFL}


def end(code: int) -> NoReturn:
    """End this process with ``code`` after its work is done.

    Skips the interpreter's shutdown: it destroys what CUDA and NCCL have loaded in arbitrary order,
    while their threads still run, and has crashed drained servers with SIGSEGV.
    """
    sys.stdout.flush()
    logging.shutdown()
    sys.stderr.flush()
    os._exit(code)


def hold() -> None:
    """Block the signals that :class:`SignalWatcher` handles until there is one. Call before threads
    start."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {SHOW, *_deadly()})


class SignalWatcher:
    """Handles signals in a separate thread, so that it works whatever the event loop does.

    SIGUSR1 writes the stacks of all threads and ``state`` to the log. In rank 0 all signals that
    would end the process, and are not for draining, call ``leave``, so that nothing is left behind.

    Attributes:
        state: lines about what this process is doing; replaced as that changes.
        forward: passes the signal on to the other processes.
        leave: called with the exit code, in the thread.
    """

    def __init__(self, name: str, *, leads: bool) -> None:
        self.state: Callable[[], Iterable[str]] = lambda: ["starting"]
        self.forward: Callable[[], None] = lambda: None
        self.leave: Callable[[int], object] = os._exit
        self._name = name
        self._numbers = {int(SHOW), *(_deadly() if leads else ())}
        signal.pthread_sigmask(signal.SIG_BLOCK, self._numbers)
        threading.Thread(target=self._wait_forever, name="signals", daemon=True).start()

    def _wait_forever(self) -> None:
        while True:
            number = signal.sigwait(self._numbers)
            if number == SHOW:
                self.show()
            else:
                log.critical("%s: stopped at once by %s", self._name, _name(number))
                self.leave(128 + number)

    def show(self) -> None:
        """Log stacks and state, whatever the log level: somebody asked."""
        level = max(logging.INFO, log.getEffectiveLevel())
        log.log(level, "%s: stacks of all threads", self._name)
        faulthandler.dump_traceback(STDERR)
        for line in self.state():
            log.log(level, "%s: %s", self._name, line)
        self.forward()


def _name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # a real-time signal
        return f"signal {number}"


@contextmanager
def for_child() -> Iterator[None]:
    """Block signals to process groups for children started inside, until they ignore them."""
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {*_GROUP, SHOW})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def die_with_parent(parent: int) -> None:
    """Ask the kernel to kill this process when ``parent`` dies."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent:  # it ended before the kernel was told
        os._exit(1)


def leave_to_leader() -> None:
    """In a child: signals to the group reach rank 0 too, which drains and then notifies us.

    Acting on them here would cut off running requests.
    """
    for number in _GROUP:
        signal.signal(number, signal.SIG_IGN)
    waiting = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    signal.pthread_sigmask(signal.SIG_UNBLOCK, waiting - {SHOW})


def end_when_stopped(*, code: int | None = 0) -> None:
    """Until :func:`handle_draining`, let draining signals end this process with a log line.

    This matters for the first process of a container: there the kernel ignores signals without
    handlers.

    Args:
        code: the exit code; None: 128 plus the signal's number, since the command has not finished.
    """

    def end(number: int, _: object) -> None:
        os.write(STDERR, f"asyncllm: stopped while starting, by {_name(number)}\n".encode())
        os._exit(128 + number if code is None else code)

    for number in draining():
        signal.signal(number, end)


def hold_draining() -> None:
    """Block draining signals until :func:`handle_draining`."""
    signal.pthread_sigmask(signal.SIG_BLOCK, DRAIN)


def handle_draining(loop: asyncio.AbstractEventLoop, drain: Callable[[], object]) -> None:
    """Call ``drain`` on the loop from now on."""
    for number in draining():
        loop.add_signal_handler(number, drain)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, DRAIN)


def draining() -> list[signal.Signals]:
    """Signals that drain the server: SIGHUP only if it was not ignored at start (nohup)."""
    ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return [n for n in DRAIN if not (n == signal.SIGHUP and ignored)]
