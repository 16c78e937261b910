"""What restricts or shifts the tokens of one request, on the embedded model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from tests.e2e.process import Server

COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"


def test_only_allowed_tokens_come(server: Server, tokenizer: Tokenizer) -> None:
    few = [tokenizer.encode(word).ids[0] for word in (" yes", " no", " maybe")]
    ids = tokenizer.encode("Is the sky blue?").ids
    out = server.tokens(ids, 12, allowed_token_ids=few, ignore_eos=True, do_sample=True, seed=1)
    assert set(out) <= set(few)
    assert len(out) == 12
    assert len(set(out)) > 1
    body: dict[str, Any] = {"prompt": "Is the sky blue?", "max_tokens": 3, "temperature": 0}
    (choice,) = server.post(COMPLETIONS, {**body, "allowed_token_ids": few[:1]})["choices"]
    assert choice["text"].split() == ["yes"] * len(choice["text"].split())


def test_a_length_penalty_ends_an_answer_soon_after_its_start(server: Server) -> None:
    body: dict[str, Any] = {"prompt": "Once upon a time", "max_tokens": 60, "temperature": 0}
    free = server.post(COMPLETIONS, body)
    assert free["usage"]["completion_tokens"] > 25
    short = server.post(COMPLETIONS, {**body, "exponential_decay_length_penalty": [8, 3.0]})
    assert short["choices"][0]["finish_reason"] == "stop"
    assert 9 <= short["usage"]["completion_tokens"] <= 20
    assert free["choices"][0]["text"].startswith(short["choices"][0]["text"])
    parameters = {"exponential_decay_length_penalty": [8, 3.0], "max_new_tokens": 60}
    native = server.post("/generate", {"inputs": body["prompt"], "parameters": parameters})
    assert native["count_output_tokens"] == short["usage"]["completion_tokens"]


@pytest.fixture(scope="module")
def thinker(demo_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The embedded model with a template that opens reasoning."""
    folder = tmp_path_factory.mktemp("thinker")
    for file in demo_dir.iterdir():
        (folder / file.name).symlink_to(file)
    config = json.loads((demo_dir / "tokenizer_config.json").read_text())
    (template,) = config["chat_template"]
    template["template"] += "{% if add_generation_prompt %}{{ '<think>\n' }}{% endif %}"
    (folder / "tokenizer_config.json").unlink()
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    more = ("--data_type", "fp32", "--reasoning_parser", "think")
    with Server(folder, folder / "log", *more) as running:
        yield running


def test_choices_share_the_computation_of_their_prompt(
    demo_dir: Path, tmp_path: Path, prose: list[int]
) -> None:
    body = {"prompt": prose[:600], "n": 4, "max_tokens": 5, "temperature": 1, "seed": 1}
    with Server(demo_dir, tmp_path / "log", "--diverse_mode", "--data_type", "fp32") as diverse:
        reply = diverse.post(COMPLETIONS, body)
        assert diverse.metric("asyncllm_prompt_tokens_computed_total") == 600 + 3
        assert len({choice["text"] for choice in reply["choices"]}) > 1


def test_the_end_of_a_prompt_is_spelled_anew(
    demo_dir: Path, tmp_path: Path, server: Server, tokenizer: Tokenizer
) -> None:
    cut = "Once upon a tim"
    ids = tokenizer.encode(cut).ids
    body: dict[str, Any] = {"prompt": cut, "temperature": 0, "logprobs": 0, "max_tokens": 3}
    with Server(demo_dir, tmp_path / "log", "--token_healing_mode", "--data_type", "fp32") as heals:
        reply = heals.post(COMPLETIONS, body)
        (choice,) = reply["choices"]
        assert not server.post(COMPLETIONS, body)["choices"][0]["text"].startswith("e")
        assert choice["text"].startswith("e")
        assert choice["logprobs"]["tokens"][0] == " time"
        usage = reply["usage"]
        assert (usage["prompt_tokens"], usage["completion_tokens"]) == (len(ids), 3)
        assert len(choice["logprobs"]["token_logprobs"]) == 3
        plain = {"max_new_tokens": 3, "return_details": True}
        native = heals.post("/generate", {"inputs": cut, "parameters": plain})
        assert native["generated_text"] == [choice["text"]]
        assert "".join(token["text"] for token in native["tokens"]) == choice["text"]
        echoed = heals.post(COMPLETIONS, {**body, "echo": True, "logprobs": None})
        assert echoed["choices"][0]["text"] == cut + choice["text"]
        for more in ({"prompt": ids}, {"guided_regex": "[a-z]{3}"}, {"echo": True}):
            mine, other = (one.post(COMPLETIONS, {**body, **more}) for one in (heals, server))
            assert mine["choices"][0]["text"] == other["choices"][0]["text"], "these stay"


def ask(server: Server, **more: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": "Why is the sky blue?"}]
    body = {"messages": messages, "temperature": 0, "max_tokens": 60, "logprobs": True, **more}
    return server.post(CHAT, body)


def test_reasoning_ends_at_its_limit(thinker: Server) -> None:
    free = ask(thinker)
    assert free["choices"][0]["message"]["content"] is None, "it never ends by itself"
    for limit in (0, 7):
        reply = ask(thinker, max_thinking_tokens=limit)
        (choice,) = reply["choices"]
        assert choice["message"]["content"]
        thoughts = choice["message"].get("reasoning") or ""
        assert free["choices"][0]["message"]["reasoning"].startswith(thoughts)
        assert bool(thoughts) == bool(limit)
        tokens = [t["token"] for t in choice["logprobs"]["content"]]
        assert "".join(tokens[limit:]).startswith("</think>")
        told = reply["usage"]["completion_tokens_details"]["reasoning_tokens"]
        assert limit <= told <= limit + 4


def test_the_form_of_an_answer_begins_behind_reasoning(thinker: Server) -> None:
    form = {"guided_regex": "(yes|no)!", "max_thinking_tokens": 9}
    (choice,) = ask(thinker, **form)["choices"]
    assert choice["message"]["content"] in ("yes!", "no!")
    assert choice["message"]["reasoning"]
    assert choice["finish_reason"] == "stop"
    cut = ask(thinker, guided_regex="(yes|no)!", max_tokens=20)["choices"][0]
    assert (cut["message"]["content"], cut["finish_reason"]) == (None, "length")
    messages = {"max_tokens": 60, "messages": [{"role": "user", "content": "Why?"}]}
    thinking = {"type": "enabled", "budget_tokens": 5}
    schema = {
        "type": "object",
        "properties": {"a": {"enum": [1, 2]}},
        "required": ["a"],
        "additionalProperties": False,
    }
    form = {"output_format": {"type": "json_schema", "schema": schema}}
    blocks = thinker.post("/v1/messages", {**messages, "thinking": thinking, **form})["content"]
    assert [block["type"] for block in blocks] == ["thinking", "text"]
    assert blocks[1]["text"] in ('{"a": 1}', '{"a": 2}')
