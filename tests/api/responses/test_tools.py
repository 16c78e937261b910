"""Tools of /v1/responses that are no plain functions: namespaces, custom ones, hosted ones."""

from __future__ import annotations

import json
from typing import Any

import pytest

from asyncllm.api.common.chat_template import ChatTemplate
from asyncllm.api.parsing.output_parser import Dialect
from asyncllm.api.responses.store import ResponseStore
from asyncllm.core.request import LARK
from asyncllm.errors import RequestError
from tests.api.harness import Case, rendered, typed_events
from tests.api.responses.harness import ask, parted

SPAWN = {"type": "function", "name": "spawn", "parameters": {"type": "object"}}
AGENTS = {"type": "namespace", "name": "agents", "description": "", "tools": [SPAWN]}
PATCH = {"type": "custom", "name": "patch", "description": "Edits files."}
RULES = {"type": "grammar", "syntax": "regex", "definition": "[a-z]+"}
HOSTED = [{"type": "web_search"}, {"type": "mcp", "server_label": "x"}, {"type": "web_search_2026"}]


def offered(**body: Any) -> dict[str, dict[str, Any]]:
    asked = ask(dialect=Dialect(lists_tools=True), **body)
    tools = rendered(asked.generation)["tools"] or []
    return {tool["function"]["name"]: tool["function"] for tool in tools}


def test_functions_of_namespaces_and_custom_tools_are_offered() -> None:
    tools = offered(tools=[AGENTS, PATCH, *HOSTED])
    assert list(tools) == ["spawn", "patch"]
    assert tools["patch"]["parameters"]["required"] == ["input"]
    assert tools["patch"]["description"].startswith("Edits files.")
    twice = [AGENTS, {**AGENTS, "name": "others"}, SPAWN | {"name": "f"}]
    assert list(offered(tools=twice)) == ["spawn", "others.spawn", "f"]


@pytest.mark.parametrize("tools", [[AGENTS, SPAWN], [SPAWN, AGENTS]])
def test_a_function_keeps_its_name_beside_namespaces(tools: list[dict[str, Any]]) -> None:
    assert sorted(offered(tools=tools)) == ["agents.spawn", "spawn"]
    for more, told in (({}, "spawn"), ({"namespace": "agents"}, "agents.spawn")):
        choice = {"type": "function", "name": "spawn", **more}
        grammar = ask(tools=tools, tool_choice=choice).generation.params.grammar
        assert grammar is not None
        assert [n for n in ("spawn", "agents.spawn") if f'"{n}"' in grammar[1]] == [told]


def test_hosted_tools_are_left_out_and_named() -> None:
    asked = ask(tools=[SPAWN, *HOSTED])
    assert asked.generation.omitted_tools == ("web_search", "mcp", "web_search_2026")
    assert [tool["type"] for tool in asked.echo["tools"]] == [
        "function",
        *(t["type"] for t in HOSTED),
    ]
    only = ask(tools=HOSTED, tool_choice="auto")
    assert only.generation.params.grammar is None


@pytest.mark.parametrize("behind", ["\r\nSet-Cookie: a=b", "\n", "\0", "\ud800", "é", "0" * 99])
def test_a_header_that_names_left_out_tools_can_be_sent(behind: str) -> None:
    with pytest.raises(RequestError, match=r"tools\[0\]: tools of type"):
        ask(tools=[{"type": f"web_search_20{behind}"}])
    many = [{"type": f"mcp_20{i:03}"} for i in range(129)]
    assert len(ask(tools=many[1:]).generation.omitted_tools) == 128
    with pytest.raises(RequestError, match="129 types of tools"):
        ask(tools=many)


@pytest.mark.parametrize(
    ("choice", "forced"),
    [
        ({"type": "custom", "name": "patch"}, ["patch"]),
        ({"type": "function", "name": "spawn", "namespace": "agents"}, ["spawn"]),
        ({"type": "function", "name": "spawn"}, ["spawn"]),
        ({"type": "allowed_tools", "mode": "required",
          "tools": [{"type": "custom", "name": "patch"}, {"type": "web_search"}]}, ["patch"]),
    ],
)  # fmt: skip
def test_choices(choice: dict[str, Any], forced: list[str]) -> None:
    asked = ask(tools=[AGENTS, PATCH], tool_choice=choice)
    assert asked.generation.params.grammar is not None
    _, schema = asked.generation.params.grammar
    assert [name for name in ("spawn", "patch") if f'"{name}"' in schema] == forced


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"type": "function", "name": "patch"}, 'no function "patch";'),
        ({"type": "custom", "name": "spawn"}, 'no custom tool "spawn";'),
        ({"type": "custom", "name": "patch", "namespace": "agents"}, 'no custom tool "patch" in namespace "agents";'),
        ({"type": "function", "name": "spawn", "namespace": "other"}, 'no function "spawn" in namespace "other";'),
    ],
)  # fmt: skip
@pytest.mark.parametrize("mode", ["named", "auto", "required"])
def test_a_choice_takes_tools_of_its_own_kind_and_namespace_only(
    choice: dict[str, Any], message: str, mode: str
) -> None:
    if mode != "named":
        choice = {"type": "allowed_tools", "mode": mode, "tools": [choice]}
    told = f'{message} the tools are: function "spawn", custom tool "patch"$'
    with pytest.raises(RequestError, match=told) as caught:
        ask(tools=[AGENTS, PATCH], tool_choice=choice)
    assert (caught.value.param, caught.value.status) == ("tool_choice", 400)


def test_the_form_of_a_custom_tool() -> None:
    tools = offered(tools=[{**PATCH, "format": RULES}])
    assert tools["patch"]["parameters"]["properties"]["input"]["pattern"] == "^(?:[a-z]+)$"
    lark = {**RULES, "syntax": "lark", "definition": 'start: "*** Begin"'}
    assert (
        'start: "*** Begin"' in offered(tools=[{**PATCH, "format": lark}])["patch"]["description"]
    )
    for form in (RULES, lark):
        kind, text = ask(tools=[{**PATCH, "format": form}]).generation.params.grammar  # type: ignore[misc]
        assert kind == "calls"
        assert form["definition"] in json.loads(text.partition("\n")[2])[0]["schema"]["properties"][
            "input"
        ].get(LARK, RULES["definition"])


def test_calls_come_back_as_the_client_knows_them() -> None:
    text = "\n".join(
        f'<tool_call>{{"name": "{name}", "arguments": {json.dumps(given)}}}</tool_call>'
        for name, given in (("spawn", {"n": 1}), ("patch", {"input": 'a "b"\n'}))
    )
    case: Case = ("hermes", "", text, None, None, [], "stop")
    made, _ = parted(case, list(text), ResponseStore(), tools=[AGENTS, PATCH])
    whole = json.loads(made.whole())
    made, raw = parted(case, list(text), ResponseStore(), tools=[AGENTS, PATCH], stream=True)
    events = typed_events(raw + made.end(made.answer.choices[0]) + made.closing())
    spawn, patch = whole["output"]
    assert (spawn["type"], spawn["name"], spawn["namespace"]) == (
        "function_call",
        "spawn",
        "agents",
    )
    assert (patch["type"], patch["name"], patch["input"]) == (
        "custom_tool_call",
        "patch",
        'a "b"\n',
    )
    assert patch["id"].startswith("ctc_")
    told = [e for e in events if e["type"].startswith("response.custom_tool_call_input")]
    assert [(e["type"].rpartition(".")[2], e.get("delta", e.get("input"))) for e in told] == [
        ("delta", 'a "b"\n'), ("done", 'a "b"\n')
    ]  # fmt: skip
    shown = [{k: v for k, v in item.items() if k != "call_id"} for item in whole["output"]]
    told = [
        {k: v for k, v in i.items() if k != "call_id"} for i in events[-1]["response"]["output"]
    ]
    assert told == shown


def test_items_of_custom_tools_and_compaction() -> None:
    call = {"type": "custom_tool_call", "call_id": "c", "name": "patch", "input": "a"}
    result = {"type": "custom_tool_call_output", "call_id": "c", "output": "done"}
    compaction = {"type": "compaction", "id": "cmp_1", "encrypted_content": "xyz"}
    asked = ask(input=[{"role": "user", "content": "x"}, compaction, call, result])
    _, called, told = rendered(asked.generation)["messages"]
    assert "patch" in json.dumps(called)
    assert "done" in told["content"]


def test_arguments_that_are_no_object_are_taken_as_they_are() -> None:
    call = {"type": "function_call", "call_id": "c", "name": "f"}
    result = {"type": "function_call_output", "call_id": "c", "output": "ok"}
    say = "{% for m in messages %}{% for c in m.tool_calls %}{{ c.function.arguments | tojson }}|{% endfor %}{% endfor %}"
    apart = "{% for m in messages %}{% for c in m.tool_calls %}{% for k, v in c.function.arguments | items %}{{ k }}={{ v }}|{% endfor %}{% endfor %}{% endfor %}"
    for arguments, said, taken in (
        ('{"a": 1', '{"a": 1|', 'arguments={"a": 1|'),
        ("[1]", "[1]|", "arguments=[1]|"),
        ("not JSON", "not JSON|", "arguments=not JSON|"),
        ('{"a": 1}', '{"a": 1}|', "a=1|"),
    ):
        items = [{"role": "user", "content": "x"}, call | {"arguments": arguments}, result]
        asked = ask(dialect=Dialect(lists_tools=True), input=items)
        chat = rendered(asked.generation)
        for template, wanted in ((say, said), (apart, taken)):
            assert ChatTemplate({"default": template}, {}).render(chat) == wanted
        assert arguments[:7] in json.dumps(rendered(ask(input=items).generation)).replace("\\", "")


def called(kind: str, name: str, namespace: str | None, **body: Any) -> str:
    """The name of an earlier call in the prompt."""
    given = {"arguments": "{}"} if kind == "function_call" else {"input": "x"}
    call = {"type": kind, "call_id": "c", "name": name, "namespace": namespace, **given}
    result = {"type": f"{kind}_output", "call_id": "c", "output": "done"}
    asked = ask(dialect=Dialect(lists_tools=True), input=[call, result], **body)
    (turn,) = (t for t in rendered(asked.generation)["messages"] if t.get("tool_calls"))
    (one,) = turn["tool_calls"]
    assert set(one["function"]) == {"name", "arguments"}
    return str(one["function"]["name"])


OTHERS = {**AGENTS, "name": "others"}
INNER_PATCH = {"type": "namespace", "name": "files", "tools": [PATCH]}


@pytest.mark.parametrize(
    ("tools", "kind", "name", "namespace", "told"),
    [
        ([AGENTS], "function_call", "spawn", "agents", "spawn"),
        ([AGENTS], "function_call", "spawn", None, "spawn"),
        ([AGENTS, SPAWN], "function_call", "spawn", "agents", "agents.spawn"),
        ([AGENTS, SPAWN], "function_call", "spawn", None, "spawn"),
        ([AGENTS, OTHERS], "function_call", "spawn", "others", "others.spawn"),
        ([AGENTS, OTHERS], "function_call", "spawn", "agents", "spawn"),
        ([AGENTS, OTHERS], "function_call", "spawn", "gone", "gone.spawn"),
        ([SPAWN], "function_call", "spawn", "agents", "agents.spawn"),
        ([PATCH], "function_call", "spawn", "agents", "spawn"),
        ([], "function_call", "spawn", "agents", "spawn"),
        ([INNER_PATCH, PATCH], "custom_tool_call", "patch", "files", "files.patch"),
        ([INNER_PATCH, {**SPAWN, "name": "patch"}], "custom_tool_call", "patch", None, "files.patch"),
        ([INNER_PATCH, {**SPAWN, "name": "patch"}], "function_call", "patch", None, "patch"),
    ],
)  # fmt: skip
def test_earlier_calls_have_the_names_that_the_model_is_told_of_tools(
    tools: list[dict[str, Any]], kind: str, name: str, namespace: str | None, told: str
) -> None:
    assert called(kind, name, namespace, tools=tools) == told


def test_a_stored_call_gets_its_name_from_the_tools_of_the_next_request() -> None:
    store = ResponseStore()
    text = '<tool_call>{"name": "spawn", "arguments": {"n": 1}}</tool_call>'
    made, _ = parted(("hermes", "", text, None, None, [], "stop"), [text], store, tools=[AGENTS])
    whole = json.loads(made.whole())
    assert not len(store)
    made.keep()
    result = {
        "type": "function_call_output",
        "call_id": whole["output"][0]["call_id"],
        "output": "o",
    }
    for tools, told in (([AGENTS], "spawn"), ([AGENTS, SPAWN], "agents.spawn")):
        asked = ask(
            store, previous_response_id=whole["id"], input=[result], tools=tools,
            dialect=Dialect(lists_tools=True),
        )  # fmt: skip
        calls = [c for t in rendered(asked.generation)["messages"] for c in t.get("tool_calls", ())]
        assert [call["function"]["name"] for call in calls] == [told]
