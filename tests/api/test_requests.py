"""Bodies to checked generations: every field's type and range, nulls, and what is refused."""

from __future__ import annotations

import json
import re
from array import array
from dataclasses import replace
from typing import Any

import pytest

from asyncllm.api.common import json_body
from asyncllm.api.common.errors import NotAvailable
from asyncllm.api.common.request_model import RequestModel, limits_text
from asyncllm.api.lightllm import request as lightllm
from asyncllm.api.openai import request as openai
from asyncllm.api.openapi.document import of_models
from asyncllm.api.openapi.field_docs import kinds
from asyncllm.api.parsing.output_parser import Dialect
from asyncllm.core.request import SamplingParams
from asyncllm.errors import ModelNotFound, RequestError
from tests.api.harness import (
    HI,
    SERVED,
    chat_request,
    completion_request,
    native_request,
    rendered,
)

ROUTES = [
    pytest.param(completion_request, openai.CompletionRequest, "", id="completion"),
    pytest.param(chat_request, openai.ChatRequest, "", id="chat"),
    pytest.param(native_request, lightllm.NativeParameters, "parameters.", id="native"),
]
SCHEMAS = of_models([param.values[1] for param in ROUTES])


def fields(model: type[RequestModel]) -> dict[str, dict[str, Any]]:
    """The schemas of fields that are honoured."""
    told: dict[str, dict[str, Any]] = SCHEMAS[model.__name__]["properties"]
    return {name: told[name] for name in told if name in model.model_fields}


FIELDS = [
    pytest.param(param.values[0], name, told, param.values[2], id=f"{param.id}-{name}")
    for param in ROUTES
    for name, told in fields(param.values[1]).items()
]


def wrong(told: dict[str, Any]) -> list[Any]:
    """Values of a wrong type or out of range."""
    samples: dict[str, list[Any]] = {
        "integer": [1.5], "number": [1.5], "boolean": [True], "string": ["x"], "array": [[]],
        "object": [{}],
    }  # fmt: skip
    known = kinds(told, SCHEMAS) | ({"integer"} if "number" in kinds(told, SCHEMAS) else set())
    values = [v for kind in samples if kind not in known for v in samples[kind]]
    if {"string"} == known - {"null"}:
        values.append("\ud800")
    if "number" in known:
        values.remove(1.5) if 1.5 in values else None
    low, above, high = (told.get(key) for key in ("minimum", "exclusiveMinimum", "maximum"))
    values += [low - 1] if low is not None else []
    values += [above] if above is not None else []
    return [*values, int(high) + 1] if high is not None else values


@pytest.mark.parametrize(("parse", "name", "told", "at"), FIELDS)
def test_wrong_values_are_refused_with_the_field_named(
    parse: Any, name: str, told: dict[str, Any], at: str
) -> None:
    assert wrong(told)
    for value in wrong(told):
        with pytest.raises(RequestError) as caught:
            parse(**{name: value})
        error = caught.value
        assert error.status == (404 if isinstance(error, ModelNotFound) else 400)
        assert (error.param or "").startswith(at + name), (value, error.param, error.message)


@pytest.mark.parametrize(("parse", "name", "told", "at"), FIELDS)
def test_null_means_absent(parse: Any, name: str, told: dict[str, Any], at: str) -> None:
    if name not in ("prompt", "messages"):
        assert parse(**{name: None}) == parse()


@pytest.mark.parametrize(("parse", "model", "at"), ROUTES)
def test_limits_are_inclusive_and_named(parse: Any, model: type[RequestModel], at: str) -> None:
    for name, told in fields(model).items():
        high = told.get("maximum")
        if high is None or name in ("best_of", "top_logprobs"):
            continue
        more = {"max_tokens": 2**31 - 1} if name == "min_tokens" else {}
        if name == "min_new_tokens":
            more = {"max_new_tokens": 2**31 - 1}
        parse(**{name: high}, **more)
        with pytest.raises(RequestError) as caught:
            parse(**{name: high + (1 if "integer" in kinds(told, SCHEMAS) else 0.5)})
        above = told.get("exclusiveMinimum")
        low = told.get("minimum", above)
        assert limits_text(low, high, above is not None) in caught.value.message


@pytest.mark.parametrize("name", [None, "m", "org/m", "default", "folder"])
def test_known_model_names(name: str | None) -> None:
    completion_request(model=name)


def test_unknown_model_is_404() -> None:
    with pytest.raises(ModelNotFound) as caught:
        chat_request(model="gpt-5")
    error = caught.value
    assert (error.status, error.code, error.param) == (404, "model_not_found", "model")
    assert '"gpt-5"' in error.message


def test_unknown_fields_are_ignored() -> None:
    assert (
        completion_request(user="u", metadata={"a": 1}, store=True, nonsense=[1])
        == completion_request()
    )
    assert native_request(group_request_id=3, nonsense=1) == native_request()


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a", [("a", None)]),
        (["a", "b"], [("a", None), ("b", None)]),
        ([1, 2], [(None, [1, 2])]),
        ([[1], [2, 3]], [(None, [1]), (None, [2, 3])]),
    ],
)
def test_prompt_forms(prompt: Any, expected: Any) -> None:
    got = [(p.text, p.ids) for p in completion_request(prompt=prompt).prompts]
    assert got == [(t, None if i is None else array("i", i)) for t, i in expected]


@pytest.mark.parametrize(
    "prompt",
    [[], [[]], ["a", 1], ["a", [1]], [1, "a"], [1, True], [1, 1.5], [-1], [100], [[100]], [2**40],
     {"a": 1}, ["a"] * 257, "\udfff", [[1], [None]]],
)  # fmt: skip
def test_bad_prompts(prompt: Any) -> None:
    with pytest.raises(RequestError) as caught:
        completion_request(prompt=prompt)
    assert (caught.value.param or "").startswith("prompt")


def test_prompt_is_required() -> None:
    for body in ({}, {"prompt": None}):
        with pytest.raises(RequestError, match="prompt is missing"):
            openai.completion(body, SERVED)
    with pytest.raises(RequestError, match="messages is missing"):
        openai.chat({}, SERVED)
    with pytest.raises(RequestError, match="inputs is missing"):
        lightllm.generate({"parameters": {}}, SERVED, stream=False)


def test_completion_params() -> None:
    got = completion_request(
        max_tokens=5, min_tokens=2, temperature=0.5, top_p=0.9, top_k=7, min_p=0.1, n=3, seed=11,
        presence_penalty=-2, frequency_penalty=2, repetition_penalty=1.5, logit_bias={"3": -100},
        stop=["x", "y"], stop_token_ids=[4], ignore_eos=True, skip_special_tokens=False,
        include_stop_str_in_output=True,
        stream=True, stream_options={"include_usage": True, "continuous_usage_stats": True},
        echo=True, logprobs=2, add_special_tokens=False, best_of=3,
    )  # fmt: skip
    assert got.params == SamplingParams(
        max_new_tokens=5, min_new_tokens=2, temperature=0.5, top_k=7, top_p=0.9, min_p=0.1,
        presence_penalty=-2.0, frequency_penalty=2.0, repetition_penalty=1.5, penalize_prompt=True,
        seed=11, ignore_eos=True, stop_token_ids=(4,), stop=("x", "y"), logprobs=2,
        include_stop=True,
        prompt_logprobs=2, skip_special_tokens=False, logit_bias=((3, -100.0),),
    )  # fmt: skip
    assert (got.n, got.stream, got.echo, got.seeded) == (3, True, True, True)
    assert (got.include_usage, got.continuous_usage, got.add_special_tokens) == (True, True, False)


def test_openai_defaults() -> None:
    for got in (completion_request(), chat_request()):
        assert got.params == SamplingParams()
        assert (got.n, got.stream, got.seeded, got.include_usage) == (1, False, False, False)


def test_do_sample_false_is_greedy() -> None:
    for got in (completion_request(do_sample=False, temperature=2), chat_request(do_sample=False)):
        assert got.params.temperature == 0
    assert chat_request(do_sample=True, temperature=0.5).params.temperature == 0.5


def test_echo_scores_the_prompt_only_with_logprobs() -> None:
    assert completion_request(echo=True).params.prompt_logprobs == -1
    got = completion_request(echo=True, max_tokens=0, logprobs=0).params
    assert (got.prompt_logprobs, got.logprobs, got.max_new_tokens) == (0, 0, 0)


def test_chat_logprobs() -> None:
    assert chat_request(logprobs=True).params.logprobs == 0
    assert chat_request(logprobs=True, top_logprobs=3).params.logprobs == 3
    assert chat_request(top_logprobs=0).params.logprobs == -1
    with pytest.raises(RequestError, match="needs logprobs") as caught:
        chat_request(top_logprobs=1)
    assert caught.value.param == "top_logprobs"


def test_small_temperatures_are_greedy() -> None:
    assert completion_request(temperature=1e-6).params.temperature == 0.0
    assert completion_request(temperature=0.01).params.temperature == 0.01


def test_newer_name_of_max_tokens_wins() -> None:
    assert chat_request(max_tokens=3, max_completion_tokens=4).params.max_new_tokens == 4
    with pytest.raises(RequestError, match="more than max_tokens 3"):
        chat_request(max_tokens=3, min_tokens=4)


@pytest.mark.parametrize(
    ("name", "value"),
    [("stop", ["a"] * 17), ("stop", "a" * 513), ("stop", [""]), ("stop", ["a", 1]),
     ("stop_token_ids", [100]), ("stop_token_ids", [-1]), ("stop_token_ids", ["1"]),
     ("stop_token_ids", [1] * 129), ("logit_bias", {"x": 1}), ("logit_bias", {"03": 1}), ("logit_bias", {"-1": 1}),
     ("logit_bias", {"1": 101}), ("logit_bias", {"1": "x"}), ("logit_bias", {"100": 1}),
     ("logit_bias", {str(i): 0 for i in range(301)}), ("allowed_token_ids", [100]),
     ("allowed_token_ids", "1"), ("allowed_token_ids", [1] * 4097),
     ("stream_options", {"include_usage": 1})],
)  # fmt: skip
def test_structured_values_have_limits(name: str, value: Any) -> None:
    for parse in (completion_request, chat_request):
        with pytest.raises(RequestError) as caught:
            parse(**{name: value})
        assert (caught.value.param or "").startswith(name)


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [("logit_bias", {"a": 1}, 'logit_bias: "a" is not a token id'),
     ("logit_bias", {"-1": 1}, 'logit_bias: "-1" is not a token id'),
     ("guided_json", True, "guided_json must be a JSON schema: an object, or a string of one, not "),
     ("guided_json", "[1]", "guided_json must be a JSON schema: an object, or a string of one, not "),
     ("exponential_decay_length_penalty", [3], " must be [start, factor], not an array of 1"),
     ("exponential_decay_length_penalty", "x", ' must be [start, factor], not "x"')],
)  # fmt: skip
def test_what_a_value_must_be_is_said(name: str, value: Any, text: str) -> None:
    for parse, at in (
        (completion_request, ""),
        (chat_request, ""),
        (native_request, "parameters."),
    ):
        with pytest.raises(RequestError, match=re.escape(text)) as caught:
            parse(**{name: value})
        assert caught.value.param == at + name


TOOLS = [{"type": "function", "function": {"name": "f"}}]


@pytest.mark.parametrize(
    "body",
    [
     {"bad_words": ["a"]}, {"audio": {"voice": "x"}}, {"modalities": ["text", "audio"]},
     {"regular_constraint": "a"}, {"best_of": 2},
     {"add_special_tokens": True}, {"chat_template": "{{ x }}"}, {"echo": True},
     {"prompt_logprobs": 1}, {"use_beam_search": True}],
)  # fmt: skip
def test_chat_fields_not_available(body: dict[str, Any]) -> None:
    with pytest.raises(NotAvailable, match="not available on this server") as caught:
        chat_request(**body)
    assert caught.value.status == 400
    assert caught.value.param in body


@pytest.mark.parametrize(
    "body",
    [{"suffix": "x"}, {"best_of": 2}, {"n": 2, "best_of": 3}, {"prompt_embeds": "x"}],
)  # fmt: skip
def test_completion_fields_not_available(body: dict[str, Any]) -> None:
    with pytest.raises(NotAvailable):
        completion_request(**body)


def test_neutral_values_of_unavailable_fields_pass() -> None:
    neutral = chat_request(
        tools=TOOLS, tool_choice="none", response_format={"type": "text"}, functions=[],
        function_call="none", modalities=["text"], best_of=1, audio=None,
    )  # fmt: skip
    assert neutral == chat_request()
    assert completion_request(suffix="", best_of=1) == completion_request()


def test_given_tokens_take_the_place_of_the_best() -> None:
    params = chat_request(logprobs=True, top_logprobs=2, logprob_token_ids=[7, 9, 7]).params
    assert (params.logprobs, params.logprob_ids) == (2, (7, 9))
    params = completion_request(logprobs=0, logprob_token_ids=[7, 8, 9], echo=True).params
    assert (params.logprobs, params.prompt_logprobs) == (3, 0)
    for body in (
        {"logprob_token_ids": [7]},
        {"logprobs": True, "logprob_token_ids": [SERVED.vocab_size]},
        {"logprobs": True, "logprob_token_ids": list(range(129))},
    ):
        with pytest.raises(RequestError) as caught:
            chat_request(**body)
        assert caught.value.param == "logprob_token_ids"


# -- chat messages -----------------------------------------------------------------------------


def test_messages_take_the_templates_form() -> None:
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    served = replace(SERVED, dialect=Dialect(lists_tools=True))
    got = rendered(
        openai.chat(
            {"messages": [
                {"role": "developer", "content": "be brief", "refusal": None},
                {"role": "User", "content": [{"type": "text", "text": "a"},
                                             {"type": "text", "text": "b"}], "name": "bo"},
                {"role": "assistant", "content": None, "tool_calls": [call], "reasoning": "hm"},
                {"role": "tool", "content": "1", "tool_call_id": "c"},
            ]},
            served,
        )
    )  # fmt: skip
    called = {"type": "function", "function": {"name": "f", "arguments": {"a": 1}}, "id": "c"}
    assert got == {
        "messages": [
            {"role": "system", "content": "be brief"},
            {"role": "user", "content": "a\nb", "name": "bo"},
            {"role": "assistant", "content": "", "reasoning_content": "hm", "tool_calls": [called]},
            {"role": "tool", "content": "1", "tool_call_id": "c"},
        ],
        "tools": None,
        "kwargs": {"add_generation_prompt": True},
    }


@pytest.mark.parametrize(
    ("role", "known", "given"),
    [
        ("context", ["context"], "context"),
        ("Context", ["context"], "context"),
        ("observation", ["Observation", "tool"], "Observation"),
        ("developer", ["developer", "user"], "developer"),
        ("developer", ["user"], "system"),
        ("function", [], "tool"),
        ("ipython", [], "tool"),
        ("ipython", ["ipython"], "ipython"),
        ("human", ["Human", "human"], "human"),
    ],
)
def test_roles_are_those_that_the_template_mentions(
    role: str, known: list[str], given: str
) -> None:
    served = replace(SERVED, dialect=Dialect(tells_results=True, roles=frozenset(known)))
    got = openai.chat({"messages": [*HI, {"role": role, "content": "a"}]}, served)
    assert rendered(got)["messages"][1] == {"role": given, "content": "a"}


def test_other_roles_are_refused_with_those_that_are_known() -> None:
    served = replace(SERVED, dialect=Dialect(roles=frozenset({"context", "user"})))
    with pytest.raises(RequestError) as caught:
        openai.chat({"messages": [{"role": "robot", "content": "a"}]}, served)
    assert caught.value.message == (
        'messages[0].role: "robot" is not one of system, developer, user, assistant, tool, '
        "function, ipython, context"
    )


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([], "messages"),
        (["hi"], "messages[0]"),
        ([{"content": "hi"}], "messages[0].role"),
        ([{"role": 5, "content": "hi"}], "messages[0].role"),
        ([{"role": "robot", "content": "hi"}], "messages[0].role"),
        ([{"role": "user"}], "messages[0].content"),
        ([{"role": "user", "content": 5}], "messages[0].content"),
        ([{"role": "user", "content": [5]}], "messages[0].content[0]"),
        ([{"role": "user", "content": [{"text": "x"}]}], "messages[0].content[0].type"),
        ([{"role": "user", "content": [{"type": "text"}]}], "messages[0].content[0].text"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
         "messages[0].content[0].type"),
        ([{"role": "user", "content": "\ud800"}], "messages[0].content"),
        ([*HI, {"role": "assistant", "tool_calls": [{}]}], "messages[1].tool_calls[0].function"),
        ([*HI, {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": 3}}]}],
         "messages[1].tool_calls[0].function.arguments"),
    ],
)  # fmt: skip
def test_bad_messages(messages: Any, param: str) -> None:
    with pytest.raises(RequestError) as caught:
        chat_request(messages=messages)
    assert (caught.value.status, caught.value.param) == (400, param)


def test_template_kwargs() -> None:
    got = rendered(
        chat_request(chat_template_kwargs={"enable_thinking": False}, reasoning_effort="low")
    )
    assert got["kwargs"] == {
        "enable_thinking": False,
        "thinking": False,
        "reasoning_effort": "low",
        "add_generation_prompt": True,
    }
    with pytest.raises(RequestError, match="Unicode"):
        chat_request(chat_template_kwargs={"thinking": "\ud800"})


def test_only_what_the_template_reads_is_a_template_kwarg() -> None:
    served = replace(SERVED, dialect=Dialect(variables=frozenset({"date", "tools", "messages"})))
    known = "is not one of date, enable_thinking, reasoning_effort, thinking"
    for name in ("tokenize", "chat_template", "messages", "tools", "bos_token", "x"):
        with pytest.raises(RequestError, match=f'"{name}" {known}') as caught:
            openai.chat({"messages": HI, "chat_template_kwargs": {name: True}}, served)
        assert caught.value.param == "chat_template_kwargs"
    got = openai.chat({"messages": HI, "chat_template_kwargs": {"date": "today"}}, served)
    assert rendered(got)["kwargs"]["date"] == "today"


def test_continue_final_message() -> None:
    begun = [*HI, {"role": "assistant", "content": "Well"}]
    got = rendered(chat_request(messages=begun, continue_final_message=True))
    assert got["kwargs"] == {"continue_final_message": True, "add_generation_prompt": False}
    with pytest.raises(RequestError, match="assistant message at the end"):
        chat_request(continue_final_message=True)
    with pytest.raises(RequestError, match="exclude each other"):
        chat_request(messages=begun, continue_final_message=True, add_generation_prompt=True)


# -- LightLLM ----------------------------------------------------------------------------------


def test_native_defaults_are_greedy() -> None:
    got = native_request()
    assert got.params == SamplingParams(
        temperature=0.0, min_new_tokens=1, logprobs=0, skip_special_tokens=False
    )
    assert native_request(do_sample=False, temperature=0.7, top_k=5, top_p=0.5, min_p=0.5) == got


def test_native_params() -> None:
    got = native_request(
        do_sample=True, temperature=0.7, top_k=5, top_p=0.5, max_new_tokens=9, min_new_tokens=2,
        repetition_penalty=1.2, input_penalty=True, stop_sequences=["x", [7], [8, 7]], seed=3, n=2,
        best_of=2,
        print_eos_token=True, prompt_logprobs=4, disable_prompt_cache=True, return_details=True,
        add_special_tokens=False,
    )  # fmt: skip
    assert got.params == SamplingParams(
        max_new_tokens=9, min_new_tokens=2, temperature=0.7, top_k=5, top_p=0.5,
        repetition_penalty=1.2, penalize_prompt=True, seed=3, stop=("x",), stop_token_ids=(7,),
        stop_sequences=((8, 7),),
        logprobs=0, prompt_logprobs=4, skip_special_tokens=False, print_eos=True, use_cache=False,
    )  # fmt: skip
    assert (got.n, got.details, got.add_special_tokens, got.seeded) == (2, True, False, True)
    assert native_request(stop_sequences="x").params.stop == ("x",)


def test_lightllms_own_defaults_are_ours() -> None:
    defaults = {
        "do_sample": False, "temperature": 1.0, "top_p": 1.0, "top_k": -1, "presence_penalty": 0.0,
        "frequency_penalty": 0.0, "repetition_penalty": 1.0, "input_penalty": False, "n": 1,
        "exponential_decay_length_penalty": [1, 1.0], "min_new_tokens": 1, "ignore_eos": False,
        "best_of": 1, "stop_sequences": [], "logit_bias": {}, "allowed_token_ids": [],
        "regular_constraint": "", "guided_grammar": "", "guided_json": "",
        "skip_special_tokens": False, "add_special_tokens": True, "print_eos_token": False,
        "add_spaces_between_special_tokens": True, "seed": -1, "prompt_logprobs": -1,
        "disable_prompt_cache": False, "image_max_patch_num": -1, "group_request_id": -1,
        "suggested_dp_index": -1, "return_details": False, "return_routed_experts": False,
    }  # fmt: skip
    assert native_request(**defaults) == native_request()
    assert native_request(add_spaces_between_special_tokens=False) == native_request()
    with pytest.raises(RequestError, match="add_spaces"):
        native_request(add_spaces_between_special_tokens=1)


@pytest.mark.parametrize("parameters", [{"return_routed_experts": True}, {"n": 2, "best_of": 1}])
def test_native_parameters_not_available(parameters: dict[str, Any]) -> None:
    with pytest.raises(NotAvailable, match="available"):
        native_request(**parameters)


@pytest.mark.parametrize(
    "stop", [[[]], [[100]], [[1, 100]], [["x"]], [[1] * 257], ["a"] * 17, [None], {"a": 1}]
)
def test_native_bad_stops(stop: Any) -> None:
    with pytest.raises(RequestError, match="stop_sequences"):
        native_request(stop_sequences=stop)


def test_length_penalty() -> None:
    name = "exponential_decay_length_penalty"
    for parse in (completion_request, chat_request, native_request):
        assert parse(**{name: [10, 1.5]}).params.length_penalty == (10, 1.5)
        assert parse(**{name: [1, 1.0]}) == parse()
        for wrong in ([10], [10, 0.9], [-1, 2], [1.5, 2], "x", [1, 101], [1, None], {}):
            with pytest.raises(RequestError, match=name):
                parse(**{name: wrong})


def test_allowed_tokens_exclude_a_grammar() -> None:
    for parse in (completion_request, chat_request, native_request):
        assert parse(allowed_token_ids=[3, 99]).params.allowed_token_ids == (3, 99)
        with pytest.raises(RequestError, match="allowed_token_ids and a grammar exclude"):
            parse(allowed_token_ids=[3], guided_json={})
    with pytest.raises(RequestError, match="exclude each other"):
        chat_request(allowed_token_ids=[3], tools=TOOLS, tool_choice="required")


EMPTY: list[dict[str, Any]] = [
    {"guided_json": ""}, {"guided_regex": ""}, {"guided_grammar": ""}, {"guided_choice": []},
    {"allowed_token_ids": []}, {"structured_outputs": {}}, {"structured_outputs": {"regex": ""}},
    {"structured_outputs": {"choice": []}}, {"structured_outputs": {"json_object": False}},
]  # fmt: skip


@pytest.mark.parametrize("body", EMPTY, ids=json.dumps)
def test_an_empty_constraint_is_an_error_but_on_native_routes(body: dict[str, Any]) -> None:
    (name,) = body
    for parse in (completion_request, chat_request):
        with pytest.raises(RequestError, match=f"{name}.* is empty") as caught:
            parse(**body)
        assert str(caught.value.param).startswith(name)
    if name in ("guided_json", "guided_grammar", "allowed_token_ids"):
        assert native_request(**body) == native_request()


@pytest.mark.parametrize(
    "body",
    [
        {"regex": "a"}, {"json_schema": {}}, {"typical_p": 0.5}, {"stop_regex": "a"}, {"cache_salt": "x"},
        {"mirostat": 1}, {"n_predict": 5}, {"structural_tag": "x"}, {"custom_logit_processor": "x"},
        {"repeat_penalty": 1.1}, {"bad_words": ["a"]}, {"use_beam_search": True}, {"lora_path": "x"},
    ],
    ids=json.dumps,
)  # fmt: skip
def test_fields_of_other_servers_are_refused_by_name(body: dict[str, Any]) -> None:
    (name,) = body
    for parse in (completion_request, chat_request):
        with pytest.raises(RequestError, match=name) as caught:
            parse(**body)
        assert (caught.value.param, caught.value.code) == (name, "not_available")
        neutral = {"typical_p": 1.0, "mirostat": 0, "repeat_penalty": 1, "use_beam_search": False}
        if name in neutral:
            assert parse(**{name: neutral[name]}) == parse()


def test_top_p_0_is_greedy() -> None:
    for parse in (completion_request, chat_request):
        params = parse(top_p=0, temperature=0.7).params
        assert (params.temperature, params.top_p) == (0.0, 1.0)
    sampled = native_request(do_sample=True, top_p=0).params
    assert (sampled.temperature, sampled.top_p) == (0.0, 1.0)
    assert native_request(do_sample=True, top_p=0.5).params.temperature == 1.0


def test_what_a_tool_gave_may_be_nothing_and_thinking_may_be_a_part() -> None:
    call = {"id": "c", "function": {"name": "f", "arguments": '{"a": '}}
    thinking = {"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]}
    messages = [
        *HI,
        {
            "role": "assistant",
            "content": [thinking, {"type": "text", "text": "So"}],
            "tool_calls": [call],
        },
        {"role": "tool", "content": None, "tool_call_id": "c"},
        {"role": "tool", "tool_call_id": "c"},
    ]
    told = rendered(chat_request(messages=messages))["messages"]
    assert (told[1]["reasoning_content"], told[1]["content"].startswith("So")) == ("hm", True)
    assert '{"a": ' in told[1]["content"]
    with pytest.raises(RequestError, match="content"):
        chat_request(messages=[{"role": "user", "content": [thinking]}])


def test_native_streams_one_choice() -> None:
    assert native_request(stream=True).stream
    with pytest.raises(RequestError, match="2 choices cannot be streamed"):
        native_request(stream=True, n=2)


def test_native_inputs_and_media() -> None:
    got = lightllm.generate({"inputs": [1, 2], "multimodal_params": {}}, SERVED, stream=False)
    assert got.prompts[0].ids == array("i", [1, 2])
    for inputs, at in (
        ([], ""),
        (5, ""),
        ([100], ""),
        ([1, "a"], "[1]"),
        ([True], "[0]"),
        ([1, -1], "[1]"),
        ({}, ""),
    ):
        with pytest.raises(RequestError) as caught:
            lightllm.generate({"inputs": inputs}, SERVED, stream=False)
        assert caught.value.param == f"inputs{at}"
    images = {"inputs": "x", "multimodal_params": {"images": [{"type": "url", "data": "u"}]}}
    with pytest.raises(NotAvailable, match="image input is not available"):
        lightllm.generate(images, SERVED, stream=False)


def test_tokens_body() -> None:
    assert lightllm.tokens({"text": "a"}) == ("a", True)
    no_special = {"text": "a", "parameters": {"add_special_tokens": False, "n": "ignored"}}
    assert lightllm.tokens(no_special) == ("a", False)
    for body in ({}, {"text": 5}, {"text": "a", "parameters": []}):
        with pytest.raises(RequestError):
            lightllm.tokens(body)


# -- numbers and texts of any size ----------------------------------------------------------


def test_huge_numbers_are_refused() -> None:
    with pytest.raises(RequestError, match="number 1e999, beyond double precision"):
        json_body.load(b'{"prompt": "x", "temperature": 1e999}')


def test_long_values_are_cut_in_messages() -> None:
    deep: list[Any] = []
    for _ in range(5000):
        deep = [deep]
    for value in ("x" * 10_000, [1] * 10_000, {"a": deep}, deep, 10**4000):
        with pytest.raises(RequestError) as caught:
            completion_request(temperature=value)
        assert len(caught.value.message) < 200
    with pytest.raises(RequestError) as caught:
        completion_request(prompt=[10**4000])
    assert len(caught.value.message) < 200
    with pytest.raises(ModelNotFound) as unknown:
        completion_request(model="x" * 10_000)
    assert len(unknown.value.message) < 200
