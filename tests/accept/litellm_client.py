"""litellm against ROOT_URL, by four of its providers; exits 1 if a check fails."""

from __future__ import annotations

import asyncio
import json
import os
from typing import Any

import litellm
from checks import agree, run_all
from pydantic import BaseModel

litellm.telemetry = False
litellm.num_retries = 0
litellm.suppress_debug_info = True
ROOT, BASE, MODEL = os.environ["ROOT_URL"], os.environ["BASE_URL"], os.environ["MODEL"]
PROVIDERS = {"openai": BASE, "hosted_vllm": BASE, "lm_studio": BASE, "anthropic": ROOT}
FRANCE = [{"role": "user", "content": "What is the capital of France?"}]
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 12}},
            "required": ["city"],
        },
    },
}


class Verdict(BaseModel):
    good: bool


def ask(provider: str, **more: Any) -> Any:
    asked = {"messages": FRANCE, "temperature": 0, "max_tokens": 24} | more
    return litellm.completion(
        f"{provider}/{MODEL}", api_base=PROVIDERS[provider], api_key="any", **asked
    )


def whole(provider: str) -> str:
    answer = ask(provider)
    text = answer.choices[0].message.content
    agree("Paris" in text, True)
    usage = answer.usage
    agree(usage.total_tokens, usage.prompt_tokens + usage.completion_tokens)
    return repr(text)


def streamed(provider: str) -> str:
    chunks = list(ask(provider, stream=True, stream_options={"include_usage": True}))
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    agree(text, ask(provider).choices[0].message.content)
    built = litellm.stream_chunk_builder(chunks, messages=FRANCE)
    agree(built.choices[0].message.content, text)
    return f"{len(chunks)} chunks"


def tools(provider: str) -> str:
    asked = [{"role": "user", "content": "How warm is it in Rome?"}]
    answer = ask(provider, messages=asked, tools=[TOOL], tool_choice="required", max_tokens=200)
    call = answer.choices[0].message.tool_calls[0]
    agree((call.function.name, set(json.loads(call.function.arguments))), ("weather", {"city"}))
    told = {"role": "tool", "tool_call_id": call.id, "content": "12 degrees"}
    turns = [*asked, answer.choices[0].message.model_dump(), told]
    again = ask(provider, messages=turns, tools=[TOOL])
    agree(bool(again.choices[0].message.content or again.choices[0].message.tool_calls), True)
    return call.function.arguments


def tools_streamed(provider: str) -> str:
    chunks = list(ask(provider, tools=[TOOL], tool_choice="required", max_tokens=200, stream=True))
    call = litellm.stream_chunk_builder(chunks).choices[0].message.tool_calls[0]
    agree((call.function.name, set(json.loads(call.function.arguments))), ("weather", {"city"}))
    return f"{len(chunks)} chunks"


def structured(provider: str) -> str:
    answer = ask(provider, response_format=Verdict, max_tokens=100)
    return repr(Verdict.model_validate_json(answer.choices[0].message.content))


def refused(provider: str) -> str:
    try:
        ask(provider, messages=[{"role": "user", "content": "x y " * 20_000}])
    except litellm.ContextWindowExceededError as error:
        return str(error)[:80]
    raise ValueError("a prompt that is too long was taken")


def unknown(provider: str) -> str:
    try:
        litellm.completion(
            f"{provider}/nobody", api_base=PROVIDERS[provider], api_key="any", messages=FRANCE
        )
    except litellm.NotFoundError as error:
        return str(error)[:80]
    raise ValueError("a model that does not exist was taken")


def text() -> str:
    answer = litellm.text_completion(
        model=f"text-completion-openai/{MODEL}", prompt="1, 2, 3,", api_base=BASE, api_key="any",
        max_tokens=4, temperature=0, logprobs=1,
    )  # fmt: skip
    agree(len(answer.choices[0].logprobs.tokens), 4)
    return repr(answer.choices[0].text)


def responses() -> str:
    answer = litellm.responses(
        model=f"openai/{MODEL}", input="What is the capital of France?", api_base=BASE, api_key="any",
        max_output_tokens=24, temperature=0,
    )  # fmt: skip
    agree("Paris" in answer.output[0].content[0].text, True)
    return answer.id


async def _together() -> str:
    asked = (
        litellm.acompletion(f"openai/{MODEL}", messages=FRANCE, api_base=BASE, api_key="any",
                            temperature=0, max_tokens=8)
        for _ in range(4)
    )  # fmt: skip
    texts = {answer.choices[0].message.content for answer in await asyncio.gather(*asked)}
    agree(len(texts), 1)
    return "4 at once"


ALL = (whole, streamed, tools, tools_streamed, structured, refused, unknown)
run_all(
    {f"{p}: {check.__name__}": lambda c=check, p=p: c(p) for p in PROVIDERS for check in ALL}
    | {"text": text, "responses": responses, "together": lambda: asyncio.run(_together())}
)
