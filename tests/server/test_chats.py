"""What a process loads to render chats: templates that do not compile, control tokens apart."""

from __future__ import annotations

import asyncio
import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from asyncllm.actors.renderer import TemplateRenderer
from asyncllm.config import Config
from asyncllm.errors import RequestError, StartupError
from asyncllm.models.spec import ModelSpec
from asyncllm.server.loading import Loaded, with_chats
from asyncllm.text import load_tokenizer
from tests.server.test_launch import boot

SAYS = "{% for m in messages %}{{ m.content }}{% endfor %}"
ASCII = "{% for m in messages %}{{ m.content | tojson(ensure_ascii=True) }}{% endfor %}"


def load(tiny_dir: Path, templates: Any, **options: Any) -> Loaded:
    """The parts of rank 0 for the tiny model with these templates."""
    text = load_tokenizer(str(tiny_dir))
    text = replace(text, templates=templates)
    config = Config(**options, explicit=frozenset(options))
    told = replace(boot(), endpoint=0, config=config)
    spec = ModelSpec.from_dir(tiny_dir)
    return with_chats(Loaded(told, spec, None, None, None, None, None), text)


def ask(loaded: Loaded) -> bytes:
    async def one() -> bytes:
        assert loaded.chats is not None
        renderer = TemplateRenderer(loaded.chats)
        renderer.start()
        try:
            messages = [{"role": "user", "content": "Hi"}]
            return await renderer.render(json.dumps({"messages": messages, "kwargs": {}}).encode())
        finally:
            renderer.stop()

    return asyncio.run(one())


@pytest.mark.parametrize("name", ["default", "tool_use"])
def test_a_template_that_does_not_compile_stops_chats_only(
    tiny_dir: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        loaded = load(tiny_dir, {"default": SAYS, name: "a\n{% if %}"})
    assert loaded.text is not None
    assert loaded.dialect is not None
    [line] = caplog.messages
    assert line.startswith("chats are refused, other prompts are not: chat template, line 2: ")
    with pytest.raises(RequestError, match=r"only prompts that are texts are answered .*line 2"):
        ask(loaded)


def test_templates_that_nobody_uses_may_be_anything(
    tiny_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):  # whatever level other tests have left
        loaded = load(tiny_dir, {"default": SAYS, "rag": "{% if %}"})
        assert b"Hi" in ask(loaded)
    assert not caplog.messages


def test_the_start_says_where_control_tokens_cannot_be_told_apart(
    tiny_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        loaded = load(tiny_dir, {"default": ASCII})
    [line] = caplog.messages
    assert line.startswith("control tokens that users and tools spell are taken for these tokens")
    assert "the chat template changes what users or tools say" in line
    assert loaded.chats is not None
    assert loaded.chats.controls is None
    option = {"control_tokens_in_content": "text"}
    with pytest.raises(StartupError, match=r"^--control_tokens_in_content text: the chat template"):
        load(tiny_dir, {"default": ASCII}, **option)
    assert load(tiny_dir, {"default": SAYS}, **option).chats.controls  # type: ignore[union-attr]
    other = load(tiny_dir, {"default": SAYS}, control_tokens_in_content="token")
    assert other.chats.controls is None  # type: ignore[union-attr]
