"""--use_tgi_api: text-generation-inference's bodies and answers on LightLLM's routes."""

from __future__ import annotations

import json
from array import array
from typing import Any

import jsonschema
import pytest

from asyncllm.api.common.errors import NotAvailable, from_failure
from asyncllm.api.lightllm import request as lightllm
from asyncllm.api.tgi import request as tgi
from asyncllm.api.tgi.reply import TgiReply, error_body
from asyncllm.codec import i32
from asyncllm.core.request import FinishReason
from asyncllm.errors import RequestError
from asyncllm.records import Failure, Logprobs
from tests.api.harness import BYTES_SERVED, TGI, answer, delta, end, floats, native_events, take


def ask(stream: bool = False, **parameters: Any) -> tgi.TgiRequest:
    return tgi.generate({"inputs": "hi", "parameters": parameters}, BYTES_SERVED, stream=stream)


def reply(stream: bool = False, listed: bool = False, **parameters: Any) -> TgiReply:
    asked = ask(stream, **parameters)
    return TgiReply(answer(asked.generation, [b"hi"]), asked, listed=listed)


def whole(made: TgiReply) -> Any:
    body = json.loads(made.whole())
    name = "TgiList" if isinstance(body, list) else "Tgi"
    schemas = {"components": TGI["components"], "$ref": f"#/components/schemas/{name}"}
    jsonschema.validate(body, schemas)
    return body


# -- bodies ------------------------------------------------------------------------------------


def test_a_client_that_sends_every_field_as_null() -> None:
    assert ask(**dict.fromkeys(tgi.TgiParameters.model_fields)) == ask()
    got = ask().generation
    assert (got.params.temperature, got.params.skip_special_tokens) == (0, True)
    assert (got.n, got.details, got.seeded, got.params.penalize_prompt) == (1, False, False, True)


def test_parameters_mean_what_they_mean_there() -> None:
    asked = ask(
        best_of=3, seed=2**64 - 1, stop=["x"], truncate=5, return_full_text=True, details=True,
        decoder_input_details=True, top_n_tokens=2, temperature=0.5, max_new_tokens=4,
        grammar={"type": "json", "value": {"type": "object"}},
    )  # fmt: skip
    got, params = asked.generation, asked.generation.params
    assert (got.n, got.seeded, got.truncate, got.details) == (3, True, 5, True)
    assert (params.seed, params.stop, params.logprobs) == (2**64 - 1, ("x",), 2)
    assert (params.temperature, params.max_new_tokens, params.prompt_logprobs) == (0.5, 4, 0)
    assert params.grammar == ("schema", '{"type": "object"}')
    assert (asked.generation.echo, asked.prefill, asked.prompt_scores) == (True, True, False)
    regex = ask(grammar={"type": "regex", "value": "[ab]"}, prompt_logprobs=2)
    assert regex.generation.params.grammar == ("regex", "[ab]")
    assert (regex.generation.params.prompt_logprobs, regex.prompt_scores) == (2, True)


@pytest.mark.parametrize(
    ("parameters", "expected"),
    [
        ({}, 0.0),
        ({"do_sample": True}, 1.0),
        ({"temperature": 0.7}, 0.7),
        ({"top_k": 5}, 1.0),
        ({"top_p": 0.9}, 1.0),
        ({"temperature": 1.0, "top_k": -1, "top_p": 1}, 0.0),
        ({"temperature": 0, "do_sample": True}, 0.0),
    ],
)
def test_sampling_is_asked_for_by_any_of_its_parameters(
    parameters: dict[str, Any], expected: float
) -> None:
    assert ask(**parameters).generation.params.temperature == expected


def test_names_of_lightllm() -> None:
    body = {"inputs": [1], "num_beam": 2, "parameters": {"stop_sequences": ["a", [1, 2]]}}
    got = tgi.generate(body, BYTES_SERVED, stream=False).generation
    assert (got.n, got.params.stop, got.params.stop_sequences) == (2, ("a",), ((1, 2),))
    assert ask(return_details=True).generation.details


@pytest.mark.parametrize(
    ("parameters", "param"),
    [
        ({"best_of": 17}, "best_of"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**64}, "seed"),
        ({"truncate": 0}, "truncate"),
        ({"stop": ["a"] * 17}, "stop"),
        ({"stop": [[1]]}, "stop[0]"),
        ({"stop": ["a"], "stop_sequences": ["b"]}, "stop"),
        ({"top_n_tokens": 21}, "top_n_tokens"),
        ({"decoder_input_details": True}, "decoder_input_details"),
        ({"grammar": {"type": "lark", "value": ""}}, "grammar.type"),
        ({"grammar": {"type": "json", "value": []}}, "grammar.value"),
        ({"grammar": {"type": "json", "value": {}}, "guided_grammar": "x"}, "grammar"),
        ({"max_new_tokens": 1, "min_new_tokens": 2}, "min_new_tokens"),
    ],
)
def test_bad_values_are_named(parameters: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestError) as caught:
        ask(**parameters)
    assert caught.value.param == f"parameters.{param}"


def test_streams_have_one_choice_and_no_prefill() -> None:
    for more in ({"best_of": 2}, {"details": True, "decoder_input_details": True}):
        with pytest.raises(RequestError, match="stream"):
            ask(True, **more)
    with pytest.raises(RequestError, match="inputs is missing"):
        tgi.generate({"parameters": {}}, BYTES_SERVED, stream=False)


@pytest.mark.parametrize("name", tgi.TgiParameters.refused)
def test_what_is_not_available(name: str) -> None:
    for value in tgi.TgiParameters.refused[name].neutral:
        assert ask(**{name: value}) == ask()
    with pytest.raises(NotAvailable):
        ask(**{name: 0.5})


def test_other_parameters_are_lightllms() -> None:
    theirs = lightllm.NativeParameters.model_fields.keys()
    assert theirs <= {*tgi.TgiParameters.model_fields, *tgi.TgiParameters.refused}


# -- answers -----------------------------------------------------------------------------------


def test_plain_answer() -> None:
    for listed in (False, True):
        made = reply(listed=listed, return_full_text=listed)
        take(made, delta("ab", i32(list(b"ab")), ("a", "b"), floats(-0.5, -1)))
        end(made)
        scored = [
            {"97": {"logprob": -0.5, "rank": None, "decoded_token": "a"}},
            {"98": {"logprob": -1.0, "rank": None, "decoded_token": "b"}},
        ]
        expected = {"generated_text": "hiab" if listed else "ab", "logprobs": scored}
        assert whole(made) == ([expected] if listed else expected)


def test_best_of_picks_the_best_mean() -> None:
    made = reply(best_of=3, details=True, seed=7, temperature=1.5)
    for i, logprobs in enumerate(((-1.0,), (-0.5, -0.75), (-9.0, 0.0))):
        text = "xyz"[i] * len(logprobs)
        take(made, delta(text, i32(list(text.encode())), tuple(text), floats(*logprobs)), i)
        end(made, FinishReason.LENGTH if i else FinishReason.STOP, i)
    body = whole(made)
    details = body["details"]
    assert body["generated_text"] == "yy"
    assert (details["finish_reason"], details["generated_tokens"], details["seed"]) == (
        "length",
        2,
        8,
    )
    assert [t["cumlogprob"] for t in details["tokens"]] == [-0.5, -1.25]
    assert details["prompt_tokens"] == 2
    others = details["best_of_sequences"]
    assert [(o["generated_text"], o["finish_reason"], o["seed"]) for o in others] == [
        ("x", "eos_token", 7),
        ("zz", "length", 9),
    ]
    assert [(b["generated_text"], b["logprob"]) for b in details["beam_sequences"]] == [
        ("x", -1.0),
        ("yy", -1.25),
        ("zz", -9.0),
    ]
    assert [list(m) for m in body["logprobs"]] == [["121"], ["121"]]


def test_details_of_the_prompt_and_of_the_best_tokens() -> None:
    made = reply(details=True, decoder_input_details=True, top_n_tokens=1)
    scores = Logprobs(chosen=floats(-2))
    take(
        made, delta("a", i32([97]), ("a",), Logprobs(1, floats(-1), i32([0]), floats(-0.5)), scores)
    )
    end(made)
    body = whole(made)
    assert body["details"]["prefill"] == [
        {"id": 104, "text": "h", "logprob": None},
        {"id": 105, "text": "i", "logprob": -2.0},
    ]
    assert body["details"]["top_tokens"] == [
        [{"id": 0, "text": "\0", "logprob": -0.5, "special": True}]
    ]
    assert body["details"]["seed"] is None
    assert "prompt_logprobs" not in body


@pytest.mark.parametrize(
    ("stops", "ids", "found", "reason"),
    [
        ({"stop": ["b"]}, b"ab", "b", "stop_sequence"),
        ({"stop": ["c"]}, b"ab", "", "eos_token"),
        ({"stop_sequences": [[98]]}, b"ab", "", "stop_sequence"),
        ({"stop_sequences": [[97, 98]]}, b"ab", "", "stop_sequence"),
        ({"stop_sequences": [[97]]}, b"ab", "", "eos_token"),
    ],
)
def test_what_ended_it(stops: dict[str, Any], ids: bytes, found: str, reason: str) -> None:
    made = reply(details=True, **stops)
    take(made, delta("a", i32(list(ids)), ("a", ""), floats(-1, -1)))
    made.answer.choices[0].stop = found
    end(made)
    assert whole(made)["details"]["finish_reason"] == reason


def test_stream() -> None:
    made = reply(
        stream=True, details=True, top_n_tokens=1, return_full_text=True, prompt_logprobs=0
    )
    prompt = Logprobs(chosen=floats(-2))
    one = delta("a", i32([97]), ("a",), Logprobs(1, floats(-1), i32([98]), floats(-0.5)), prompt)
    two = delta("", i32([0]), ("",), Logprobs(1, floats(-2), i32([97]), floats(-0.25)))
    out = take(made, one) + made.flush_held() + take(made, two) + end(made)
    first, last = native_events(out)
    top = [{"id": 98, "text": "b", "logprob": -0.5, "special": False}]
    token = {"id": 97, "text": "a", "logprob": -1.0, "special": False, "count_output_tokens": 1}
    assert first["prompt_token_ids"] == list(b"hi")
    del first["prompt_token_ids"], first["prompt_logprobs"]
    assert first == {
        "index": 1, "token": token, "top_tokens": top, "generated_text": None, "finished": False,
        "finish_reason": None, "details": None,
    }  # fmt: skip
    assert (last["token"]["id"], last["token"]["special"], last["index"]) == (0, True, 2)
    assert (last["generated_text"], last["finished"], last["finish_reason"]) == (
        "hia",
        True,
        "eos_token",
    )
    assert last["details"] == {
        "finish_reason": "eos_token", "generated_tokens": 2, "seed": None, "input_length": 2,
        "prompt_tokens": 2,
    }  # fmt: skip
    assert "prompt_logprobs" not in last


def test_an_end_that_comes_alone_is_nothing_to_show() -> None:
    made = reply(stream=True, stop=["x"])
    out = take(made, delta("a", i32([97]), ("a",), floats(-1))) + made.flush_held() + end(made)
    _, last = native_events(out)
    token = {"id": -1, "text": "", "logprob": 0.0, "special": True, "count_output_tokens": 1}
    assert last["token"] == token
    assert (last["index"], last["details"]) == (1, None)
    held = reply(stream=True)
    out = take(held, delta("", i32([97]), ("",), floats(-1))) + held.flush_held()
    out += take(held, delta("a")) + end(held)
    assert (
        native_events(out)[-1]["token"]["text"],
        native_events(out)[-1]["token"]["special"],
    ) == ("a", False)


def test_a_stream_makes_the_prompts_text_before_its_first_event() -> None:
    """That of a long prompt runs in a thread, and the last event does not."""
    made = reply(stream=True, return_full_text=True, truncate=1)
    made.answer.prompts = [array("i")]
    made.answer.accept(0, i32(list(b"i")), "", True)
    assert made.opening() == b""
    made.answer.prompts = [array("i")]  # nothing is left to be decoded
    out = take(made, delta("a", i32([97]), ("a",), floats(-1))) + end(made)
    assert native_events(out)[-1]["generated_text"] == "ia"


def test_a_truncated_prompt_is_given_back_as_used() -> None:
    made = reply(return_full_text=True, truncate=1)
    made.answer.prompts = [array("i")]
    made.answer.accept(0, i32(list(b"i")), "", 1)
    end(made)
    assert whole(made)["generated_text"] == "i"


@pytest.mark.parametrize(
    ("status", "kind"),
    [(400, "validation"), (413, "validation"), (429, "overloaded"), (500, "generation"), (503, "generation")],
)  # fmt: skip
def test_errors(status: int, kind: str) -> None:
    error = from_failure(Failure("no", status=status))
    assert error_body(error) == {"error": "no", "error_type": kind}
    assert native_events(reply(stream=True).error(error)) == [{"error": "no", "error_type": kind}]
