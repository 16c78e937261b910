"""Renders chats with the model's template, in a helper process that is killed if it takes too long.

Owns the helper. Knows neither requests nor tokens; what runs in the helper is
:mod:`asyncllm.templates`.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque

from asyncllm.api.common.errors import NotServing
from asyncllm.errors import RequestError
from asyncllm.templates import MAX_FRAME, START_S, TemplateHelper, TemplateSet, frame

RENDER_S = 2.0
MINUTE_S = 60.0
MOST_DEATHS = 10  # helpers that die by themselves, per minute

log = logging.getLogger(__name__)


class TemplateRenderer:
    """One helper process, one chat at a time.

    Args:
        chats: the templates to render with.
        render_s: time limit per chat; when exceeded, the helper is replaced.
    """

    def __init__(self, chats: TemplateSet, *, render_s: float = RENDER_S) -> None:
        self._chats = chats
        self._render_s = render_s
        self._turn = asyncio.Lock()
        self._helper: TemplateHelper | None = None
        self._ready = False  # the helper has read the templates
        self._deaths: deque[float] = deque(maxlen=MOST_DEATHS)

    def start(self) -> None:
        """Start a helper for the first chat, if chats can be rendered.

        Where there is no descriptor or no memory for it, the next chat tries again.
        """
        if self._chats.fault:
            return
        try:
            self._helper, self._ready = TemplateHelper(self._chats), False
        except OSError as error:
            log.error("no process that renders chat templates can be started: %s", error.strerror)
            return
        self._helper.sock.setblocking(False)

    def stop(self) -> None:
        """Kill the helper."""
        if self._helper is not None:
            self._helper.kill()
            self._helper.process.wait()
            self._helper = None

    async def render(self, chat: bytes) -> bytes:
        """The helper's reply for a chat, to be decoded by ``templates.unpack``.

        Raises:
            RequestError: no usable template; rendering takes too long or kills the helper; 503:
                helpers keep dying.
        """
        if self._chats.fault:
            raise RequestError(
                f"this model's chat template cannot be used, so that only prompts that are texts"
                f" are answered (/v1/completions): {self._chats.fault}",
                param="messages",
            )
        async with self._turn:
            loop = asyncio.get_running_loop()
            if len(self._deaths) == MOST_DEATHS and loop.time() - self._deaths[0] < MINUTE_S:
                raise NotServing("the processes that render chat templates die, see the log")
            if self._helper is None:
                self.start()
            if self._helper is None:
                raise NotServing("no process that renders chat templates can be started")
            try:
                if not self._ready:
                    await self._ask(self._helper, self._helper.first, START_S)
                    self._ready = True
                return await self._ask(self._helper, frame(chat), self._render_s)
            except TimeoutError:
                await self._replace(self._helper)
                raise RequestError(
                    f"the chat template could not render these messages in {self._render_s:g} s",
                    param="messages",
                ) from None
            except (EOFError, ConnectionError):
                self._deaths.append(loop.time())
                code = await self._replace(self._helper)
                log.error("the process that renders chat templates ended with %d", code)
                raise RequestError(
                    "the process that rendered the chat template of these messages died",
                    param="messages",
                ) from None
            except asyncio.CancelledError:  # nobody will read the reply
                self.stop()
                raise

    async def _replace(self, helper: TemplateHelper) -> int:
        """Start a new helper; returns the exit code of the old one."""
        helper.kill()
        self._helper = None
        loop = asyncio.get_running_loop()
        code: int = await loop.run_in_executor(None, helper.process.wait)
        self.start()
        return code

    async def _ask(self, helper: TemplateHelper, content: bytes, seconds: float) -> bytes:
        """Send a frame and return the content of the reply."""
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(seconds):
            await loop.sock_sendall(helper.sock, content)
            got, size = bytearray(), 4
            while len(got) < size:
                if not (more := await loop.sock_recv(helper.sock, 1 << 18)):
                    raise EOFError
                got += more
                if size == 4 and len(got) >= 4:
                    size += int.from_bytes(got[:4], "little")
                    if size > MAX_FRAME:
                        raise EOFError
        return bytes(got[4:])
