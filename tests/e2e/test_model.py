"""Answers of a running server against transformers, on the embedded model in float32."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from tests.e2e.conftest import Reference
from tests.e2e.process import Server, stream_text
from tests.models.harness import Driver, Sequence, make_device

# float32 on CPU gives the same tokens unless two are as good as equal; Triton's float32 products
# are tf32 on a GPU
MARGIN = 0.05 if torch.cuda.is_available() else 1e-3
CLOSE = 0.05 if torch.cuda.is_available() else 2e-3

SAFE = "Write a JavaScript function that debounces another function. Return only code."


@pytest.mark.parametrize("size", [1, 2, 17, 255, 256, 257, 600, 1100])
def test_greedy_equals_transformers(
    server: Server, reference: Reference, prose: list[int], size: int
) -> None:
    prompt = prose[40 : 40 + size]
    answer = server.tokens(prompt, 16, ignore_eos=True)
    assert len(answer) == 16
    reference.check_greedy(prompt, answer, MARGIN)


def test_chunked_prefill_equals_whole(
    demo_dir: Path, reference: Reference, prose: list[int]
) -> None:
    where = "cuda" if torch.cuda.is_available() else "cpu"
    driver = Driver(make_device(demo_dir, "fp32", where, num_lanes=2, max_len=1024), 2048)
    whole, chunked = (Sequence(lane, prose[:700]) for lane in range(2))
    driver.generate([whole], 8)
    driver.generate([chunked], 8, 190)
    reference.check_greedy(whole.prompt, whole.outputs, MARGIN)
    if chunked.outputs != whole.outputs:  # a near-tie
        reference.check_greedy(chunked.prompt, chunked.outputs, MARGIN)


def test_logprobs_equal_transformers(
    server: Server, reference: Reference, prose: list[int]
) -> None:
    prompt = prose[:300]
    reply = server.complete(prompt, 8, logprobs=5, echo=True, ignore_eos=True)
    got = reply["choices"][0]["logprobs"]
    answer = server.tokens(prompt, 8, ignore_eos=True)
    scores = reference.scores(prompt + answer)
    chosen = scores[:-1].gather(1, torch.tensor((prompt + answer)[1:])[:, None])[:, 0]
    assert got["token_logprobs"][0] is None
    torch.testing.assert_close(torch.tensor(got["token_logprobs"][1:]), chosen, atol=CLOSE, rtol=0)
    for position, top in list(enumerate(got["top_logprobs"]))[1:]:
        want = scores[position - 1].topk(5).values
        have = torch.tensor(sorted(top.values(), reverse=True)[:5])
        torch.testing.assert_close(have, want[: len(have)], atol=CLOSE, rtol=0)


def test_log_probabilities_of_given_tokens(
    server: Server, reference: Reference, prose: list[int]
) -> None:
    prompt, wanted = prose[:50], [11, 260, 5]
    body = {
        "prompt": prompt, "max_tokens": 3, "temperature": 0, "ignore_eos": True, "logprobs": 1,
        "logprob_token_ids": wanted, "return_tokens_as_token_ids": True, "return_token_ids": True,
    }  # fmt: skip
    choice = server.post("/v1/completions", body)["choices"][0]
    scores = reference.scores(prompt + choice["token_ids"])[len(prompt) - 1 : -1]
    for top, want in zip(choice["logprobs"]["top_logprobs"], scores, strict=True):
        have = torch.tensor([top[f"token_id:{token}"] for token in wanted])
        torch.testing.assert_close(have, want[wanted], atol=CLOSE, rtol=0)


def test_prefix_hit_gives_what_a_miss_gives(server: Server, prose: list[int]) -> None:
    prompt = prose[500:1100]
    body = {"prompt": prompt, "max_tokens": 16, "temperature": 0, "ignore_eos": True}
    miss, hit = (server.post("/v1/completions", body) for _ in range(2))
    cached = [r["usage"]["prompt_tokens_details"]["cached_tokens"] for r in (miss, hit)]
    assert cached[0] < 100
    assert cached[1] == len(prompt) - 1  # one token is always computed
    assert miss["choices"][0]["text"] == hit["choices"][0]["text"]


def test_alone_gives_what_a_batch_of_16_gives(server: Server, prose: list[int]) -> None:
    prompts = [prose[i * 50 : i * 50 + 20 + 7 * i] for i in range(16)]

    async def ask(session: aiohttp.ClientSession, prompt: list[int]) -> str:
        body = {"prompt": prompt, "max_tokens": 8, "temperature": 0, "ignore_eos": True}
        async with session.post(f"{server.url}/v1/completions", json=body) as reply:
            return str((await reply.json())["choices"][0]["text"])

    async def together() -> list[str]:
        async with aiohttp.ClientSession() as session:
            return list(await asyncio.gather(*(ask(session, p) for p in prompts)))

    batch = server.run(together())
    for i in (0, 6, 11, 15):
        assert server.complete(prompts[i], 8, ignore_eos=True)["choices"][0]["text"] == batch[i]


def test_chat_answers_sensibly(server: Server) -> None:
    body = {"messages": [{"role": "user", "content": SAFE}], "max_tokens": 48, "temperature": 0}
    reply = server.post("/v1/chat/completions", body)
    text = reply["choices"][0]["message"]["content"]
    assert "function" in text
    assert "debounce" in text.lower()


# near ties: with logits in bfloat16 each is answered otherwise
@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("What is the capital of France?", "The capital of France is Paris"),
        ("Who wrote Romeo and Juliet?", "William Shakespeare"),
        ("How many legs does a spider have?", "the spider's anatomy"),
    ],
)
def test_short_questions_are_answered_as_by_transformers(
    server: Server, reference: Reference, demo_dir: Path, question: str, answer: str
) -> None:
    messages = [{"role": "user", "content": question}]
    theirs = AutoTokenizer.from_pretrained(demo_dir)
    ids = theirs.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    body = {"messages": messages, "temperature": 0, "max_tokens": 24}
    text = server.post("/v1/chat/completions", body)["choices"][0]["message"]["content"]
    assert answer in text
    reference.check_greedy(ids, theirs.encode(text), MARGIN)


def test_streamed_text_equals_the_whole(server: Server) -> None:
    body = {
        "prompt": "Emoji: 😀 🎉 naïve café 日本語. Again: 😀 🎉",
        "max_tokens": 40,
        "temperature": 0,
    }
    whole = server.post("/v1/completions", body)["choices"][0]["text"]

    async def streamed() -> str:
        async with aiohttp.ClientSession() as session:
            url = f"{server.url}/v1/completions"
            parts = [c async for c in stream_text(session, url, body)]
            return "".join(p["choices"][0]["text"] for p in parts if p["choices"])

    assert server.run(streamed()) == whole


def test_stop_string_across_tokens_is_cut(server: Server, prose: list[int]) -> None:
    free = server.complete(prose[:200], 40, ignore_eos=True)["choices"][0]["text"]
    middle = len(free) // 2
    stop = free[middle : middle + 9]
    reply = server.complete(prose[:200], 40, ignore_eos=True, stop=[stop])["choices"][0]
    assert reply["finish_reason"] == "stop"
    assert reply["text"] == free[: free.index(stop)]


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages"])
def test_the_text_of_a_special_token_stops_at_it(server: Server, path: str) -> None:
    messages = [{"role": "user", "content": "What is 2 + 2?"}]
    body = {"messages": messages, "temperature": 0, "max_tokens": 60}
    free = server.post(path, body)
    if path == "/v1/messages":
        reply = server.post(path, body | {"stop_sequences": ["###", "<|im_end|>"]})
        assert reply["content"] == free["content"]
        assert (reply["stop_reason"], reply["stop_sequence"]) == ("stop_sequence", "<|im_end|>")
        return
    reply = server.post(path, body | {"stop": ["###", "<|im_end|>"], "ignore_eos": True})
    assert reply["choices"][0] == free["choices"][0]
    assert reply["usage"]["completion_tokens"] == free["usage"]["completion_tokens"] < 60


def test_stop_sequence_of_ids_is_cut(server: Server, prose: list[int]) -> None:
    free = server.tokens(prose[:200], 24, ignore_eos=True)
    stop = free[9:13]
    at = next(i for i in range(len(free)) if free[i : i + 4] == stop)
    parameters = {"max_new_tokens": 24, "ignore_eos": True, "return_details": True}
    body = {"inputs": prose[:200], "parameters": parameters | {"stop_sequences": [stop]}}
    reply = server.post("/generate", body)
    assert [token["id"] for token in reply["tokens"]] == free[: at + 4]
    assert reply["generated_text"] == ["".join(t["text"] for t in reply["tokens"][:at])]
    assert (reply["finish_reason"], reply["count_output_tokens"]) == ("stop", at + 4)


def test_seed_repeats_and_choices_differ(server: Server) -> None:
    body = {"prompt": "Once upon a time", "max_tokens": 12, "temperature": 1.0, "seed": 5, "n": 3}
    first, again = (server.post("/v1/completions", body) for _ in range(2))
    texts = [c["text"] for c in first["choices"]]
    assert texts == [c["text"] for c in again["choices"]]
    assert len(set(texts)) > 1


def test_penalties_and_bias_change_the_answer(
    server: Server, prose: list[int], tokenizer: Tokenizer
) -> None:
    plain = server.tokens(prose[:64], 12, ignore_eos=True)
    banned = plain[0]
    reply = server.complete(prose[:64], 12, ignore_eos=True, logit_bias={str(banned): -100})
    assert not reply["choices"][0]["text"].startswith(tokenizer.decode([banned]))
    once = server.tokens(prose[:64], 24, ignore_eos=True, repetition_penalty=10.0)
    assert len(set(once)) == len(once)  # nothing is said twice


def test_min_and_max_new_tokens(server: Server) -> None:
    chat = {"messages": [{"role": "user", "content": "Say hi."}], "temperature": 0}
    reply = server.post("/v1/chat/completions", {**chat, "max_tokens": 3})
    assert reply["usage"]["completion_tokens"] == 3
    assert reply["choices"][0]["finish_reason"] == "length"
    long = server.post("/v1/chat/completions", {**chat, "max_tokens": 60, "min_tokens": 60})
    assert long["usage"]["completion_tokens"] == 60


def test_tools_are_offered_and_the_answer_has_a_valid_shape(server: Server) -> None:
    """Whatever the model says: it is small, and its template knows no tools."""
    schema = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
    tool = {"type": "function", "function": {"name": "weather", "parameters": schema}}
    asked = "Call the function weather for Rome, in the given format."
    turns: list[dict[str, Any]] = [{"role": "user", "content": asked}]
    body = {"messages": turns, "tools": [tool], "temperature": 0,
            "max_tokens": 96, "tool_choice": "auto"}  # fmt: skip
    bare = server.post("/v1/chat/completions", {**body, "tools": None})
    whole = server.post("/v1/chat/completions", body)
    assert whole["usage"]["prompt_tokens"] > bare["usage"]["prompt_tokens"] + 50
    (choice,) = whole["choices"]
    message, calls = choice["message"], choice["message"].get("tool_calls", [])
    assert message.keys() - {"tool_calls"} == {"role", "content", "refusal"}
    assert message["content"] or calls
    for call in calls:
        assert call["function"]["name"]
        if choice["finish_reason"] == "tool_calls":
            assert isinstance(json.loads(call["function"]["arguments"]), dict)
    assert choice["finish_reason"] in (["tool_calls", "length"] if calls else ["stop", "length"])
    result = {"role": "tool", "content": "21 degrees", "tool_call_id": "call_1"}
    call = {"id": "call_1", "type": "function",
            "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}  # fmt: skip
    turns = [*turns, {"role": "assistant", "content": None, "tool_calls": [call]}, result]
    after = server.post("/v1/chat/completions", {**body, "messages": turns})
    assert after["choices"][0]["message"]["role"] == "assistant"
    assert after["usage"]["prompt_tokens"] > whole["usage"]["prompt_tokens"]


@pytest.mark.parametrize("temperature", [0, 1.3])
@pytest.mark.parametrize("choice", ["required", "weather", "single"])
def test_forced_calls_are_valid(server: Server, choice: str, temperature: float) -> None:
    city = {"type": "string", "maxLength": 20}
    schema = {"type": "object", "properties": {"city": city}, "required": ["city"]}
    tools = [
        {"type": "function", "function": {"name": "weather", "parameters": schema}},
        {"type": "function", "function": {"name": "stop"}},
    ]
    named = {"type": "function", "function": {"name": "weather"}}
    body = {"messages": [{"role": "user", "content": "How warm is it in Rome?"}], "tools": tools,
            "tool_choice": named if choice == "weather" else "required", "max_tokens": 256,
            "parallel_tool_calls": choice != "single", "temperature": temperature}  # fmt: skip
    for seed in range(2 if temperature else 1):
        (told,) = server.post("/v1/chat/completions", {**body, "seed": seed})["choices"]
        message = told["message"]
        assert message["content"] is None
        for call in message["tool_calls"]:
            arguments = json.loads(call["function"]["arguments"])
            if call["function"]["name"] == "weather":
                assert arguments.keys() == {"city"}
            else:
                assert (call["function"]["name"], arguments) == ("stop", {})
        assert told["finish_reason"] == "tool_calls"
        if choice == "weather":
            assert [c["function"]["name"] for c in message["tool_calls"]] == ["weather"]
        if choice == "single":
            assert len(message["tool_calls"]) == 1
