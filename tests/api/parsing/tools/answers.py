"""Answers with calls in every format, and what must be found in them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from asyncllm.api.parsing.events import Arguments, Call, CallEnd, CallStart, Content, Event, Tool
from asyncllm.api.parsing.tools import deepseek, make_parser
from asyncllm.api.parsing.tools.base import ToolParser, new_id


@dataclass(frozen=True)
class Parsed:
    """What a whole answer holds."""

    content: str
    calls: tuple[Call, ...]

    @property
    def complete(self) -> bool:
        return bool(self.calls) and all(call.complete for call in self.calls)


def parse_whole(
    format_name: str, text: str, tools: Sequence[Tool], make_id: Callable[[], str] = new_id
) -> Parsed:
    parser = make_parser(format_name, tools, make_id)
    events = parser.push(text) + parser.finish()
    content = "".join(event.text for event in events if isinstance(event, Content))
    return Parsed(content, tuple(parser.calls))


WS = " \t\r\n"
PROPERTIES = {
    "s": {"type": "string"},
    "i": {"type": "integer"},
    "n": {"type": "number"},
    "b": {"type": "boolean"},
    "o": {"type": "object"},
    "a": {"type": "array"},
    "u": {"anyOf": [{"type": "string"}, {"type": "null"}]},
}
NAMES = ("get_weather", "f", "search-web.v2")
TOOLS = [Tool(name, {"type": "object", "properties": PROPERTIES}) for name in NAMES]
EXAMPLES = settings(
    derandomize=True,
    database=None,
    deadline=None,
    max_examples=15,
    suppress_health_check=list(HealthCheck),
)

Found = tuple[str, list[tuple[str, str, str, bool, str]]]


@dataclass(frozen=True)
class Made:
    """A call as it should be found; ``text`` None: any JSON of these arguments."""

    name: str
    arguments: dict[str, Any]
    text: str | None


def parser(format_name: str) -> ToolParser:
    """A parser whose ids count."""
    numbers = count()
    return make_parser(format_name, TOOLS, lambda: f"{next(numbers):09d}{0:015d}")


def feed(p: ToolParser, pieces: Iterable[str]) -> list[Event]:
    """All events of an answer that comes in pieces."""
    events: list[Event] = []
    for piece in pieces:
        events += p.push(piece)
    return events + p.finish()


def found(p: ToolParser, events: list[Event]) -> Found:
    """Content and calls as the events tell them, checked against ``calls`` and for their order."""
    content, heads, texts, ends = "", [], list[str](), list[bool]()
    for event in events:
        match event:
            case Content():
                assert len(ends) == len(heads), "content inside a call"
                assert event.text
                content += event.text
            case CallStart():
                assert event.index == len(heads) == len(ends)
                heads.append((event.id, event.name))
                texts.append("")
            case Arguments():
                assert event.index == len(heads) - 1 == len(ends)
                assert event.text
                texts[-1] += event.text
            case CallEnd():
                assert event.index == len(heads) - 1 == len(ends)
                ends.append(event.complete)
    assert len(ends) == len(heads)
    calls = [(c.id, c.name, c.arguments, c.complete, c.text) for c in p.calls]
    told = zip(heads, texts, ends, strict=True)
    assert [(*head, text, end) for head, text, end in told] == [call[:4] for call in calls]
    assert len({call[0] for call in calls}) == len(calls)
    return content, calls


def parse(format_name: str, pieces: Iterable[str]) -> Found:
    """What is found in an answer that comes in pieces."""
    p = parser(format_name)
    return found(p, feed(p, pieces))


def conserved(format_name: str, text: str) -> bool:
    """Every character but white space is in content or in a call, and in order."""
    p = parser(format_name)
    parts = [
        event.text if isinstance(event, Content) else p.calls[event.index].text
        for event in feed(p, [text])
        if isinstance(event, Content | CallStart)
    ]
    return "".join("".join(parts).split()) == "".join(text.split())


def cut(text: str, places: Iterable[int]) -> list[str]:
    """Text in pieces, some of them empty."""
    at = sorted({min(p, len(text)) for p in places})
    return [text[a:b] for a, b in zip([0, *at], [*at, len(text)], strict=True)]


def content_of(parts: list[str | None]) -> str:
    """Content by the rule for white space; None stands for a call."""
    visible = [i for i, part in enumerate(parts) if part is not None and part.strip(WS)]
    calls = [i for i, part in enumerate(parts) if part is None]
    kept = [part or "" for part in parts]
    for i in range(1, len(parts) - 1):
        if parts[i - 1] is parts[i + 1] is None and i not in visible:
            kept[i] = ""
    content = "".join(kept)
    if calls and (not visible or calls[0] < visible[0]):
        content = content.lstrip(WS)
    if calls and (not visible or calls[-1] > visible[-1]):
        content = content.rstrip(WS)
    return content


# -- arguments -----------------------------------------------------------------------------------

NASTY = (
    "</tool_call>", "<tool_call>", '{"name": "f", "arguments": {}}', "[TOOL_CALLS] [", "}}]]", '\\"',
    "```", "<|tool_call_end|>", deepseek.CALL_END, "\\u12", "😀é漢", '"; {', "</think>", "\n\n\t",
    "<function=", "<|channel|>", "\x00\x1f\x7f\u2028",
)  # fmt: skip
strings = st.text(max_size=8) | st.sampled_from(NASTY)
scalars = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
)
values = st.recursive(
    scalars | strings,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(strings, inner, max_size=3),
    max_leaves=6,
)
objects = st.dictionaries(strings, values, max_size=3)


@st.composite
def json_calls(draw: st.DrawFn) -> Made:
    arguments = draw(objects)
    text = json.dumps(
        arguments,
        ensure_ascii=draw(st.booleans()),
        indent=draw(st.sampled_from([None, None, 2])),
        separators=draw(st.sampled_from([None, (",", ":")])),
    )
    return Made(draw(st.sampled_from(NAMES)), arguments, text)


# strings for tags: none of their end tags
tagged_strings = st.text(max_size=8) | st.sampled_from(
    [
        "x <parameter=b>",
        "</function> goes on",
        '{["\\',
        "<",
        "\n",
        "a\n\nb\n",
        "😀",
        "null",
        "5",
        "<tool",
    ]
)
tagged_values = {
    "s": tagged_strings,
    "i": st.integers(),
    "n": st.floats(allow_nan=False, allow_infinity=False),
    "b": st.booleans(),
    "o": st.dictionaries(st.text('ab"}', max_size=3), scalars, max_size=2),
    "a": st.lists(scalars | st.text("c]{\n", max_size=3), max_size=3),
    "u": st.none() | st.text("xyz ", min_size=1, max_size=5),
}


@st.composite
def tagged_calls(draw: st.DrawFn) -> Made:
    keys = draw(st.lists(st.sampled_from(list(PROPERTIES)), unique=True, max_size=4))
    arguments = {key: draw(tagged_values[key]) for key in keys}
    return Made(draw(st.sampled_from(NAMES)), arguments, None)


# -- how formats write calls -----------------------------------------------------------------------


def _object(call: Made, key: str) -> str:
    return f'{{"name": "{call.name}", "{key}": {call.text}}}'


def hermes(calls: list[Made], i: int) -> str:
    return "\n".join(f"<tool_call>\n{_object(c, 'arguments')}\n</tool_call>" for c in calls)


def hermes_odd(calls: list[Made], i: int) -> str:
    inner = "\n".join(
        f'{{"id": [1, "}}"], "arguments": {c.text}, "name":"{c.name}"}}' for c in calls
    )
    return f"<tool_call>{inner}</tool_call>"


def llama3(calls: list[Made], i: int) -> str:
    return "; ".join(_object(c, "parameters") for c in calls)


def llama3_mark(calls: list[Made], i: int) -> str:
    return ";".join(f"<|python_tag|>{_object(c, 'parameters')}" for c in calls)


def mistral(calls: list[Made], i: int) -> str:
    return "".join(f"[TOOL_CALLS]{c.name}[ARGS]{c.text}" for c in calls)


def mistral_list(calls: list[Made], i: int) -> str:
    return f"[TOOL_CALLS] [{', '.join(_object(c, 'arguments') for c in calls)}]"


def json_list(calls: list[Made], i: int) -> str:
    return f"[{', '.join(_object(c, 'arguments') for c in calls)}]"


def phi4(calls: list[Made], i: int) -> str:
    return f"<|tool_call|>{json_list(calls, i)}<|/tool_call|>"


def phi4_functools(calls: list[Made], i: int) -> str:
    return f"functools{json_list(calls, i)}"


def deepseekv3(calls: list[Made], i: int) -> str:
    inner = "\n".join(
        f"{deepseek.CALL}function{deepseek.SEP}{c.name}\n```json\n{c.text}\n```{deepseek.CALL_END}"
        for c in calls
    )
    return f"{deepseek.CALLS}{inner}{deepseek.CALLS_END}"


def deepseekv31(calls: list[Made], i: int) -> str:
    inner = "".join(
        f"{deepseek.CALL}{c.name}{deepseek.SEP}{c.text}{deepseek.CALL_END}" for c in calls
    )
    return f"{deepseek.CALLS}{inner}{deepseek.CALLS_END}"


def kimi_k2(calls: list[Made], i: int) -> str:
    inner = "".join(
        f"<|tool_call_begin|>functions.{c.name}:{k}<|tool_call_argument_begin|>{c.text}<|tool_call_end|>"
        for k, c in enumerate(calls, i)
    )
    return f"<|tool_calls_section_begin|>{inner}<|tool_calls_section_end|>"


def gpt_oss(calls: list[Made], i: int) -> str:
    return "".join(
        f"<|channel|>commentary to=functions.{c.name} <|constrain|>json<|message|>{c.text}<|call|>"
        for c in calls
    )


def _raw(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def qwen3_coder(calls: list[Made], i: int) -> str:
    def one(c: Made) -> str:
        inner = "".join(
            f"<parameter={k}>\n{_raw(v)}\n</parameter>\n" for k, v in c.arguments.items()
        )
        return f"<tool_call>\n<function={c.name}>\n{inner}</function>\n</tool_call>"

    return "\n".join(map(one, calls))


def qwen3_coder_careless(calls: list[Made], i: int) -> str:
    """No end tag at each function's last parameter."""

    def one(c: Made) -> str:
        inner = "</parameter>".join(f"<parameter={k}>\n{_raw(v)}\n" for k, v in c.arguments.items())
        return f"<tool_call><function={c.name}>{inner}</function></tool_call>"

    return "".join(map(one, calls))


def glm47(calls: list[Made], i: int) -> str:
    def one(c: Made) -> str:
        inner = "".join(
            f"<arg_key>{k}</arg_key>\n<arg_value>{_raw(v)}</arg_value>\n"
            for k, v in c.arguments.items()
        )
        return f"<tool_call>{c.name}\n{inner}</tool_call>"

    return "\n".join(map(one, calls))


Write = Callable[[list[Made], int], str]
# (format, how it writes a group of calls)
WRITERS: dict[str, tuple[str, Write]] = {
    w.__name__: (name, w)
    for name, w in (
        ("hermes", hermes), ("qwen25", hermes_odd), ("llama3", llama3), ("llama3", llama3_mark),
        ("mistral", mistral), ("mistral", mistral_list), ("json", json_list),
        ("deepseekv3", deepseekv3), ("deepseekv3", deepseekv31), ("kimi_k2", kimi_k2),
        ("gpt_oss", gpt_oss), ("qwen3_coder", qwen3_coder), ("qwen3_coder", qwen3_coder_careless),
        ("glm47", glm47), ("phi4", phi4), ("phi4", phi4_functools),
    )
}  # fmt: skip


@dataclass(frozen=True)
class Answer:
    text: str
    content: str
    calls: list[Made]


# white space, letters, and the beginnings of marks
contents = st.text('ab <>|\n\t}".;é😀', max_size=8) | st.sampled_from(
    ["", "", "<tool_", "\n\n", "hi\n"]
)


@st.composite
def answers(draw: st.DrawFn, writer: str) -> Answer:
    _, write = WRITERS[writer]
    tagged = writer.startswith(("qwen3", "glm"))
    one = tagged_calls() if tagged else json_calls()
    first = draw(contents)
    text, calls = first, list[Made]()
    parts: list[str | None] = [first]
    for _ in range(draw(st.integers(1, 2))):
        group = draw(st.lists(one, min_size=1, max_size=3))
        text += write(group, len(calls))
        calls += group
        after = draw(contents)
        if writer.startswith("llama3") and not after.strip(WS + ";"):
            after = "\n."  # another group behind a semicolon would be the same group
        text += after
        parts += [None, after]
    if text.endswith(("<", "<|", "<tool_")) and isinstance(last := parts[-1], str):
        text, parts[-1] = f"{text}.", f"{last}."  # not cut in a mark
    return Answer(text, content_of(parts), calls)
