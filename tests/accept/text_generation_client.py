"""text-generation against ROOT_URL (--use_tgi_api); exits 1 if a check fails.

Its answers are pydantic models without defaults for most fields, so that any other shape raises.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Callable
from typing import Any

from checks import agree, run_all
from text_generation import AsyncClient, Client
from text_generation.errors import ValidationError
from text_generation.types import Grammar, GrammarType

client = Client(os.environ["ROOT_URL"], timeout=120)
PROMPT = "The capital of France is"
SCHEMA = {
    "type": "object",
    "properties": {"ok": {"type": "boolean"}},
    "required": ["ok"],
    "additionalProperties": False,
}


def whole() -> str:
    answer = client.generate(PROMPT, max_new_tokens=5)
    agree(answer.details.generated_tokens, len(answer.details.tokens))
    agree("".join(token.text for token in answer.details.tokens), answer.generated_text)
    return repr(answer.generated_text)


def streamed() -> str:
    events = list(client.generate_stream(PROMPT, max_new_tokens=5))
    text = "".join(event.token.text for event in events if not event.token.special)
    agree(events[-1].generated_text, text)
    agree(text, client.generate(PROMPT, max_new_tokens=5).generated_text)
    return f"{len(events)} events"


def options() -> str:
    full = client.generate(PROMPT, max_new_tokens=3, return_full_text=True).generated_text
    agree(full.startswith(PROMPT), True)
    stopped = client.generate("1, 2, 3,", max_new_tokens=20, stop_sequences=[" 5"])
    agree(stopped.details.finish_reason.value, "stop_sequence")
    best = client.generate(PROMPT, max_new_tokens=3, do_sample=True, best_of=2)
    agree(len(best.details.best_of_sequences), 1)
    seeded = [
        client.generate(PROMPT, max_new_tokens=5, do_sample=True, temperature=1.5, seed=s)
        for s in (7, 7)
    ]
    agree(seeded[0].generated_text, seeded[1].generated_text)
    return "full text, stop, best_of, seed"


def details() -> str:
    answer = client.generate(PROMPT, max_new_tokens=2, decoder_input_details=True, top_n_tokens=2)
    agree([token.logprob is None for token in answer.details.prefill[:2]], [True, False])
    agree([len(tokens) for tokens in answer.details.top_tokens], [2, 2])
    return f"{len(answer.details.prefill)} tokens of the prompt"


def grammars() -> str:
    form = Grammar(type=GrammarType.Json, value=SCHEMA)
    made = client.generate("Is it good?", max_new_tokens=40, grammar=form).generated_text
    agree(set(json.loads(made)), {"ok"})
    form = Grammar(type=GrammarType.Regex, value="[0-9]{3}")
    number = client.generate("A number:", max_new_tokens=10, grammar=form).generated_text
    agree((len(number), number.isdigit()), (3, True))
    return f"{made} {number}"


def chats() -> str:
    answer = client.chat([{"role": "user", "content": "Hi"}], max_tokens=4, temperature=0.5, seed=1)
    agree((answer.object, len(answer.choices)), ("chat.completion", 1))
    return f"{answer.system_fingerprint} {answer.choices[0].message.content!r}"


def refusals() -> str:
    try:
        client.generate("x" * 400_000, max_new_tokens=1)
    except ValidationError as error:
        return str(error)[:80]
    raise ValueError("a prompt that is too long was taken")


async def _together() -> str:
    other = AsyncClient(os.environ["ROOT_URL"], timeout=120)
    answers = await asyncio.gather(*(other.generate(PROMPT, max_new_tokens=4) for _ in range(4)))
    agree(len({answer.generated_text for answer in answers}), 1)
    pieces = [event.token.text async for event in other.generate_stream(PROMPT, max_new_tokens=4)]
    agree("".join(pieces), answers[0].generated_text)
    return "4 at once, and a stream"


CHECKS: dict[str, Callable[[], Any]] = {
    "whole": whole,
    "streamed": streamed,
    "options": options,
    "details": details,
    "grammars": grammars,
    "chats, by the name tgi": chats,
    "refusals": refusals,
    "asynchronous": lambda: asyncio.run(_together()),
}

run_all(CHECKS)
