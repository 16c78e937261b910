"""Chat templates run in a process that can be killed: bounds of time, memory and deaths."""

from __future__ import annotations

import asyncio
import errno
import json
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import uvloop

from asyncllm import templates
from asyncllm.actors import renderer as module
from asyncllm.actors.renderer import TemplateRenderer
from asyncllm.api.parsing.output_parser import dialect_of
from asyncllm.control_tokens import ControlTokens
from asyncllm.environment import python_command
from asyncllm.errors import RequestError, StartupError
from asyncllm.templates import TemplateSet
from tests.e2e.process import alive, wait_until

LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
TEMPLATE = (
    "{% set it = messages[-1].content %}"
    f"{{% if it == 'loop' %}}{LOOP}{{% endif %}}"
    "{% if it == 'power' %}{{ it|length ** (9 ** 9) }}{% endif %}"
    "{% if it == 'memory' %}{{ 'x' * 9000000000 }}{% endif %}"
    "{% if it == 'long' %}{{ 'x' * 20000000 }}{% endif %}"
    "{% if it == 'no' %}{{ raise_exception('not that') }}{% endif %}"
    "<s>{{ it }}{{ bos_token }}"
)


def chat(content: str, **kwargs: Any) -> bytes:
    messages = [{"role": "user", "content": content}]
    return json.dumps({"messages": messages, "tools": None, "kwargs": kwargs}).encode()


def play(work: Callable[[TemplateRenderer], Awaitable[Any]], render_s: float = 20.0) -> Any:
    async def main() -> Any:
        renderer = TemplateRenderer(
            TemplateSet({"default": TEMPLATE}, {"bos_token": "B"}), render_s=render_s
        )
        try:
            async with asyncio.timeout(60):
                return await work(renderer)
        finally:
            renderer.stop()

    return uvloop.run(main())


async def ask(renderer: TemplateRenderer, content: str, **kwargs: Any) -> list[Any]:
    return templates.unpack(await renderer.render(chat(content, **kwargs)))


def pid(renderer: TemplateRenderer) -> int:
    assert renderer._helper is not None
    return renderer._helper.process.pid


def test_prompts_heads_and_refusals() -> None:
    async def work(renderer: TemplateRenderer) -> list[list[Any]]:
        return [
            await ask(renderer, "é\ud800" + 300 * "y"),
            await ask(renderer, "Hi", continue_final_message=True),
            await ask(renderer, "no"),
            await ask(renderer, "memory"),
            await ask(renderer, "long"),
            await ask(renderer, "Hi"),
        ]

    whole, going_on, refused, memory, long, after = play(work)
    text = "<s>é\ud800" + 300 * "y" + "B"
    assert whole == [True, text, text[-256:], False]
    assert going_on == [True, "<s>Hi", "<s>", False]
    assert refused == [False, "the chat template refuses these messages: not that", "messages"]
    assert (memory[0], "1024 MiB" in memory[1]) == (False, True)
    assert (long[0], "limit 16,777,216" in long[1]) == (False, True)
    assert after == [True, "<s>HiB", "<s>HiB", False]


@pytest.mark.parametrize("content", ["loop", "power"])
def test_what_takes_too_long_is_killed_and_others_are_rendered(content: str) -> None:
    async def work(renderer: TemplateRenderer) -> list[Any]:
        first = await ask(renderer, "a")
        before = pid(renderer)
        renderer._render_s = 0.3
        bad = asyncio.create_task(ask(renderer, content))
        await asyncio.sleep(0)
        others = [asyncio.create_task(ask(renderer, c)) for c in "bc"]
        with pytest.raises(RequestError) as caught:
            await bad
        renderer._render_s = 20.0
        assert not alive(before)
        assert (caught.value.status, "0.3 s" in caught.value.message) == (400, True)
        return [first, *await asyncio.gather(*others)]

    assert [reply[1] for reply in play(work)] == ["<s>aB", "<s>bB", "<s>cB"]


def test_a_helper_that_dies_is_replaced_until_it_dies_all_the_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "MOST_DEATHS", 2)

    async def work(renderer: TemplateRenderer) -> list[RequestError]:
        errors = []
        for _ in range(3):
            try:
                await ask(renderer, "a")
                assert renderer._helper is not None
                renderer._helper.process.kill()
                await ask(renderer, "b")
            except RequestError as error:
                errors.append(error)
        monkeypatch.setattr(module, "MINUTE_S", -1.0)
        assert (await ask(renderer, "c"))[1] == "<s>cB"
        return errors

    errors = play(work)
    assert [error.status for error in errors] == [400, 400, 503]
    assert "died" in errors[0].message


def test_a_helper_that_cannot_be_started_costs_one_chat(monkeypatch: pytest.MonkeyPatch) -> None:
    def none_left(*_: object) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    async def work(renderer: TemplateRenderer) -> None:
        with monkeypatch.context() as patched:
            patched.setattr(module, "TemplateHelper", none_left)
            renderer.start()
            with pytest.raises(RequestError, match="can be started") as caught:
                await ask(renderer, "x")
            assert caught.value.status == 503
        assert (await ask(renderer, "x"))[1] == "<s>xB"

    play(work)


def test_an_idle_helper_takes_no_part_in_a_stop() -> None:
    async def work(renderer: TemplateRenderer) -> int:
        renderer.start()
        return pid(renderer)

    assert not alive(play(work))


def test_the_helper_dies_with_its_parent() -> None:
    source = (
        "import sys, time; from asyncllm.templates import TemplateHelper, TemplateSet;"
        "h = TemplateHelper(TemplateSet({'default': sys.argv[1]}, {}));"
        "h.sock.sendall(h.first); print(h.process.pid, flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", source, "{{ 9 ** (9 ** 9) }}"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        helper = int(parent.stdout.readline())
        assert wait_until(lambda: _cpu_s(helper) > 0.3, 20), "it reads the template"
        parent.kill()
    assert wait_until(lambda: not alive(helper), 10)


def _cpu_s(pid: int) -> float:
    with open(f"/proc/{pid}/stat") as file:
        fields = file.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / 100


def test_the_helper_is_small() -> None:
    source = "import sys, asyncllm.templates; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", source], capture_output=True, check=True, timeout=60
    )
    assert not {"torch", "numpy", "transformers", "asyncio", "ssl"} & {
        *done.stdout.decode().split()
    }


# -- at the start --------------------------------------------------------------------------------------


def test_children_import_nothing_from_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be a downloaded model's, or hold a clone named asyncllm."""
    (tmp_path / "asyncllm").mkdir()
    (tmp_path / "msgpack.py").write_text("raise SystemExit(9)")
    monkeypatch.chdir(tmp_path)
    assert templates.read_dialect(TemplateSet({"default": "{{ mode }}"}, {}))[0].variables == {
        "mode"
    }


def test_children_start_from_a_folder_that_may_not_be_entered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As that of root for another user."""

    def denied(*_: object) -> bool:
        raise PermissionError

    monkeypatch.setattr(Path, "samefile", denied)
    assert python_command("-m", "m") == [sys.executable, "-P", "-m", "m"]


def test_the_dialect_is_what_the_templates_show() -> None:
    some = {
        "default": "{{ messages }}<think></think>{{ mode }}",
        "tool_use": "{{ tools }}<tool_call>",
    }
    found, _ = templates.read_dialect(TemplateSet(some, {"bos_token": "<s>"}), None, None)
    assert found.variables == {"messages", "mode", "tools"}
    assert found == templates.read_dialect(TemplateSet(some, {}), "qwen25", "think")[0]
    assert (found.calls, found.reasoning) == ("qwen25", "think")
    assert dialect_of(some).calls == found.calls


@pytest.mark.parametrize(
    ("template", "known"),
    [
        ("{% for m in messages %}{% if m.role == 'context' or 'tool' == m['role'] %}{% endif %}"
         "{% endfor %}", {"context", "tool"}),
        ("{% for m in messages %}{% set role = m.role %}{% if role|lower in ['critic', 'user'] %}"
         "{{ m.kind == 'odd' }}{% endif %}{% endfor %}", {"critic", "user"}),
        ("{{ messages | selectattr('role', 'equalto', 'observation') | list }}", {"observation"}),
        ("{% set heads = {'human': 'H:', 'bot': 'B:'} %}{% for m in messages %}{{ heads[m.role] }}"
         "{% endfor %}", {"human", "bot"}),
        ("{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}", {"observation"}),
        ("{% for m in messages %}<|im_start|>{{ m.role }}{% endfor %}", set()),
    ],
)  # fmt: skip
def test_roles_that_a_template_knows(template: str, known: set[str]) -> None:
    controls = ControlTokens({"<|observation|>": False, "<|im_start|>": False, "</s>": False})
    made = TemplateSet({"default": template}, {}, controls)
    assert templates.read_dialect(made)[0].roles == known


@pytest.mark.parametrize(
    ("template", "told"),
    [
        ("{{ 9**(9**9) }}", "not be compiled within 2 s"),
        ("a\n{% if %}", "line 2"),
        ("{#" * 200_000 + "#}" + "{{" * 10, "chat template"),
    ],
)
def test_a_bad_template_is_told_in_a_line(template: str, told: str) -> None:
    with pytest.raises(StartupError, match=told) as caught:
        templates.read_dialect(TemplateSet({"default": template}, {}), seconds=2.0)
    assert "\n" not in str(caught.value)
