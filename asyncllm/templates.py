"""The helper process that compiles and renders chat templates, and how to start it.

Jinja does not bound what a template computes, so no process of the server compiles or renders one:
a helper does, and it can be killed. It holds no model and no secret, may use MEMORY bytes of
memory, and dies with its parent.

    parent -> helper: msgpack [templates, special_tokens, control tokens, calls, thoughts], once;
        then chats as JSON
    helper -> parent: msgpack [True, dialect's fields, variables, roles, mixes] once; then
        [True, prompt, head, named] for each chat; or [False, message, param] if it failed

A frame is a length of four bytes and the content. Run as ``python -m asyncllm.templates``.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import re
import resource
import signal
import socket
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import msgpack

from asyncllm.api.common.chat_template import ChatTemplate, roles, variables
from asyncllm.api.parsing.output_parser import Dialect, dialect_of
from asyncllm.api.parsing.tools.detect import LIST
from asyncllm.control_tokens import ControlTokens
from asyncllm.environment import child_environment, python_command
from asyncllm.errors import AsyncllmError, RequestError, StartupError
from asyncllm.plain import Json, JsonObject

START_S = 10.0  # for the helper to start and to read the templates
MEMORY = 1 << 30
MAX_PROMPT = 16 << 20  # bytes of a rendered chat
MAX_FRAME = MAX_PROMPT + (1 << 16)
HEAD_CHARS = 256  # at the prompt's end that are searched for marks: more than any mark
PR_SET_PDEATHSIG = 1

HelperReply = list[Any]  # a reply of the helper, as above


@dataclass(frozen=True, slots=True)
class TemplateSet:
    """The chat templates of a model and what is needed to render them.

    Attributes:
        templates, special_tokens: as for ``ChatTemplate``.
        controls: control tokens to tell from merely spelled ones; None: not told apart.
        fault: why chats cannot be rendered; "": they can.
    """

    templates: Mapping[str, str]
    special_tokens: Mapping[str, str]
    controls: ControlTokens | None = None
    fault: str = ""


class TemplateHelper:
    """A helper process that has been started; it may still be reading the templates.

    Args:
        calls, thoughts: as ``dialect_of`` takes them.

    Attributes:
        sock: this end of the connection.
    """

    def __init__(
        self, chats: TemplateSet, calls: str | None = None, thoughts: str | None = None
    ) -> None:
        self.sock, theirs = socket.socketpair()
        controls = chats.controls
        secret = controls and [controls.spelled, controls.hidden, controls.meant]
        known = calls, thoughts, os.getpid()
        told = (dict(chats.templates), dict(chats.special_tokens), secret, *known)
        self.first = frame(msgpack.packb(told, unicode_errors="surrogatepass"))
        with theirs:
            # its own session: a terminal's Ctrl-C is for rank 0 only
            self.process: subprocess.Popen[bytes] = subprocess.Popen(
                python_command("-m", "asyncllm.templates"),
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                start_new_session=True,
                env=child_environment(),
            )

    def kill(self) -> None:
        """Kill it; it stays a zombie until ``process.wait()``."""
        self.process.kill()
        self.sock.close()


def read_dialect(
    chats: TemplateSet,
    calls: str | None = None,
    thoughts: str | None = None,
    *,
    seconds: float = START_S,
) -> tuple[Dialect, bool]:
    """Detect the output format of a model from its chat templates, and whether these mix up real
    and merely spelled control tokens. Blocks.

    Args:
        as for ``TemplateHelper``.

    Raises:
        StartupError: they do not compile, or take longer than ``seconds``.
    """
    helper = TemplateHelper(chats, calls, thoughts)
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
            "the model's chat template cannot be compiled: the helper process exited with"
            f" {helper.process.wait()}"
        ) from None
    finally:
        helper.kill()
        helper.process.wait()
    if not reply[0]:
        raise StartupError(reply[1])
    fields, read, told, mixes = reply[1:]
    named = {"variables": frozenset(read), "roles": frozenset(told)}
    return Dialect(**dict(fields) | named), mixes


def frame(content: bytes) -> bytes:
    """The bytes to send for ``content``."""
    return len(content).to_bytes(4, "little") + content


def unpack(content: bytes) -> HelperReply:
    """Decode the content of a frame."""
    reply: HelperReply = msgpack.unpackb(content, unicode_errors="surrogatepass")
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


def _describe(
    templates: dict[str, str], special: dict[str, str], *known: str | None
) -> HelperReply:
    fields = asdict(dialect_of(templates, *known))
    del fields["variables"], fields["roles"]
    return [fields, sorted(variables(templates, special)), sorted(roles(templates))]


def marked_roles(template: ChatTemplate, controls: ControlTokens) -> list[str]:
    """Roles that a template would turn into a control token of the vocabulary, because it builds
    the marks of a turn from any role it is given (``<|observation|>``)."""
    role = "zq"
    try:
        text = template.render({"messages": [{"role": role, "content": ""}]})
    except RequestError:
        return []
    if f"<|{role}|>" not in text:
        return []
    return [token[2:-2] for token in controls.spelled if re.fullmatch(r"<\|[a-z]+\|>", token)]


def mixes(template: ChatTemplate, controls: ControlTokens) -> bool:
    """Whether the template alters what users or tools say, or tool descriptions, such that marks
    in them are lost."""
    usual, hidden = "so be it", controls.hide(f"so {next(iter(controls.spelled), '')} it")
    for plain, marked in zip(_chats_of(usual), _chats_of(hidden), strict=True):
        try:
            if usual not in template.render(plain):
                continue
        except RequestError:
            continue
        try:
            if hidden not in template.render(marked):
                return True
        except RequestError:
            return True
    return False


def _chats_of(said: str) -> list[JsonObject]:
    """Chats in which a user, a tool and descriptions of tools say something."""
    asked: Json = {"role": "user", "content": "Hi"}
    function: JsonObject = {"name": "f", "arguments": {}}
    call: Json = {"type": "function", "id": "f00000000", "function": function}
    called: Json = {"role": "assistant", "content": "", "tool_calls": [call]}
    result: Json = {"role": "tool", "name": "f", "tool_call_id": "f00000000", "content": said}
    system: Json = {"role": "system", "content": LIST, "listed": said}
    tool: Json = {"name": "f", "description": said, "parameters": {"type": "object"}}
    return [
        {"messages": [{"role": "user", "content": said}]},
        {"messages": [asked, called, result]},
        {"messages": [system, asked]},
        {"messages": [asked], "tools": [{"type": "function", "function": tool}]},
    ]


def render(template: ChatTemplate, controls: ControlTokens | None, content: bytes) -> HelperReply:
    """Render a chat given as JSON: the prompt, the text at its end that opens the answer, and
    whether the prompt has names for control tokens. Raises RequestError."""
    chat = json.loads(content)
    going_on = chat["kwargs"].get("continue_final_message")
    continued = chat["messages"][-1]["content"] if going_on else ""
    named = None
    if controls is not None:
        chat["messages"] = controls.hide_in(chat["messages"])
        chat["tools"] = controls.within(chat.get("tools"))
    text = template.render(chat)
    if controls is not None:
        text, named = controls.reveal(text)
    size = len(text.encode("utf-8", "surrogatepass"))
    if size > MAX_PROMPT:
        raise RequestError(
            f"the chat template renders these messages to {size:,} bytes, limit {MAX_PROMPT:,}",
            param="messages",
        )
    head = text.removesuffix(continued)[-HEAD_CHARS:]
    return [text if named is None else named, head, named is not None]


def answer(work: Callable[[], HelperReply]) -> bytes:
    """The reply frame: the result of ``work``, or why it failed."""
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
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # for the whole service; we end with our parent
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    sock = socket.socket(fileno=0)
    with contextlib.suppress(EOFError, ConnectionError):
        templates, special, secret, calls, thoughts, parent = unpack(_receive(sock))
        if os.getppid() != parent:
            return

        template: ChatTemplate | None = None
        controls = None if secret is None else ControlTokens(*secret)

        def read() -> HelperReply:
            nonlocal template
            template = ChatTemplate(templates, special)
            fields, read, told = _describe(templates, special, calls, thoughts)
            mixed = controls is not None and mixes(template, controls)
            if controls is not None:
                told = sorted({*told, *marked_roles(template, controls)})
            return [fields, read, told, mixed]

        sock.sendall(frame(answer(read)))
        while template is not None:
            sock.sendall(frame(answer(partial(render, template, controls, _receive(sock)))))


if __name__ == "__main__":
    main()
