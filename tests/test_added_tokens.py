"""Tokens that only tokenizer_config.json and added_tokens.json name, against transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import AutoTokenizer

from asyncllm import rank
from asyncllm.config import Config
from asyncllm.errors import StartupError
from asyncllm.models.spec import ModelSpec
from asyncllm.text import ModelTokenizer, load_tokenizer

START, END = "<|im_start|>", "<|im_end|>"
CHAT = f"{START}user\nhi{END} <s> </s>a > b {START}x {END}"


def llama() -> Tokenizer:
    """Like Llama 2's: SentencePiece with bytes, three special tokens at the beginning."""
    tokens = ["<unk>", "<s>", "</s>", *[f"<0x{i:02X}>" for i in range(256)], "▁"]
    tokens += "abcdefghijklmnopqrstuvwxyz_|<>"
    vocab = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab, [], byte_fallback=True, unk_token="<unk>"))
    prepend, replace = normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")
    tokenizer.normalizer = normalizers.Sequence([prepend, replace])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return tokenizer


SIZE = llama().get_vocab_size()
NAMED = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
OLD = {END: SIZE, START: SIZE + 1}


def token(content: str, **changes: Any) -> dict[str, Any]:
    flags = dict.fromkeys(("lstrip", "rstrip", "normalized", "single_word"), False)
    return {"content": content, **flags, "special": True, **changes}


def decoder(*tokens: dict[str, Any], first: int = SIZE) -> dict[str, Any]:
    beginning = {str(i): token(content) for i, content in enumerate(("<unk>", "<s>", "</s>"))}
    return beginning | {str(first + i): each for i, each in enumerate(tokens)}


def save(folder: Path, config: dict[str, Any], added: dict[str, int] | None = None) -> Path:
    llama().save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **NAMED, **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    if added is not None:
        (folder / "added_tokens.json").write_text(json.dumps(added))
    return folder


@pytest.mark.parametrize(
    ("config", "added"),
    [
        ({"added_tokens_decoder": decoder(token(END), token(START))}, None),
        ({"added_tokens_decoder": decoder(token(END, special=False), token(START))}, None),
        ({"added_tokens_decoder": decoder(token(END, normalized=True, special=False))}, None),
        ({"added_tokens_decoder": decoder(token(END, lstrip=True, rstrip=True))}, None),
        ({"added_tokens_decoder": decoder(token(END), token(START, single_word=True))}, None),
        ({"added_tokens_decoder": decoder(token(END, special=False)), "eos_token": END}, None),
        ({"added_tokens_decoder": decoder(token(">"), first=SIZE - 1)}, None),
        ({"added_tokens_decoder": decoder(token("</s>"), first=SIZE + 5)}, None),
        ({"added_tokens_decoder": decoder(token(END))}, OLD),
        ({"added_tokens_decoder": {}}, OLD),
        ({}, OLD),
        ({"eos_token": END, "additional_special_tokens": [START]}, OLD),
        ({"eos_token": END}, None),
        ({"eos_token": token(END) | {"__type": "AddedToken"}}, None),
        ({"additional_special_tokens": [START, END]}, None),
        ({"extra_special_tokens": [">"]}, None),
    ],
)
def test_tokens_are_those_of_transformers(
    tmp_path: Path, config: dict[str, Any], added: dict[str, int] | None
) -> None:
    text = load_tokenizer(str(save(tmp_path, config, added)))
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    ids = theirs.encode(CHAT, add_special_tokens=False)
    assert list(text.encode(CHAT, False)) == ids
    for skip in (False, True):
        assert text.decode(ids, skip) == theirs.decode(ids, skip_special_tokens=skip)
    assert text.special == {i for i, t in theirs.added_tokens_decoder.items() if t.special}
    assert (text.eos_id, text.vocab_size) == (theirs.eos_token_id, len(theirs))


def test_ids_are_those_of_the_file_even_behind_a_gap(tmp_path: Path) -> None:
    config = {"added_tokens_decoder": decoder(token(START), first=SIZE + 3)}
    text = load_tokenizer(str(save(tmp_path, config)))
    assert list(text.encode(START, False)) == [SIZE + 3]
    assert text.pieces[SIZE + 3] == START.encode()
    assert set(range(SIZE, SIZE + 4)) <= text.special


@pytest.mark.parametrize(
    ("config", "added"),
    [
        ({"added_tokens_decoder": decoder(token(END), token(START))}, None),
        ({}, OLD),
        ({"additional_special_tokens": [END, START]}, None),
        ({"added_tokens_decoder": decoder(token(START), first=5) | decoder(token(END))}, None),
    ],
)
def test_tokens_without_a_place_in_the_model_are_text(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, config: dict[str, Any], added: Any
) -> None:
    text = load_tokenizer(str(save(tmp_path, config, added)), vocab_size=SIZE + 1)
    assert list(text.encode(END, False)) == [SIZE]
    assert len(text.encode(START, False)) > 5
    assert text.vocab_size == SIZE + 1
    (record,) = caplog.records
    told = record.getMessage()
    assert "stay ordinary text" in told
    assert START in told
    assert END not in told


@pytest.mark.parametrize("listed", [[], {"x": {}}, {"1": "text"}, {"1": {"text": "a"}}, "text"])
def test_added_tokens_that_cannot_be_read(tmp_path: Path, listed: Any) -> None:
    save(tmp_path, {"added_tokens_decoder": listed})
    with pytest.raises(StartupError, match="added tokens that cannot be read"):
        load_tokenizer(str(tmp_path))


# -- what ends an answer -------------------------------------------------------------------------


def spec(*, eos: Any, generation: Any, vocab_size: int = 500) -> ModelSpec:
    shape = {"dtype": "float32", "vocab_size": vocab_size, "hidden_size": 8, "intermediate_size": 8}
    layers = {"num_hidden_layers": 1, "num_attention_heads": 1, "max_position_embeddings": 99999}
    config = {"architectures": ["LlamaForCausalLM"], **shape, **layers, "eos_token_id": eos}
    return ModelSpec.from_hf(config, {"eos_token_id": generation})


@pytest.mark.parametrize(
    ("eos", "generation", "end", "vocab_size", "given", "want"),
    [
        (2, None, END, 500, (), (2, SIZE)),  # Yi's chat models
        ([2, 3], [4, 2], "</s>", 500, (), (2, 3, 4)),
        (None, None, END, 500, (), (SIZE,)),
        (None, 7, None, 500, (), (7,)),
        (2, [3], END, 500, (9,), (9,)),
        (3, None, END, SIZE, (), (3,)),  # the model has no such token
    ],
)
def test_ends_of_all_files(
    tmp_path: Path, eos: Any, generation: Any, end: Any, vocab_size: int, given: Any, want: Any
) -> None:
    model = spec(eos=eos, generation=generation, vocab_size=vocab_size)
    text = load(tmp_path, {"eos_token": end, "added_tokens_decoder": decoder(token(END))}, model)
    resolved = rank.resolve(Config(device="cpu", eos_id=given), model, tmp_path, text)
    assert resolved.eos_ids == want


def load(folder: Path, config: dict[str, Any], model: ModelSpec) -> ModelTokenizer:
    return load_tokenizer(str(save(folder, config)), vocab_size=model.vocab_size)
