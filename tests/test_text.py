"""Loading a tokenizer from a model folder: bytes of ids, special tokens, templates, bos."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import types
from base64 import b64encode
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from asyncllm.api.common.answer import Vocab
from asyncllm.api.common.chat_template import ChatTemplate, variables
from asyncllm.errors import RequestError, StartupError
from asyncllm.text import ModelTokenizer, load_tokenizer

HELLO = "1 9690 198 2683 359 253 5356 5646 11173 3365 3511 308 34519 28 7018 411 407 19712 8182 2 198 1 4093 198 28120 905 2 198 1 520 9531 198"


def byte_level() -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {c: i for i, c in enumerate([*alphabet, "ðŁĺ", "<pad>"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken("<s>", special=True), AddedToken("</s>", special=True)]
    )
    tokenizer.add_tokens([AddedToken("  é", special=False)])
    return tokenizer


def sentencepiece(*extra: Any) -> Tokenizer:
    tokens = ["<unk>", "<s>", "</s>", *[f"<0x{i:02X}>" for i in range(256)], "▁hi", "▁", "h", "i"]
    vocab = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[("h", "i")][:0], byte_fallback=True))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *extra]
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


def save(folder: Path, tokenizer: Tokenizer, config: dict[str, Any] | None = None) -> Path:
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config or {}))
    return folder


def load(
    folder: Path, tokenizer: Tokenizer, config: dict[str, Any] | None = None
) -> ModelTokenizer:
    return load_tokenizer(str(save(folder, tokenizer, config)))


def streamed(text: ModelTokenizer, ids: list[int], skip: bool) -> str:
    stream = text.stream(skip_special_tokens=skip)
    return "".join([*(stream.push(i) for i in ids), stream.flush()])


def test_bytes_of_byte_level_ids(tmp_path: Path) -> None:
    tokenizer = byte_level()
    text = load(tmp_path, tokenizer)
    assert text.pieces[tokenizer.token_to_id("ðŁĺ")] == "😀".encode()[:3]
    assert text.pieces[tokenizer.token_to_id("Ġ")] == b" "
    assert text.pieces[tokenizer.token_to_id("  é")] == "  é".encode()
    assert sorted(text.pieces[:256]) == [bytes([b]) for b in range(256)]
    assert text.vocab_size == len(text.pieces) == tokenizer.get_vocab_size()
    assert b"".join(text.pieces[i] for i in text.encode("né 😀\n", False)) == "né 😀\n".encode()


def test_bytes_of_sentencepiece_ids(tmp_path: Path) -> None:
    text = load(tmp_path, sentencepiece(decoders.Strip(" ", 1, 0)))
    assert text.pieces[3:259] == [bytes([b]) for b in range(256)]
    assert text.pieces[259:261] == [b" hi", b" "]
    assert text.table is not None
    assert text.table.strip == 1
    assert text.decode([259, 259]) == streamed(text, [259, 259], True) == "hi hi"


@pytest.mark.parametrize(
    "make", [byte_level, sentencepiece, lambda: sentencepiece(decoders.Strip(" ", 1, 0))]
)
def test_stream_equals_decode_on_random_ids(tmp_path: Path, make: Any) -> None:
    text = load(tmp_path, make())
    rng = random.Random(0)
    for _ in range(100):
        ids = [rng.randrange(text.vocab_size + 2) for _ in range(rng.randrange(6))]
        if text.table is not None and text.table.byte_runs:
            ids = [i for i in ids if not 131 <= i < 259]  # see test_detokenize for broken runs
        for skip in (False, True):
            assert streamed(text, ids, skip) == text.decode(ids, skip)


SAID = "hi 日本 é😀\n  hi</s>i <0x41> 😀😀 x"


def with_bos() -> Tokenizer:
    """Like Llama 2's: a space before the text, which decoding strips, and <s> before that."""
    tokenizer = sentencepiece(decoders.Strip(" ", 1, 0))
    first, space = normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")
    tokenizer.normalizer = normalizers.Sequence([first, space])
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", 1)])
    return tokenizer


@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("make", [byte_level, with_bos])
def test_offsets_of_a_prompts_tokens(tmp_path: Path, make: Any, add: bool) -> None:
    text = load(tmp_path, make())
    vocab = Vocab(text.pieces.__getitem__, text.decode, text.spell, text.special)
    ids = text.encode(SAID, add)
    offsets = vocab.offsets(SAID, ids)
    at, raw = 0, SAID.encode()
    for token, offset in zip(ids, offsets, strict=True):
        piece = text.pieces[token]
        if not raw.startswith(piece, at):  # <s>, or a space before the text, or behind </s>
            piece = b"" if token in text.special else piece.removeprefix(b" ")
        # the character that the token's first byte is a part of
        assert offset == len(raw[:at].decode(errors="ignore"))
        at += len(piece)
    assert at == len(raw)


def test_offsets_where_the_tokenizer_changes_the_text(tmp_path: Path) -> None:
    tokenizer = byte_level()
    tokenizer.normalizer = normalizers.Sequence([normalizers.Strip(), normalizers.Lowercase()])
    text = load(tmp_path, tokenizer)
    vocab = Vocab(text.pieces.__getitem__, text.decode, text.spell, text.special)
    assert vocab.offsets("   ab Cd", text.encode("   ab Cd", False)) == [3, 4, 5, 6, 7]


@pytest.mark.parametrize(
    "decoder",
    [
        decoders.Metaspace(),
        decoders.WordPiece(),
        None,
        decoders.Sequence([decoders.Strip(" ", 1, 0)]),
    ],
)
def test_other_decoders_go_by_windows(tmp_path: Path, decoder: Any) -> None:
    tokenizer = sentencepiece()
    tokenizer.decoder = decoder
    text = load(tmp_path, tokenizer)
    assert text.table is None
    ids = [259, 259, 261, 262]
    assert streamed(text, ids, True) == text.decode(ids)
    assert text.pieces[262] == b"i"


def test_named_tokens_are_special_and_known(tmp_path: Path) -> None:
    config = {"bos_token": {"content": "<s>"}, "eos_token": "</s>", "pad_token": "<pad>"}
    config["unk_token"] = "<nowhere>"
    tokenizer = byte_level()
    size = tokenizer.get_vocab_size()
    text = load_tokenizer(str(save(tmp_path, tokenizer, config)), vocab_size=size)
    pad = tokenizer.token_to_id("<pad>")
    assert (text.bos_id, text.eos_id) == (258, 259)
    assert text.special == {258, 259, pad}
    assert streamed(text, [258, pad], True) == ""
    assert streamed(text, [258, pad], False) == "<s><pad>"
    assert text.vocab_size == size  # the model has no row for <nowhere>
    assert text.special_tokens["unk_token"] == "<nowhere>"


def test_older_special_tokens_map_is_read(tmp_path: Path) -> None:
    (tmp_path / "special_tokens_map.json").write_text('{"eos_token": "</s>"}')
    assert load(tmp_path, byte_level()).eos_id == 259


def test_bos_is_added_once(tmp_path: Path) -> None:
    wants = {"bos_token": "<s>", "add_bos_token": True}
    bare = load(tmp_path / "bare", byte_level(), wants)
    assert list(bare.encode("a", True)) == [258, *bare.encode("a", False)]
    silent = load(tmp_path / "silent", byte_level(), {"bos_token": "<s>"})
    assert silent.encode("a", True) == silent.encode("a", False)
    tokenizer = byte_level()
    tokenizer.post_processor = processors.TemplateProcessing(
        "<s> $A", special_tokens=[("<s>", 258)]
    )
    for name, config in (("own", wants), ("quiet", {"bos_token": "<s>", "add_bos_token": False})):
        text = load(tmp_path / name, tokenizer, config)
        assert list(text.encode("a", True)) == [258, *text.encode("a", False)]


def test_training_settings_of_the_file_do_not_cut_prompts(tmp_path: Path) -> None:
    tokenizer = byte_level()
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=8)
    text = load(tmp_path, tokenizer)
    assert len(text.encode("a" * 20, False)) == 20
    assert len(text.encode("a", False)) == 1


def test_lone_surrogate_is_a_unicode_error(tmp_path: Path) -> None:
    with pytest.raises(UnicodeEncodeError):
        load(tmp_path, byte_level()).encode("\ud800", False)


def test_templates_by_precedence(tmp_path: Path) -> None:
    named = [{"name": "default", "template": "D"}, {"name": "tool_use", "template": "T"}]
    folder = save(tmp_path, byte_level(), {"chat_template": named})
    assert load_tokenizer(str(folder)).templates == {"default": "D", "tool_use": "T"}
    (folder / "chat_template.json").write_text('{"chat_template": "J"}')
    assert load_tokenizer(str(folder)).templates["default"] == "J"
    (folder / "chat_template.jinja").write_text("F")
    more = folder / "additional_chat_templates"
    more.mkdir()
    (more / "tool_use.jinja").write_text("A")
    assert load_tokenizer(str(folder)).templates == {"default": "F", "tool_use": "A"}


def test_bad_folders_end_the_start(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match="is not a folder"):
        load_tokenizer(str(tmp_path / "none"))
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(StartupError, match=r"cannot read .*tokenizer\.json"):
        load_tokenizer(str(tmp_path))
    (tmp_path / "tokenizer_config.json").write_text("[")
    with pytest.raises(StartupError, match=r"cannot read .*tokenizer_config\.json"):
        load_tokenizer(str(tmp_path))


# -- SentencePiece and tekken ----------------------------------------------------------------------

SCRIPTS = "Hello  wörld\n\tж 日本 한국 हिन्दी 👩‍👩‍👧 🇩🇪 \x00\x7f e\u0301"


def train(folder: Path, **how: Any) -> Path:
    """A folder whose tokenizer is a small SentencePiece model with byte fallback, as Llama's is."""
    from sentencepiece import SentencePieceTrainer

    known = {
        "model_prefix": str(folder / "tokenizer"), "vocab_size": 320, "model_type": "bpe",
        "byte_fallback": True, "normalization_rule_name": "identity", "minloglevel": 2,
        "remove_extra_whitespaces": False, "allow_whitespace_only_pieces": True,
    }  # fmt: skip
    lines = iter([f"the number {i} is a hello world of number {i}" for i in range(99)])
    SentencePieceTrainer.train(sentence_iterator=lines, **known | how)
    (folder / "config.json").write_text('{"model_type": "gemma3_text"}')
    return folder


@pytest.fixture(scope="module")
def sentences(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("sentences"))


@pytest.mark.parametrize("how", [
    {}, {"add_dummy_prefix": False}, {"model_type": "unigram"}, {"remove_extra_whitespaces": True},
    {"user_defined_symbols": ["\n\n", "<b>"], "bos_piece": "<bos>", "eos_piece": "<eos>"},
    {"normalization_rule_name": "nmt_nfkc"},
], ids=str)  # fmt: skip
def test_a_sentencepiece_model_alone_is_a_tokenizer(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, how: dict[str, Any]
) -> None:
    """As its file says, whatever family config.json names."""
    from sentencepiece import SentencePieceProcessor

    text = load_tokenizer(str(train(tmp_path, **how)))
    known = SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    for content in (SCRIPTS, "hello world", " hello", "  number 7", "a\n\n\nb<b>", ""):
        ids = list(text.encode(content, False))
        assert ids == known.encode(content)
        assert list(text.encode(content, True)) == [known.bos_id(), *ids]
        assert text.decode(ids) == streamed(text, ids, True) == known.decode(ids)
        if how.keys() <= {"add_dummy_prefix", "model_type"}:
            assert text.decode(ids) == content
    assert (text.vocab_size, text.eos_id) == (known.vocab_size(), known.eos_id())
    assert text.special_tokens["bos_token"] == how.get("bos_piece", "<s>")
    assert caplog.messages == []


def test_a_conversion_that_differs_is_told(
    sentences: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = types.SimpleNamespace(backend_tokenizer=byte_level())
    monkeypatch.setattr("transformers.PreTrainedTokenizerFast.from_pretrained", lambda _: made)
    load_tokenizer(str(sentences))
    (line,) = caplog.messages
    assert line.startswith(f"{sentences / 'tokenizer.model'}: its conversion splits 'Hello world'")


def test_added_tokens_join_a_sentencepiece_model(sentences: Path, tmp_path: Path) -> None:
    for file in sentences.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "added_tokens.json").write_text('{"<|im_end|>": 320}')
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|im_end|>"}')
    text = load_tokenizer(str(tmp_path), "slow")
    assert list(text.encode("<|im_end|>", False)) == [320]
    assert (text.eos_id, 320 in text.special, text.vocab_size) == (320, True, 321)


def test_a_sentencepiece_model_may_be_without_bos(sentences: Path, tmp_path: Path) -> None:
    for file in sentences.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "tokenizer_config.json").write_text('{"add_bos_token": false}')
    text = load_tokenizer(str(tmp_path))
    assert text.encode("hello", True) == text.encode("hello", False)


@pytest.mark.parametrize("lacking", ["sentencepiece", "google.protobuf"])
def test_what_sentencepiece_needs_is_named(
    sentences: Path, monkeypatch: pytest.MonkeyPatch, lacking: str
) -> None:
    def find(name: str) -> object:
        return None if name == lacking else find_spec(name)

    monkeypatch.setattr("asyncllm.spm.find_spec", find)
    with pytest.raises(StartupError) as caught:
        load_tokenizer(str(sentences))
    assert str(caught.value) == (
        f"{sentences / 'tokenizer.model'} is a SentencePiece tokenizer, and there is no "
        f"tokenizer.json; it needs {lacking}: pip install 'asyncllm[sentencepiece]'"
    )


def test_a_sentencepiece_model_that_is_none_is_named(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_text("IQ== 0")
    with pytest.raises(StartupError, match=r"tokenizer\.model is not a SentencePiece model, and"):
        load_tokenizer(str(tmp_path))


def tekken(**changes: Any) -> dict[str, Any]:
    """A tekken.json of all bytes, a few words, and some more that its size leaves out."""
    words = ["he", "ll", "hell", "hello", " w", "or", " wor", "ld", " world", "é", "left", "out"]
    ranked = [*(bytes([b]) for b in range(256)), *(word.encode() for word in words)]
    return {
        "config": {
            "pattern": r" ?\p{L}+|\s+|[^\s\p{L}]+",
            "default_vocab_size": 30 + 266,
            "default_num_special_tokens": 30,
        },
        "vocab": [{"token_bytes": b64encode(token).decode()} for token in ranked],
    } | changes


def test_a_tekken_file_alone_is_a_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "tekken.json").write_text(json.dumps(tekken()))
    text = load_tokenizer(str(tmp_path))
    ids = list(text.encode("[INST]hello worldé", True))
    assert ids == [1, 3, 30 + 259, 30 + 264, 30 + 265]
    assert text.decode(ids, True) == streamed(text, ids, True) == "hello worldé"
    assert text.decode(ids) == "<s>[INST]hello worldé"
    assert (text.vocab_size, text.bos_id, text.eos_id) == (296, 1, 2)
    assert len(text.special) == 30
    for content in (SCRIPTS, "<SPECIAL_29> hell or", ""):
        ids = list(text.encode(content, False))
        assert text.decode(ids) == streamed(text, ids, False) == content


def test_a_tekken_file_may_name_its_special_tokens(tmp_path: Path) -> None:
    named = [{"rank": i, "token_str": t} for i, t in enumerate(["<unk>", "<s>", "</s>", "[ARGS]"])]
    (tmp_path / "tekken.json").write_text(json.dumps(tekken(special_tokens=named)))
    text = load_tokenizer(str(tmp_path))
    assert list(text.encode("[ARGS]<SPECIAL_4>", False)) == [3, 4]
    assert 3 not in text.encode("[INST]", False)


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        json.dumps(tekken(vocab=[{"token_bytes": "?"}])),
        json.dumps(tekken(vocab=[{"token_bytes": "IQ=="}, {"token_bytes": "IQ=="}])),
        json.dumps(tekken(config={})),
        json.dumps(tekken(special_tokens=[{"rank": 30, "token_str": "<s>"}])),
        json.dumps(tekken(special_tokens=[3])),
    ],
)
def test_a_tekken_file_that_is_none_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "tekken.json").write_text(content)
    with pytest.raises(StartupError, match=r"tekken\.json is not a tekken tokenizer: .{5,250}$"):
        load_tokenizer(str(tmp_path))


CODE = """
from pathlib import Path
from transformers import PreTrainedConfig, PreTrainedTokenizer
Path({ran!r}).touch()
class Config(PreTrainedConfig):
    model_type = "strange"
class Own(PreTrainedTokenizer):
    vocab_size = 256
    def get_vocab(self): return {{chr(i): i for i in range(256)}}
    def _tokenize(self, text): return list(text)
    def _convert_token_to_id(self, token): return ord(token)
    def _convert_id_to_token(self, i): return chr(i)
    def convert_tokens_to_string(self, tokens): return "".join(tokens)
"""


def test_of_a_folders_code_only_the_tokenizers_may_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules")
    )
    ran = {name: tmp_path / f"ran_{name}" for name in ("configuration", "tokenization")}
    folder = tmp_path / "folder"
    folder.mkdir()
    for name, path in ran.items():
        (folder / f"{name}_x.py").write_text(CODE.format(ran=str(path)))
    own = {"AutoConfig": "configuration_x.Config", "AutoModelForCausalLM": "configuration_x.Model"}
    (folder / "config.json").write_text(json.dumps({"model_type": "strange", "auto_map": own}))
    told = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["tokenization_x.Own", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(told))
    with pytest.raises(StartupError, match=r"needs the folder.s own code \(--trust_remote_code"):
        load_tokenizer(str(folder))
    assert [path.exists() for path in ran.values()] == [False, False]
    text = load_tokenizer(str(folder), trust_remote_code=True)
    assert list(text.encode("ab", False)) == [97, 98]
    assert [path.exists() for path in ran.values()] == [False, True]


def test_transformers_is_not_imported_for_a_fast_tokenizer(tmp_path: Path) -> None:
    save(tmp_path, byte_level())
    code = (
        "import sys; from asyncllm.text import load_tokenizer;"
        f"load_tokenizer({str(tmp_path)!r}); sys.exit('transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=120).returncode == 0


# -- by transformers -----------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
def test_slow_mode_without_a_slow_tokenizer_is_a_warning_and_the_fast_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save(tmp_path, byte_level(), {"tokenizer_class": "PreTrainedTokenizerFast"})
    text = load_tokenizer(str(tmp_path), "slow")
    assert text.pieces == load_tokenizer(str(tmp_path), "fast").pieces
    assert text.tokenizer is not None
    (line,) = [r.getMessage() for r in caplog.records if r.name == "asyncllm.text"]
    assert line == "--tokenizer_mode slow: the model only has a fast tokenizer; using that"


# -- the embedded model --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def demo(demo_dir: Path) -> ModelTokenizer:
    return load_tokenizer(str(demo_dir))


def test_embedded_model_splits_digits(demo: ModelTokenizer) -> None:
    assert len(demo.encode("    12", True)) == 3
    assert (demo.bos_id, demo.eos_id, demo.vocab_size) == (1, 2, 49152)
    assert demo.special == frozenset(range(17))


def test_embedded_model_renders_its_chat(demo: ModelTokenizer) -> None:
    template = ChatTemplate(demo.templates, demo.special_tokens)
    prompt = template.render({"messages": [{"role": "user", "content": "hello world"}]})
    assert " ".join(map(str, demo.encode(prompt, False))) == HELLO


def test_embedded_model_has_bytes_that_vanish(demo: ModelTokenizer) -> None:
    assert not demo.encode("\x04\x06", True)


def test_embedded_model_streams_what_it_decodes(demo: ModelTokenizer) -> None:
    said = "Zürich 你好 👨‍👩‍👧‍👦 1234  x\n\n\tdef f():"
    ids = list(demo.encode(said, False))
    assert streamed(demo, ids, True) == said
    rng = random.Random(1)
    for _ in range(200):
        ids = [rng.randrange(demo.vocab_size) for _ in range(8)]
        assert streamed(demo, ids, False) == demo.decode(ids)


# -- chat templates ------------------------------------------------------------------------------


def render(source: str, **chat: Any) -> str:
    given = {"messages": [{"role": "user", "content": "<hi>"}], **chat}
    return ChatTemplate({"default": source}, {"bos_token": "<s>"}).render(given)


def test_templates_get_what_they_expect() -> None:
    assert (
        render("{{ bos_token }}{{ messages | tojson }}")
        == '<s>[{"role": "user", "content": "<hi>"}]'
    )
    assert render("{{ {'b': 1, 'a': 'é'} | tojson(sort_keys=True) }}") == '{"a": "é", "b": 1}'
    assert (
        render("{% for i in [1, 2] %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}")
        == "1"
    )
    assert render("{% generation %}a{{ messages[0].role }}{% endgeneration %}") == "auser"
    assert render("{{ strftime_now('%%') }}") == "%"
    assert render("  {% if tools is none %}\nx{% endif %}\n") == "x"
    assert render("{{ add_generation_prompt }}{{ a }}", kwargs={"a": 1}) == "True1"
    assert render("{{ add_generation_prompt }}", kwargs={"add_generation_prompt": False}) == "False"


def test_what_templates_read_from_outside() -> None:
    usual = """{% if not thinking is defined %}{% set thinking = false %}{% endif %}
        {%- set ns = namespace(first=true) %}{{ bos_token }}{{ strftime_now('%d') }}
        {%- for m in messages %}{{ m.content }}{{ loop.index }}{% endfor %}{{ date or raise_exception('') }}"""
    found = variables({"default": usual, "tool_use": "{{ tools }}"}, {"bos_token": "<s>"})
    assert found == {"thinking", "messages", "date", "tools"}
    with pytest.raises(StartupError, match="line 2"):
        variables({"default": "a\n{% if %}"}, {})


def test_tool_template_serves_calls_with_tools() -> None:
    template = ChatTemplate({"default": "D", "tool_use": "T{{ tools[0].name }}"}, {})
    assert template.render({"messages": [], "tools": None}) == "D"
    assert template.render({"messages": [], "tools": [{"name": "f"}]}) == "Tf"


@pytest.mark.parametrize("source", [
    "{{ a | tojson }}", "{{ '' + a }}", "{{ a + '' }}", "{{ '' ~ a }}", "{{ a }}",
    "{% if a is mapping and a is not string %}{{ a | tojson }}{% endif %}",
    "{% set n = namespace(t='') %}{% for k, v in a.items() %}"
    "{% set n.t = '{\"' + k + '\": \"' + v + '\"}' %}{% endfor %}{{ n.t }}",
])  # fmt: skip
def test_arguments_of_a_call_are_an_object_and_text(source: str) -> None:
    """Qwen's template takes an object, that of DeepSeek-V3 joins JSON to text."""
    head = "{% set a = messages[0].tool_calls[0].function.arguments %}"
    template = ChatTemplate({"default": head + source}, {})
    function = {"name": "f", "arguments": {"city": "Ü"}}
    turn = {"role": "assistant", "content": "", "tool_calls": [{"function": function}]}
    assert template.render({"messages": [turn]}) == '{"city": "Ü"}'


def test_continued_message_ends_the_prompt() -> None:
    source = "{% for m in messages %}<{{ m.content }}>{% endfor %}{% if add_generation_prompt %}A{% endif %}"
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "x y "}]
    kwargs = {"continue_final_message": True}
    assert render(source, messages=messages, kwargs=kwargs) == "<x><x y "
    with pytest.raises(RequestError, match="leaves out the last message"):
        render("{{ messages[0].content }}", messages=messages, kwargs=kwargs)


@pytest.mark.parametrize(
    "source",
    [
        "{{ raise_exception('only once') }}",
        "{{ messages[0].nothing.at_all }}",
        "{{ messages + 1 }}",
        "{{ 1 // 0 }}",
        "{{ ''.__class__.__mro__ }}{{ [].append(1) }}",
        "{% for i in range(10**9) %}{% endfor %}",
    ],
)
def test_failing_template_is_a_request_error(source: str) -> None:
    with pytest.raises(RequestError, match="chat template refuses"):
        render(source)


def test_template_that_does_not_compile_ends_the_start() -> None:
    with pytest.raises(StartupError, match="line 2"):
        ChatTemplate({"default": "a\n{% if %}"}, {})
