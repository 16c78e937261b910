"""instructor against BASE_URL, in each of its modes for OpenAI's API; exits 1 if a check fails."""

from __future__ import annotations

import asyncio
import os
from typing import Any

import instructor
from checks import agree, run_all
from openai import AsyncOpenAI, OpenAI
from pydantic import BaseModel, Field

AT = {"base_url": os.environ["BASE_URL"], "api_key": "any", "max_retries": 0}
LOOP = asyncio.new_event_loop()  # one for all, since clients close their connections later
MODES = (
    instructor.Mode.TOOLS,
    instructor.Mode.TOOLS_STRICT,
    instructor.Mode.JSON,
    instructor.Mode.JSON_SCHEMA,
    instructor.Mode.RESPONSES_TOOLS,
)
ASKED: dict[str, Any] = {
    "model": os.environ["MODEL"],
    "messages": [{"role": "user", "content": "Anna is 31 years old."}],
    "temperature": 0,
    "max_tokens": 64,
    "max_retries": 1,
}


class Person(BaseModel):
    """A person."""

    name: str = Field(max_length=12)
    age: int = Field(ge=0, le=120)


def whole(mode: instructor.Mode) -> str:
    client = instructor.from_openai(OpenAI(**AT), mode=mode)
    made = client.chat.completions.create(response_model=Person, **ASKED)
    agree(Person.model_validate(made.model_dump()).name, made.name)
    return repr(made)


def together(mode: instructor.Mode) -> str:
    client = instructor.from_openai(AsyncOpenAI(**AT), mode=mode)

    async def run() -> list[Person]:
        asked = (client.chat.completions.create(response_model=Person, **ASKED) for _ in range(3))
        return list(await asyncio.gather(*asked))

    made = LOOP.run_until_complete(run())
    agree(len({repr(each) for each in made}), 1)
    return f"{len(made)} equal"


def partial(mode: instructor.Mode) -> str:
    client = instructor.from_openai(OpenAI(**AT), mode=mode)
    pieces = list(client.chat.completions.create_partial(response_model=Person, **ASKED))
    last = Person.model_validate(pieces[-1].model_dump())
    return f"{len(pieces)} pieces, {last!r}"


def listed() -> str:
    client = instructor.from_openai(OpenAI(**AT), mode=instructor.Mode.TOOLS)
    asked = ASKED | {"max_tokens": 200}
    made = list(client.chat.completions.create_iterable(response_model=Person, **asked))
    agree(all(isinstance(each, Person) for each in made), True)
    return f"{len(made)} persons"


run_all(
    {f"{mode.value}: whole": lambda mode=mode: whole(mode) for mode in MODES}
    | {f"{mode.value}: together": lambda mode=mode: together(mode) for mode in MODES[:4]}
    | {f"{mode.value}: partial": lambda mode=mode: partial(mode) for mode in MODES[:4]}
    | {"iterable": listed}
)
