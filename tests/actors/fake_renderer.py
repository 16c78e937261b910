"""Renders chats without a process of its own."""

from __future__ import annotations

from functools import partial

from asyncllm import templates
from asyncllm.api.common.chat_template import ChatTemplate
from asyncllm.text import ModelTokenizer


class FakeRenderer:
    def __init__(self, text: ModelTokenizer) -> None:
        self._text = text
        self._template = ChatTemplate(text.templates, text.special_tokens)
        self.life: list[str] = []

    def start(self) -> None:
        self.life.append("start")

    def stop(self) -> None:
        self.life.append("stop")

    async def render(self, chat: bytes) -> bytes:
        return templates.answer(
            partial(templates.render, self._template, self._text.controls, chat)
        )
