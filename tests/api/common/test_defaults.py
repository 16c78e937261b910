"""generation_config.json where a request is silent, in every protocol."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from asyncllm import rank
from asyncllm.api.anthropic import request as anthropic
from asyncllm.api.common.defaults import Defaults, read_defaults
from asyncllm.api.common.request import ServedModel
from asyncllm.api.lightllm import request as lightllm
from asyncllm.api.openai import request as openai
from asyncllm.api.responses import request as responses
from asyncllm.api.tgi import request as tgi
from asyncllm.config import Config
from asyncllm.core.request import SamplingParams
from asyncllm.errors import StartupError
from asyncllm.models.spec import ModelSpec
from asyncllm.server.assembly import _info

SERVED = ServedModel(
    name="m", listed=("m",), accepted=frozenset(), max_len=64, vocab_size=9, created=0
)
HI = [{"role": "user", "content": "hi"}]
FILE = {
    "temperature": 0.6, "top_p": 0.9, "top_k": 20, "min_p": 0.05, "repetition_penalty": 1.05,
    "do_sample": True,
}  # fmt: skip

Ask = Callable[[ServedModel, dict[str, Any]], SamplingParams]


def native(served: ServedModel, body: dict[str, Any]) -> SamplingParams:
    return lightllm.generate({"inputs": "x", "parameters": body}, served, stream=False).params


def of_tgi(served: ServedModel, body: dict[str, Any]) -> SamplingParams:
    asked = tgi.generate({"inputs": "x", "parameters": body}, served, stream=False)
    return asked.generation.params


def of_responses(served: ServedModel, body: dict[str, Any]) -> SamplingParams:
    return responses.read(
        {"input": "x"} | body, served, responses.ResponseStore()
    ).generation.params


SAMPLE: dict[str, Ask] = {
    "chat": lambda s, b: openai.chat({"messages": HI} | b, s).params,
    "completions": lambda s, b: openai.completion({"prompt": "x"} | b, s).params,
    "responses": of_responses,
    "messages": lambda s, b: anthropic.messages({"messages": HI, "max_tokens": 5} | b, s).params,
}
GREEDY: dict[str, Ask] = {"native": native, "tgi": of_tgi}


def with_file(**values: Any) -> ServedModel:
    return replace(SERVED, defaults=Defaults(values))


def knobs(params: SamplingParams) -> tuple[Any, ...]:
    p = params
    return p.temperature, p.top_p, p.top_k, p.min_p, p.repetition_penalty


@pytest.mark.parametrize("route", [*SAMPLE, *GREEDY])
def test_all_of_it_counts_where_a_request_is_silent(route: str) -> None:
    ask = (SAMPLE | GREEDY)[route]
    params = ask(with_file(**FILE), {})
    assert knobs(params) == (0.6, 0.9, 20, 0.05, 1.05)
    assert params.penalize_prompt is (route != "native")  # LightLLM's input_penalty
    nulls = dict.fromkeys(("temperature", "top_p", "top_k", "min_p", "repetition_penalty"))
    assert knobs(ask(with_file(**FILE), nulls)) == (0.6, 0.9, 20, 0.05, 1.05)


@pytest.mark.parametrize("route", [*SAMPLE, *GREEDY])
def test_the_request_wins_field_by_field(route: str) -> None:
    ask = (SAMPLE | GREEDY)[route]
    params = ask(with_file(**FILE), {"temperature": 0.5})
    assert knobs(params) == (0.5, 0.9, 20, 0.05, 1.05)
    assert knobs(ask(with_file(**FILE), {"top_p": 1.0}))[:3] == (0.6, 1.0, 20)


@pytest.mark.parametrize("route", SAMPLE)
def test_without_a_file_a_route_has_its_own_defaults(route: str) -> None:
    assert knobs(SAMPLE[route](SERVED, {})) == (1.0, 1.0, -1, 0.0, 1.0)


@pytest.mark.parametrize("route", GREEDY)
def test_native_routes_are_greedy_unless_something_samples(route: str) -> None:
    ask = GREEDY[route]
    assert ask(SERVED, {}).temperature == 0.0
    assert ask(with_file(temperature=0.6), {}).temperature == 0.0  # nobody has asked to sample
    assert ask(with_file(temperature=0.6), {"do_sample": True}).temperature == 0.6
    assert ask(with_file(**FILE), {"do_sample": False, "repetition_penalty": 1}).temperature == 0.0


@pytest.mark.parametrize("route", SAMPLE)
def test_a_greedy_model_is_greedy_until_a_request_names_a_temperature(route: str) -> None:
    ask, served = SAMPLE[route], with_file(do_sample=False, temperature=0.6)
    assert ask(served, {}).temperature == 0.0
    assert ask(served, {"top_p": 0.9}).temperature == 0.0
    assert ask(served, {"temperature": 0.8}).temperature == 0.8
    if route in ("chat", "completions"):  # which have the field
        assert ask(served, {"do_sample": True}).temperature == 0.6
        assert ask(with_file(**FILE), {"do_sample": False}).temperature == 0.0


def test_the_files_top_k_of_0_is_all() -> None:
    for ask in SAMPLE.values():
        assert ask(with_file(top_k=0), {}).top_k == -1


def test_a_response_repeats_what_is_used() -> None:
    asked = responses.read({"input": "x"}, with_file(**FILE), responses.ResponseStore())
    assert (asked.echo["temperature"], asked.echo["top_p"]) == (0.6, 0.9)


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ({"temperature": -1}, "temperature: -1.0 is not in"),
        ({"top_p": -1}, "top_p: -1.0 is not in [0, 1]"),
        ({"top_p": "0.9"}, "top_p must be a number"),
        ({"top_k": 1.5}, "top_k must be an integer"),
        ({"min_p": 2}, "min_p"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"do_sample": "true"}, "do_sample must be true or false"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
    ],
)
def test_a_value_that_cannot_be_used_ends_the_start(content: dict[str, Any], part: str) -> None:
    with pytest.raises(StartupError) as error:
        read_defaults(content)
    assert str(error.value).startswith(f"generation_config.json: {part}")
    assert "--generation_config none" in str(error.value)


def model(folder: Path, content: dict[str, Any]) -> ModelSpec:
    shape = {"vocab_size": 9, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    shape |= {"num_attention_heads": 1}
    config = {"architectures": ["LlamaForCausalLM"], "dtype": "float32", **shape}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(json.dumps(content))
    return ModelSpec.from_dir(folder)


def test_the_option_decides_whether_the_file_counts(tmp_path: Path) -> None:
    other = {"max_length": 20, "transformers_version": "5", "top_p": None, "eos_token_id": 3}
    spec = model(tmp_path, FILE | {"max_new_tokens": 99} | other | {"min_p": None})
    used = {name: value for name, value in FILE.items() if name != "min_p"}
    resolved = rank.resolve(Config(device="cpu"), spec, tmp_path)
    del used["top_p"]
    assert resolved.generation_config == used | {"max_new_tokens": 99}
    none = Config(device="cpu", generation_config="none")
    resolved = rank.resolve(none, spec, tmp_path)
    assert resolved.generation_config == {}
    assert resolved.eos_ids == (3,)  # which are another matter


def test_the_server_says_what_it_uses(tmp_path: Path) -> None:
    spec = model(tmp_path, {"temperature": 0.6, "eos_token_id": [3, 4]})
    text = SimpleNamespace(eos_id=5)
    resolved = rank.resolve(Config(device="cpu"), spec, tmp_path, cast("Any", text))
    boot = SimpleNamespace(config=Config(device="cpu"), resolved=resolved)
    info = _info(cast("Any", SimpleNamespace(boot=boot)))
    assert info["generation_config"] == {"temperature": 0.6}
    assert info["eos_id"] == (3, 4, 5)


def test_none_starts_with_a_file_that_cannot_be_used(tmp_path: Path) -> None:
    spec = model(tmp_path, {"top_p": 7})
    with pytest.raises(StartupError, match="top_p"):
        rank.resolve(Config(device="cpu"), spec, tmp_path)
    rank.resolve(Config(device="cpu", generation_config="none"), spec, tmp_path)
