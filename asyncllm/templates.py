"""The process in which chat templates run, and how to start one.

Jinja gives no bound to what a template computes, so that none is ever compiled or rendered in a
process of the server: a helper does it, which can be killed. It holds no model and no secret, may
use MEMORY bytes, and dies with its parent.

    parent -> helper: msgpack [templates, special_tokens, calls, thoughts], once; then chats as JSON
    helper -> parent: msgpack [True, dialect's fields, variables] once; then [True, prompt, head]
    for each chat;
        [False, message, param] instead for what cannot be done

A frame is its length in four bytes and its content. Run as ``python -m asyncllm.templates``.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import resource
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from typing import Any

import msgpack

from asyncllm.api.common.chat_template import ChatTemplate, variables
from asyncllm.api.parsing.output_parser import Dialect, dialect_of
from asyncllm.environment import child_environment
from asyncllm.errors import AsyncllmError, RequestError, StartupError

START_S = 10.0  # for the helper to start and to read the templates
MEMORY = 1 << 30
MAX_PROMPT = 16 << 20  # bytes that a template may make of a chat
MAX_FRAME = MAX_PROMPT + (1 << 16)
HEAD_CHARS = 256  # of a chat's prompt that is told apart: more than any mark at its end
PR_SET_PDEATHSIG = 1

Reply = list[Any]  # what the helper says, as above


class Helper:
    """A helper process that has been started; it may still be reading the templates.

    Args:
        templates, special_tokens: as ``ChatTemplate`` takes them.
        calls, thoughts: as ``dialect_of`` takes them.

    Attributes:
        sock: this end of the connection.
    """

    def __init__(
        self,
        templates: Mapping[str, str],
        special_tokens: Mapping[str, str],
        calls: str | None = None,
        thoughts: str | None = None,
    ) -> None:
        self.sock, theirs = socket.socketpair()
        told = [dict(templates), dict(special_tokens), calls, thoughts, os.getpid()]
        self.first = frame(msgpack.packb(told, unicode_errors="surrogatepass"))
        with theirs:
            # a session of its own: a terminal's Ctrl-C is for rank 0 alone
            self.process: subprocess.Popen[bytes] = subprocess.Popen(
                [sys.executable, "-m", "asyncllm.templates"],
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                start_new_session=True,
                env=child_environment(),
            )

    def kill(self) -> None:
        """End it at once; it is a zombie until ``process.wait()``."""
        self.process.kill()
        self.sock.close()


def read_dialect(
    templates: Mapping[str, str],
    special_tokens: Mapping[str, str],
    calls: str | None = None,
    thoughts: str | None = None,
    *,
    seconds: float = START_S,
) -> Dialect:
    """How a model writes, from its chat templates. Blocks.

    Args:
        as for ``Helper``.

    Raises:
        StartupError: they cannot be compiled, or not within ``seconds``.
    """
    helper = Helper(templates, special_tokens, calls, thoughts)
    try:
        helper.sock.settimeout(seconds)
        helper.sock.sendall(helper.first)
        reply = unpack(_receive(helper.sock))
    except TimeoutError:
        raise StartupError(
            f"the model's chat template could not be compiled within {seconds:g} s"
        ) from None
    except (EOFError, ConnectionError):
        raise StartupError(
            "the model's chat template cannot be compiled: the process that tried ended with"
            f" {helper.process.wait()}"
        ) from None
    finally:
        helper.kill()
        helper.process.wait()
    if not reply[0]:
        raise StartupError(reply[1])
    fields, read = reply[1:]
    return Dialect(**dict(fields) | {"variables": frozenset(read)})


def frame(content: bytes) -> bytes:
    """As it goes over the connection."""
    return len(content).to_bytes(4, "little") + content


def unpack(content: bytes) -> Reply:
    """What a frame of the helper says."""
    reply: Reply = msgpack.unpackb(content, unicode_errors="surrogatepass")
    return reply


def _receive(sock: socket.socket) -> bytes:
    """The next frame. Raises EOFError."""
    return _exactly(sock, int.from_bytes(_exactly(sock, 4), "little"))


def _exactly(sock: socket.socket, size: int) -> bytes:
    got = bytearray()
    while len(got) < size:
        if not (more := sock.recv(min(size - len(got), 1 << 18))):
            raise EOFError
        got += more
    return bytes(got)


# -- in the helper ---------------------------------------------------------------------------------


def _describe(templates: dict[str, str], special: dict[str, str], *known: str | None) -> Reply:
    fields = asdict(dialect_of(templates, *known))
    del fields["variables"]
    return [fields, sorted(variables(templates, special))]


def render(template: ChatTemplate, content: bytes) -> Reply:
    """The prompt of a chat in JSON, and the head of its end. Raises RequestError."""
    chat = json.loads(content)
    text = template.render(chat)
    size = len(text.encode("utf-8", "surrogatepass"))
    if size > MAX_PROMPT:
        raise RequestError(
            f"the chat template makes {size:,} bytes of these messages, limit {MAX_PROMPT:,}",
            param="messages",
        )
    going_on = chat["kwargs"].get("continue_final_message")
    continued = chat["messages"][-1]["content"] if going_on else ""
    return [text, text.removesuffix(continued)[-HEAD_CHARS:]]


def answer(work: Callable[[], Reply]) -> bytes:
    """The content of a frame: what ``work`` gives, or why it gives nothing."""
    try:
        reply = [True, *work()]
    except MemoryError:
        reply = [
            False,
            f"the chat template needs more than {MEMORY >> 20} MiB for this",
            "messages",
        ]
    except RequestError as error:
        reply = [False, str(error), error.param]
    except AsyncllmError as error:
        reply = [False, str(error), None]
    packed: bytes = msgpack.packb(reply, unicode_errors="surrogatepass")
    return packed


def main() -> None:
    """Serve the parent on standard input until it closes it."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a whole service is told to stop; we end with it
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    sock = socket.socket(fileno=0)
    with contextlib.suppress(EOFError, ConnectionError):
        templates, special, calls, thoughts, parent = unpack(_receive(sock))
        if os.getppid() != parent:
            return

        template: ChatTemplate | None = None

        def read() -> Reply:
            nonlocal template
            template = ChatTemplate(templates, special)
            return _describe(templates, special, calls, thoughts)

        sock.sendall(frame(answer(read)))
        while template is not None:
            sock.sendall(frame(answer(partial(render, template, _receive(sock)))))


if __name__ == "__main__":
    main()
