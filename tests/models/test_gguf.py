"""Models of GGUF files: every architecture against transformers, every type against ``gguf``."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, dequantize

from asyncllm.errors import StartupError
from asyncllm.gguf_folder import gguf_folder
from asyncllm.models import gguf_types
from asyncllm.models.gguf import KINDS, read_gguf
from asyncllm.models.spec import ModelSpec
from asyncllm.text import load_tokenizer
from tests.models.families import CASES, Case, Reference, largest_difference, make
from tests.models.gguf_files import TOKENIZER, convert, metadata, random_blocks, write
from tests.models.harness import Ranks, make_device
from tests.test_text import train

CLOSE = 2e-4
SERVED = {
    "llama": "llama", "llama, biases": "llama", "qwen2": "qwen2", "qwen3": "qwen3",
    "gemma2": "gemma2", "gemma3": "gemma3", "phi3": "phi3", "phi3, short": "phi3",
    "phi3, long": "phi3",
}  # fmt: skip
# llama.cpp's scale of queries is by the size of a head
HEADS = {"gemma2": {"query_pre_attn_scalar": 16}, "gemma3": {"query_pre_attn_scalar": 16}}


def of_arch(name: str) -> Case:
    case = CASES[name]
    return replace(case, changes=case.changes | HEADS.get(name, {}))


@pytest.mark.parametrize(
    ("name", "tp"), [*((name, 1) for name in SERVED), ("llama, biases", 2), ("phi3", 2)]
)
def test_every_architecture_matches_transformers(name: str, tp: int, tmp_path: Path) -> None:
    case = of_arch(name)
    reference = Reference(make(case, tmp_path / "hf"))
    convert(tmp_path / "hf", SERVED[name], tmp_path / "tiny.gguf")
    shutil.rmtree(tmp_path / "hf")
    folder = gguf_folder(tmp_path / "tiny.gguf", tmp_path)
    if tp == 2:
        ranks = Ranks(folder, tp, max_len=case.max_len)
        assert largest_difference(reference, ranks) < CLOSE
        ranks.close()
        return
    device = make_device(folder, "fp32", "cpu", num_slots=1024, max_len=case.max_len)
    assert largest_difference(reference, device) < CLOSE
    device.close()


@pytest.mark.parametrize("kind", gguf_types._DECODERS)
def test_types_are_read_as_gguf_reads_them(kind: str) -> None:
    raw = random_blocks(kind, (5, 768), 1)
    want = dequantize(raw, GGMLQuantizationType[kind])
    got = gguf_types.groups(kind, torch.from_numpy(raw)).widened()
    np.testing.assert_array_equal(got.numpy(), want)
    assert {kind for kind, _, _ in KINDS.values()} == {*gguf_types._DECODERS, *gguf_types._FLOATS}


TINY = {
    "max_position_embeddings": 64, "hidden_size": 32, "num_hidden_layers": 1,
    "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5, "head_dim": 16,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100.0},
}  # fmt: skip


def tiny(path: Path, said: dict[str, object], *, arch: str = "llama") -> Path:
    """A file that says what is given beside what it must."""
    said = metadata(TINY, arch) | TOKENIZER | said
    size = len(said["tokenizer.ggml.tokens"])
    embedding = ("token_embd.weight", random_blocks("Q8_0", (size, 32), 0), "Q8_0")
    write(path, arch, said, [embedding])
    return path


@pytest.mark.parametrize(
    ("said", "named"),
    [
        ({"llama.expert_count": 8}, "llama.expert_count 8 is not served"),
        ({"llama.attention.clamp_kqv": 8.0}, "clamp_kqv"),
        ({"llama.rope.scaling.attn_factor": 1.5}, "attn_factor 1.5 is not served without div"),
        ({"llama.rope.scaling.type": "su"}, "'su' is not served; none, linear and yarn"),
        ({"llama.block_count": 0}, "block_count is 0"),
        ({"llama.feed_forward_length": [32, 64]}, "feed_forward_length is [32, 64]"),
        ({"llama.attention.value_length": 8}, "different lengths"),
        ({"tokenizer.ggml.model": "bert"}, "'bert' is not supported; only gpt2 and llama"),
        ({"tokenizer.ggml.pre": "new"}, "'new' is not supported; gpt-2"),
        ({"tokenizer.ggml.eos_token_id": 211}, "211 is not one of 211 tokens"),
        ({"tokenizer.ggml.token_type": [1]}, "token_type does not fit"),
        ({"tokenizer.ggml.merges": "x"}, "no merges"),
        ({"split.count": 2}, "one of 2 files"),
    ],
)  # fmt: skip
def test_what_is_not_served_is_named(said: dict[str, object], named: str, tmp_path: Path) -> None:
    path = tiny(tmp_path / "x.gguf", said)
    with pytest.raises(StartupError, match=re.escape(named)) as error:
        gguf_folder(path, tmp_path)
    assert str(path) in str(error.value)


def spec_of(path: Path, said: dict[str, object], arch: str) -> ModelSpec:
    config = {f"{arch}.{name}": value for name, value in said.items()}
    return ModelSpec.from_dir(gguf_folder(tiny(path, config, arch=arch), path.parent))


def test_what_a_file_of_gemma_leaves_out(tmp_path: Path) -> None:
    """As llama.cpp fills it in: a window in Gemma 2, none in Gemma 3, where all layers are alike
    then; the first converters wrote none."""
    full = {"block_count": 6, "rope.freq_base": 500.0}
    two, three = (spec_of(tmp_path / f"{a}.gguf", full, a) for a in ("gemma2", "gemma3"))
    assert [layer.window for layer in two.layers[:2]] == [4096, None]
    assert {(layer.window, layer.rope.theta) for layer in three.layers} == {(None, 500.0)}
    assert (two.logit_softcap, three.logit_softcap) == (30.0, None)
    more = {**full, "attention.sliding_window": 8, "final_logit_softcapping": 7.0}
    three = spec_of(tmp_path / "more.gguf", more, "gemma3")
    assert [layer.window for layer in three.layers] == [8] * 5 + [None]
    assert three.logit_softcap == 7.0


def test_divisors_of_frequencies_come_without_another_factor(tmp_path: Path) -> None:
    said = metadata(TINY, "llama") | TOKENIZER | {"llama.rope.scaling.factor": 4.0}
    embedding = ("token_embd.weight", random_blocks("Q8_0", (211, 32), 0), "Q8_0")
    divisors = ("rope_freqs.weight", np.ones(8, np.float32), None)
    write(tmp_path / "x.gguf", "llama", said, [embedding, divisors])
    with pytest.raises(StartupError, match=r"scaling.factor 4.0 is not served beside divisors"):
        gguf_folder(tmp_path / "x.gguf", tmp_path)


def test_an_architecture_or_type_that_is_not_served_is_named(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match="'mamba' is not served from GGUF files; llama, qwen2"):
        gguf_folder(tiny(tmp_path / "x.gguf", {}, arch="mamba"), tmp_path)
    blocks = np.zeros((2, 84), np.uint8)
    write(tmp_path / "y.gguf", "llama", {}, [("token_embd.weight", blocks, "Q2_K")])
    with pytest.raises(StartupError, match=r"type Q2_K, which is not read; F32, .*Q6_K are"):
        gguf_folder(tmp_path / "y.gguf", tmp_path)
    (tmp_path / "m-00002-of-00003.gguf").write_bytes(b"GGUF")
    with pytest.raises(StartupError, match=r"one of 3 files of a model: join them first"):
        gguf_folder(tmp_path / "m-00002-of-00003.gguf", tmp_path)


@pytest.mark.parametrize(
    "how", [{}, {"add_dummy_prefix": False}, {"user_defined_symbols": ["\n\n", "<b>"]}], ids=str
)
def test_a_sentencepiece_tokenizer_gives_the_ids_of_sentencepiece(
    how: dict[str, object], tmp_path: Path
) -> None:
    """Of a file as llama.cpp's converter writes it: pieces, scores and kinds, but no merges."""
    from sentencepiece import SentencePieceProcessor

    model = train(tmp_path, **how) / "tokenizer.model"
    known = SentencePieceProcessor(model_file=str(model))
    ids, symbols = range(known.vocab_size()), how.get("user_defined_symbols", ())

    def kind(i: int) -> int:
        if known.is_unknown(i):
            return 2
        if known.is_control(i):
            return 3
        if known.is_byte(i):
            return 6
        return 4 if known.id_to_piece(i) in symbols else 1

    said = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [known.id_to_piece(i) for i in ids],
        "tokenizer.ggml.scores": [known.get_score(i) for i in ids],
        "tokenizer.ggml.token_type": [kind(i) for i in ids],
        "tokenizer.ggml.bos_token_id": known.bos_id(),
        "tokenizer.ggml.eos_token_id": known.eos_id(),
        "tokenizer.ggml.add_space_prefix": how.get("add_dummy_prefix", True),
    }
    text = load_tokenizer(str(gguf_folder(tiny(tmp_path / "x.gguf", said), tmp_path)))
    parts = ("the number 12 is a hello world", " hello", "  number 7", "é 日本 😀", "a\n\n", "b<b>")
    for content in parts:
        want = known.encode(content)
        assert list(text.encode(content, False)) == want
        assert list(text.encode(content, True)) == [known.bos_id(), *want]
        assert text.decode(want) == known.decode(want)
    if symbols:  # as llama.cpp: texts between symbols are texts of their own
        whole = [token for content in parts[-2:] for token in known.encode(content)]
        assert list(text.encode("".join(parts[-2:]), False)) == whole
    assert text.eos_id == known.eos_id()


@pytest.mark.parametrize(
    ("scores", "named"), [([0.5], "scores do not fit the tokens"), ("x", "scores do not fit")]
)
def test_sentencepiece_without_its_scores_is_refused(
    scores: object, named: str, tmp_path: Path
) -> None:
    said = {"tokenizer.ggml.model": "llama", "tokenizer.ggml.scores": scores}
    with pytest.raises(StartupError, match=named):
        gguf_folder(tiny(tmp_path / "x.gguf", said), tmp_path)


def test_a_folder_follows_its_file(tmp_path: Path) -> None:
    """Made once; another header is another folder; the name is the file's."""
    path = tiny(tmp_path / "x.gguf", {})
    folder = gguf_folder(path, tmp_path)
    assert folder.name == "x"
    assert gguf_folder(path, tmp_path) == folder
    tiny(path, {"tokenizer.chat_template": "{{ messages }}"})
    other = gguf_folder(path, tmp_path)
    assert other != folder
    said = json.loads((other / "tokenizer_config.json").read_text())
    assert said["chat_template"] == [{"name": "default", "template": "{{ messages }}"}]


def refusal(path: Path, data: bytes, tmp_path: Path) -> str | None:
    path.write_bytes(data)
    try:
        gguf_folder(path, tmp_path)
    except StartupError as error:
        return str(error)
    return None


def test_damaged_files_are_refused_in_one_line(tmp_path: Path) -> None:
    """Cut anywhere, or any number in its header replaced by a large one: never another error, and
    never more memory than the file has."""
    sound = tiny(tmp_path / "x.gguf", {}).read_bytes()
    header = read_gguf(tmp_path / "x.gguf").header
    path = tmp_path / "y.gguf"
    for size in (0, 3, 4, 12, 30, *range(60, len(sound), len(sound) // 40)):
        found = refusal(path, sound[:size], tmp_path)
        assert found is not None
        assert "\n" not in found
    rng, refused = np.random.default_rng(0), 0
    for turn in range(300):
        data, at = bytearray(sound), int(rng.integers(0, header - 8))
        junk = (b"\xff" * 8, b"\x00" * 8, rng.bytes(8), b"\xff\xff\xff\x7f")[turn % 4]
        width = int(rng.integers(1, len(junk) + 1))
        data[at : at + width] = junk[:width]
        found = refusal(path, bytes(data), tmp_path)
        refused += found is not None
        assert "\n" not in (found or "")
    assert refused > 100


@pytest.mark.parametrize(
    ("at", "value", "named"),
    [
        (0, b"GGML", "does not begin with GGUF"),
        (4, (9).to_bytes(4, "little"), "version 9 is not read"),
        (4, (3).to_bytes(4, "big"), "in the other order"),
        (8, (1 << 40).to_bytes(8, "little"), "1,099,511,627,776 tensors"),
        (16, (1 << 62).to_bytes(8, "little"), "values at byte"),
        (24, (1 << 33).to_bytes(8, "little"), "a string of 8,589,934,592 bytes"),
    ],
)
def test_damage_is_named(at: int, value: bytes, named: str, tmp_path: Path) -> None:
    data = bytearray(tiny(tmp_path / "x.gguf", {}).read_bytes())
    data[at : at + len(value)] = value
    assert named in (refusal(tmp_path / "y.gguf", bytes(data), tmp_path) or "")


def test_tensors_lie_inside_the_file_and_apart(tmp_path: Path) -> None:
    two = [(f"{n}.weight", np.ones((4, 32), np.float32), None) for n in ("token_embd", "output")]
    write(tmp_path / "x.gguf", "llama", {}, two)
    sound = (tmp_path / "x.gguf").read_bytes()
    offset = read_gguf(tmp_path / "x.gguf").header - 8  # of the second tensor
    for value, named in ((0, "overlap"), (1 << 40, "would be at bytes"), (7, "would be at")):
        data = sound[:offset] + value.to_bytes(8, "little") + sound[offset + 8 :]
        assert named in (refusal(tmp_path / "y.gguf", data, tmp_path) or "")
    sizes = offset - 4 - 16  # and its dimensions
    data = sound[:sizes] + (1 << 60).to_bytes(8, "little") + sound[sizes + 8 :]
    assert "has type F32 and shape [4, 1152921504606846976]" in (
        refusal(tmp_path / "y.gguf", data, tmp_path) or ""
    )
