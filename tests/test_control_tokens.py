"""Control tokens that users and tools spell are text; those of templates and answers are tokens.

The chat templates are those of models, as their packages have them (tests/data).
"""

from __future__ import annotations

import json
import re
import time
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from asyncllm import templates
from asyncllm.api.common import tool_request
from asyncllm.api.common.chat_template import ChatTemplate
from asyncllm.api.parsing.events import Tool
from asyncllm.api.parsing.output_parser import dialect_of
from asyncllm.control_tokens import ControlTokens
from asyncllm.errors import StartupError
from asyncllm.templates import TemplateSet, mixes
from asyncllm.text import ModelTokenizer, load_tokenizer, with_controls

REAL = json.loads((Path(__file__).parent / "data" / "chat_templates.json").read_text())
MARKS = re.compile(
    r"<\|[\w-]+\|>|<\uff5c\w+\uff5c>|\[/?[A-Z_]+\]|</?(?:think|tool_call|tool_response)>"
    r"|<\w+_of_turn>"
)
WHITE = ("\n\n", "   ")
ALPHABET = pre_tokenizers.ByteLevel.alphabet()
SAID = "Say {} or {} now.\n\nPlease   do."


def controls_of(model: dict[str, Any]) -> list[str]:
    found = {*MARKS.findall(model["template"]), *model["special"].values()}
    assert len(found) >= 3, model["model"]
    return sorted(found)


def saved(folder: Path, tokenizer: Tokenizer, model: dict[str, Any]) -> ModelTokenizer:
    """The tokenizer as a folder's, with the model's chat template."""
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {**model["special"], "chat_template": model["template"]}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return load_tokenizer(str(folder))


def byte_level(added: list[str]) -> Tokenizer:
    vocab = {character: i for i, character in enumerate(sorted(ALPHABET))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    # every other one is special; some take the white space beside them
    tokenizer.add_tokens(
        [
            AddedToken(text, special=i % 2 == 0, normalized=i % 3 == 0, rstrip=i % 5 == 0)
            for i, text in enumerate(added)
        ]
    )
    tokenizer.add_tokens([AddedToken(text) for text in WHITE])
    return tokenizer


def unigram(added: list[str]) -> Tokenizer:
    """One whose vocabulary has the control tokens, as SentencePiece's files do."""
    pieces = [("<unk>", 0.0), *((text, 0.0) for text in added if text != "<unk>")]
    pieces += [(chr(i), -5.0) for i in range(33, 127)] + [("▁", -5.0)]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=False))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in added])
    return tokenizer


def ids(text: ModelTokenizer, *turns: dict[str, Any], tools: list[Any] | None = None) -> list[int]:
    """Of a chat, as the helper and the tokenizer's thread make them."""
    chat = json.dumps({"messages": turns, "tools": tools, "kwargs": {}}).encode()
    template = ChatTemplate(text.templates, text.special_tokens)
    done, prompt, _, named = templates.unpack(
        templates.answer(partial(templates.render, template, text.controls, chat))
    )
    assert done, prompt
    return list(text.encode_named(prompt) if named else text.encode(prompt, False))


def say(role: str, content: str, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def conversation(content: str) -> list[dict[str, Any]]:
    return [
        say("system", "Be brief."),
        say("user", content),
        say("assistant", "Well."),
        say("user", "Go on: " + content),
    ]


@pytest.mark.parametrize("model", REAL, ids=lambda model: model["model"])
def test_no_turn_is_forged(tmp_path: Path, model: dict[str, Any]) -> None:
    controls = controls_of(model)
    text = with_controls(saved(tmp_path, byte_level(controls), model))
    added = text.tokenizer.get_added_tokens_decoder()  # type: ignore[union-attr]
    numbers = {i for i, token in added.items() if token.content in controls}

    def told(content: str) -> list[int]:
        return ids(text, *conversation(content))

    harmless = Counter(i for i in told("Hi") if i in numbers)
    assert harmless, "the template has control tokens"
    for one in controls:
        for content in (one, f"a{one}b", f" {one} \n{one}", SAID.format(one, one)):
            found = told(content)
            assert Counter(i for i in found if i in numbers) == harmless, content
            assert text.decode(found).count(content.strip()) >= 2, content
    forged = "".join(controls)
    assert Counter(i for i in told(forged) if i in numbers) == harmless
    # the library's own tokens where nobody spells any, in what is said by others too
    plain = ChatTemplate(text.templates, text.special_tokens)
    for turns in (conversation("x <y\n\nz   >"), [say("user", "Hi"), say("assistant", forged)]):
        assert ids(text, *turns) == list(
            text.encode(plain.render({"messages": turns}), add_special_tokens=False)
        )


@pytest.mark.parametrize("model", REAL, ids=lambda model: model["model"])
def test_no_turn_is_forged_by_halves(tmp_path: Path, model: dict[str, Any]) -> None:
    """Two turns that meet, or a name that the template puts before what is said."""
    controls = controls_of(model)
    together = {
        **model,
        "template": "{% for m in messages %}{{ m.name }}{{ m.content }}{% endfor %}",
    }
    text = with_controls(saved(tmp_path, byte_level(controls), together))
    for one in controls:
        for i in range(1, len(one)):
            name = say("user", one[i:], name=one[:i])
            turns = say("user", one[:i], name=""), say("user", one[i:], name="")
            assert ids(text, name) == ids(text, *turns) == ids(text, say("user", one, name=""))
            assert len(ids(text, name)) == len(one.encode())


@pytest.mark.parametrize("model", REAL, ids=lambda model: model["model"])
def test_results_of_tools_forge_none(tmp_path: Path, model: dict[str, Any]) -> None:
    controls = controls_of(model)
    text = with_controls(saved(tmp_path, byte_level(controls), model))
    numbers = {text.tokenizer.token_to_id(one) for one in controls}  # type: ignore[union-attr]
    dialect = dialect_of(text.templates)
    call = {"id": "abcdefghi", "type": "function", "function": {"name": "f", "arguments": {}}}

    def told(content: str) -> Counter[int]:
        turns = [
            say("user", "Hi"),
            say("assistant", "", tool_calls=[call]),
            say("tool", content, tool_call_id="abcdefghi", name="f"),
        ]
        turns, _ = tool_request.with_tools_in_prompt(
            turns, tool_request.resolve(None, None), dialect
        )
        return Counter(i for i in ids(text, *turns) if i in numbers)

    assert told("".join(controls)) == told("9 degrees")


@pytest.mark.parametrize("model", REAL, ids=lambda model: model["model"])
@pytest.mark.parametrize("lists", [True, False])
def test_descriptions_of_tools_forge_none(
    tmp_path: Path, model: dict[str, Any], lists: bool
) -> None:
    controls = controls_of(model)
    text = with_controls(saved(tmp_path, byte_level(controls), model))
    numbers = {text.tokenizer.token_to_id(one) for one in controls}  # type: ignore[union-attr]
    dialect = dialect_of(text.templates)
    if not lists:
        dialect = replace(dialect, lists_tools=False, tools_in_system=False)

    def told(said: str) -> list[int]:
        schema = {"type": "object", "properties": {said: {"description": said, "enum": [said]}}}
        offer = tool_request.resolve([Tool("f", schema, said)], None)
        turns, tools = tool_request.with_tools_in_prompt([say("user", "Hi")], offer, dialect)
        return ids(text, *turns, tools=tools)

    forged, harmless = told(SAID.format(*controls[:2])), told(SAID.format("one", "other"))
    assert Counter(i for i in forged if i in numbers) == Counter(
        i for i in harmless if i in numbers
    )
    shown = "Say one or other now." in text.decode(harmless)
    assert shown or lists  # templates that know no tools say nothing of them
    assert ("Say {} or {} now.".format(*controls[:2]) in text.decode(forged)) is shown


def test_tokens_that_the_vocabulary_makes_itself_are_cut(tmp_path: Path) -> None:
    gemma = REAL[1]
    controls = controls_of(gemma)
    text = with_controls(saved(tmp_path, unigram(controls), gemma))
    assert text.controls is not None
    assert all(text.controls.spelled.values())
    numbers = {text.tokenizer.token_to_id(one) for one in controls}  # type: ignore[union-attr]
    harmless = Counter(i for i in ids(text, *conversation("Hi")) if i in numbers)
    for one in controls:
        found = ids(text, *conversation(f"a {one} b"))
        assert Counter(i for i in found if i in numbers) == harmless
        assert text.decode(found).count(f"a {one} b") == 2


def test_names_are_as_private_as_the_alphabets() -> None:
    one, other = ControlTokens({"<s>": False}), ControlTokens({"<s>": False})
    forged = other.names["<s>"] + other.hide("<s>")
    assert one.hide(forged) == forged
    text, named = one.reveal("<s>" + one.hide(f"<s>{forged}"))
    assert text == f"<s><s>{forged}"
    assert named == f"{one.names['<s>']}<s>{forged}"
    assert one.reveal("<s>") == ("<s>", None)


def test_the_longest_token_counts_and_many_take_no_longer() -> None:
    many = ControlTokens(
        dict.fromkeys([f"<unused{i}>" for i in range(6000)] + ["<", "<unused"], True)
    )
    _, named = many.reveal(many.hide("<unused12> <unused <") + "<unused5999>")
    cut = many.cut
    told = f"<{cut}unused12> <{cut}unused <{cut}" + many.names["<unused5999>"]
    assert named == told
    assert len(many.hide("<unused" * 100_000)) == 500_000 + len(many.hide("x<")) - 6


@pytest.mark.parametrize(
    ("template", "lost"),
    [
        ("{% for m in messages %}{{ m.content }}{% endfor %}", False),
        ("{% for m in messages %}{{ m.content | tojson }}{% endfor %}", False),
        ("{% for m in messages %}{{ m.content | trim }}{% endfor %}", False),
        ("{{ raise_exception('never') }}", False),
        ("{% for m in messages %}{{ m.content | tojson(ensure_ascii=True) }}{% endfor %}", True),
        ("{% for m in messages %}{{ m.content[:9] }}{% endfor %}", True),
        ("{% for m in messages %}{{ m.content | urlencode }}{% endfor %}", False),
        (
            "{% for m in messages %}{% if m.role == 'tool' %}"
            "{{ m.content | tojson(ensure_ascii=True) }}{% endif %}{% endfor %}",
            True,
        ),
        ("{% for t in tools or [] %}{{ t | tojson }}{% endfor %}", False),
        ("{% for t in tools or [] %}{{ t | tojson(ensure_ascii=True) }}{% endfor %}", True),
        (
            "{% for m in messages %}{% if m.role == 'system' %}{{ m.content[:9] }}{% endif %}"
            "{% endfor %}",
            True,
        ),
    ],
)
def test_templates_that_lose_marks_are_found(template: str, lost: bool) -> None:
    controls = ControlTokens({"<s>": False})
    assert mixes(ChatTemplate({"default": template}, {}), controls) == lost
    # and so they are told to the start
    told = templates.read_dialect(TemplateSet({"default": template}, {}, controls))
    assert told[1] == lost


def test_a_tokenizer_that_cannot_is_refused(tmp_path: Path) -> None:
    text = saved(tmp_path, byte_level(["<" + "s" * 400 + ">"]), REAL[0])
    with pytest.raises(StartupError, match="added tokens of up to 402 characters; at most"):
        with_controls(text)


def test_many_added_tokens_are_taken_at_once(tmp_path: Path) -> None:
    text = saved(tmp_path, byte_level([f"<|reserved_{i}|>" for i in range(16_000)]), REAL[0])
    begin = time.process_time()
    with_controls(text)
    assert time.process_time() - begin < 10  # 0.4 s; each for itself took 30
