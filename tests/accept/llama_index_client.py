"""LlamaIndex's OpenAILike against BASE_URL; exits 1 if a check fails."""

from __future__ import annotations

import asyncio
import os

from checks import agree, run_all
from llama_index.core.llms import ChatMessage
from llama_index.core.prompts import PromptTemplate
from llama_index.core.tools import FunctionTool
from llama_index.llms.openai_like import OpenAILike
from pydantic import BaseModel, Field

llm = OpenAILike(
    model=os.environ["MODEL"],
    api_base=os.environ["BASE_URL"],
    api_key="any",
    is_chat_model=True,
    is_function_calling_model=True,
    should_use_structured_outputs=True,
    temperature=0,
    max_tokens=48,
    max_retries=0,
)
plain = llm.model_copy(update={"is_chat_model": False})
FRANCE = [ChatMessage(role="user", content="What is the capital of France?")]


class City(BaseModel):
    """A city."""

    name: str = Field(max_length=20)
    large: bool


def weather(city: str) -> str:
    """The weather of a city."""
    return f"12 degrees in {city}"


def completes() -> str:
    text = plain.complete("1, 2, 3,").text
    pieces = [piece.delta or "" for piece in plain.stream_complete("1, 2, 3,")]
    agree("".join(pieces), text)
    return repr(text)


def chats() -> str:
    text = llm.chat(FRANCE).message.content
    agree("Paris" in text, True)
    pieces = [piece.delta or "" for piece in llm.stream_chat(FRANCE)]
    agree("".join(pieces), text)
    return repr(text)


async def _together() -> str:
    answers = await asyncio.gather(*(llm.achat(FRANCE) for _ in range(3)))
    agree(len({answer.message.content for answer in answers}), 1)
    stream = await llm.astream_chat(FRANCE)
    pieces = [piece.delta or "" async for piece in stream]
    agree("".join(pieces), answers[0].message.content)
    return "3 at once, and a stream"


def logprobs() -> str:
    answer = llm.chat(FRANCE, logprobs=True, top_logprobs=2)
    agree(len(answer.logprobs) > 0, True)
    return f"{len(answer.logprobs)} tokens"


def structured() -> str:
    made = llm.as_structured_llm(City).complete("Name a city.").raw
    agree(type(made), City)
    other = llm.structured_predict(City, PromptTemplate("Name a city in {place}."), place="Spain")
    agree(type(other), City)
    return f"{made!r} {other!r}"


def tools() -> str:
    tool = FunctionTool.from_defaults(weather)
    answer = llm.chat_with_tools([tool], user_msg="How warm is it in Rome?", tool_required=True,
                                 allow_parallel_tool_calls=False)  # fmt: skip
    (call,) = llm.get_tool_calls_from_response(answer)
    agree((call.tool_name, set(call.tool_kwargs)), ("weather", {"city"}))
    result = llm.predict_and_call([tool], user_msg="How warm is it in Rome?", tool_required=True)
    agree("degrees" in str(result), True)
    return str(result)


run_all(
    {
        "completes": completes,
        "chats": chats,
        "together": lambda: asyncio.run(_together()),
        "logprobs": logprobs,
        "structured": structured,
        "tools": tools,
    }
)
