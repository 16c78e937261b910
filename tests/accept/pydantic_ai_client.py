"""pydantic-ai against ROOT_URL, by three of its models; exits 1 if a check fails."""

from __future__ import annotations

import os
from typing import Any

from anthropic import AsyncAnthropic
from checks import agree, run_all
from pydantic import BaseModel, Field
from pydantic_ai import Agent, NativeOutput, RunContext, ToolOutput
from pydantic_ai.models.anthropic import AnthropicModel
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.anthropic import AnthropicProvider
from pydantic_ai.providers.openai import OpenAIProvider

MODEL = os.environ["MODEL"]
OPENAI = OpenAIProvider(base_url=os.environ["BASE_URL"], api_key="any")
ANTHROPIC = AnthropicProvider(
    anthropic_client=AsyncAnthropic(base_url=os.environ["ROOT_URL"], api_key="any", max_retries=0)
)
MODELS: dict[str, Any] = {
    "chat": OpenAIChatModel(MODEL, provider=OPENAI),
    "responses": OpenAIResponsesModel(MODEL, provider=OPENAI),
    "anthropic": AnthropicModel(MODEL, provider=ANTHROPIC),
}
SHORT: Any = {"temperature": 0.0, "max_tokens": 48}
FRANCE = "What is the capital of France?"


class City(BaseModel):
    name: str = Field(max_length=20)
    large: bool


def answers(kind: str) -> str:
    result = Agent(MODELS[kind], instructions="Be brief.", model_settings=SHORT).run_sync(FRANCE)
    agree("Paris" in result.output, True)
    agree(result.usage.output_tokens > 0, True)
    return repr(result.output)


def streams(kind: str) -> str:
    agent = Agent(MODELS[kind], model_settings=SHORT)
    result = agent.run_stream_sync(FRANCE)
    pieces = list(result.stream_text(delta=True, debounce_by=None))
    agree("".join(pieces), agent.run_sync(FRANCE).output)
    return f"{len(pieces)} pieces"


def remembers(kind: str) -> str:
    agent = Agent(MODELS[kind], model_settings=SHORT)
    first = agent.run_sync("My name is Bo.")
    again = agent.run_sync("What is my name?", message_history=first.all_messages())
    agree(len(again.all_messages()), 4)
    return repr(again.output)


def structures(kind: str, output: Any) -> str:
    agent: Any = Agent(MODELS[kind], output_type=output, model_settings=SHORT | {"max_tokens": 200})
    result = agent.run_sync("Name a city.")
    agree(type(result.output), City)
    return repr(result.output)


def calls(kind: str) -> str:
    """A tool, then a tool that is the answer: the latter is the only one left to call."""
    asked: list[str] = []

    async def once(ctx: RunContext[None], definition: Any) -> Any:
        return None if asked else definition

    def weather(city: str) -> str:
        """The weather of a city."""
        asked.append(city)
        return "12 degrees"

    agent: Any = Agent(
        MODELS[kind],
        output_type=ToolOutput(City),
        model_settings=SHORT | {"max_tokens": 200, "parallel_tool_calls": False},
    )
    agent.tool_plain(weather, prepare=once)
    result = agent.run_sync("How warm is it in Rome?")
    agree(type(result.output), City)
    return f"{asked} {result.output!r}"


OUTPUTS = {"tool": ToolOutput(City), "native": NativeOutput(City)}
run_all(
    {
        f"{kind}: {check.__name__}": lambda check=check, kind=kind: check(kind)
        for kind in MODELS
        for check in (answers, streams, remembers, calls)
    }
    | {
        f"{kind}: {name} output": lambda kind=kind, output=output: structures(kind, output)
        for kind in MODELS
        for name, output in OUTPUTS.items()
        if (kind, name) != ("anthropic", "native")  # which it takes for Anthropic's own models only
    }
)
