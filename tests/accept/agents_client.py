"""OpenAI's agents SDK against BASE_URL; exits 1 if a check fails."""

from __future__ import annotations

import asyncio
import os
from typing import Annotated, Any

from agents import (
    Agent,
    ModelSettings,
    OpenAIChatCompletionsModel,
    OpenAIResponsesModel,
    Runner,
    SQLiteSession,
    function_tool,
    set_tracing_disabled,
)
from checks import agree, run_all
from openai import AsyncOpenAI
from pydantic import BaseModel, Field

set_tracing_disabled(True)
CLIENT = AsyncOpenAI(base_url=os.environ["BASE_URL"], api_key="any", max_retries=0)
MODELS = {
    "responses": OpenAIResponsesModel(os.environ["MODEL"], CLIENT),
    "chat": OpenAIChatCompletionsModel(os.environ["MODEL"], CLIENT),
}
# an answer that max_tokens cuts is an error to this SDK
SHORT = {"temperature": 0.0, "max_tokens": 400}
ONCE = {"parallel_tool_calls": False}
asked: list[str] = []


class City(BaseModel):
    name: str = Field(max_length=20)
    large: bool


@function_tool
def weather(city: Annotated[str, Field(max_length=12)]) -> str:
    """The weather of a city."""
    asked.append(city)
    return "12 degrees"


def made(kind: str, **more: Any) -> Agent[None]:
    settings = ModelSettings(**SHORT, **more.pop("settings", {}))
    return Agent(
        name="helper",
        instructions="Be brief.",
        model=MODELS[kind],
        model_settings=settings,
        **more,
    )


async def answers(kind: str) -> str:
    result = await Runner.run(made(kind), "What is the capital of France?")
    agree("Paris" in result.final_output, True)
    agree(result.context_wrapper.usage.requests, 1)
    return repr(result.final_output)


async def streams(kind: str) -> str:
    result = Runner.run_streamed(made(kind), "What is the capital of France?")
    pieces = [
        event.data.delta
        async for event in result.stream_events()
        if event.type == "raw_response_event" and event.data.type == "response.output_text.delta"
    ]
    agree("".join(pieces), result.final_output)
    return f"{len(pieces)} pieces"


async def calls(kind: str) -> str:
    asked.clear()
    agent = made(kind, tools=[weather], settings=ONCE | {"tool_choice": "weather"})
    result = await Runner.run(agent, "How warm is it in Rome?", max_turns=4)
    kinds = [item.type for item in result.new_items]
    agree(kinds[:2], ["tool_call_item", "tool_call_output_item"])
    agree(len(asked) >= 1, True)
    return f"{kinds} {asked}"


async def calls_in_streams(kind: str) -> str:
    asked.clear()
    agent = made(kind, tools=[weather], settings=ONCE | {"tool_choice": "required"})
    result = Runner.run_streamed(agent, "How warm is it in Rome?", max_turns=4)
    names = [e.name async for e in result.stream_events() if e.type == "run_item_stream_event"]
    agree(names[:2], ["tool_called", "tool_output"])
    agree(len(asked) >= 1, True)
    return str(names)


async def structures(kind: str) -> str:
    agent = made(kind, output_type=City)
    result = await Runner.run(agent, "Name a city as JSON.")
    agree(type(result.final_output), City)
    return repr(result.final_output)


async def hands_over(kind: str) -> str:
    other = made(kind)
    agent = made(kind, handoffs=[other], settings=ONCE | {"tool_choice": "required"})
    result = await Runner.run(agent, "Hi", max_turns=3)
    agree(result.last_agent is other, True)
    return repr(result.final_output)


async def remembers(kind: str) -> str:
    session = SQLiteSession("one")
    await Runner.run(made(kind), "My name is Bo.", session=session)
    await Runner.run(made(kind), "What is my name?", session=session)
    items = await session.get_items()
    agree(len(items), 4)
    return f"{len(items)} items"


async def goes_on() -> str:
    first = await Runner.run(made("responses"), "My name is Bo.")
    again = await Runner.run(
        made("responses"), "What is my name?", previous_response_id=first.last_response_id
    )
    agree(
        again.raw_responses[0].usage.input_tokens > first.raw_responses[0].usage.input_tokens, True
    )
    return repr(again.final_output)


ALL = (answers, streams, calls, calls_in_streams, structures, hands_over, remembers)
LOOP = asyncio.new_event_loop()
run_all(
    {
        f"{kind}: {check.__name__}": lambda check=check, kind=kind: LOOP.run_until_complete(
            check(kind)
        )
        for kind in MODELS
        for check in ALL
    }
    | {"responses: goes_on": lambda: LOOP.run_until_complete(goes_on())}
)
