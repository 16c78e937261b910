"""Collects facts (file hashes, devices) that must match across nodes or within a cluster."""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path

from asyncllm.config import Config, ResolvedConfig
from asyncllm.errors import StartupError
from asyncllm.models.checkpoint import weight_files

INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "tekken.json",
    "added_tokens.json", "special_tokens_map.json", "vocab.json", "merges.txt",
    "chat_template.jinja", "chat_template.json",
)  # fmt: skip
HEADER_SIZE = 8  # bytes; a safetensors file begins with the length of its header
MOST_HEADER = 100 << 20


Facts = tuple[tuple[str, str], ...]


def facts(config: Config, resolved: ResolvedConfig, model_dir: Path) -> Facts:
    """(name, value) of everything that must be equal on the nodes of one server.

    Raises:
        StartupError: a file cannot be read.
    """
    return (
        *model_facts(config, model_dir),
        ("device", resolved.device),
        *kv_facts(resolved),
        ("--quant_type and --quant_cfg", resolved.quant),
        ("max_req_total_len", str(resolved.max_req_total_len)),
        ("batch_max_tokens", str(resolved.batch_max_tokens)),
        ("chunked_prefill_size", str(resolved.chunked_prefill_size)),
        ("eos_ids", str(sorted(resolved.eos_ids))),
    )


def text_facts(model_dir: Path) -> Facts:
    """Hashes that must match between processes that only handle the model's text.

    Raises:
        StartupError: a file cannot be read.
    """
    try:
        return (
            ("config.json", _digest(model_dir, ["config.json"])),
            ("tokenizer", _digest(model_dir, TOKENIZER)),
        )
    except OSError as error:
        raise StartupError(f"{error.filename}: {error.strerror}") from None


def model_facts(config: Config, model_dir: Path) -> Facts:
    """Hashes of a model: config.json with the weight files' index (or their headers), and all
    tokenizer files.

    Raises:
        StartupError: a file cannot be read.
    """
    try:
        model, tokenizer = _model(model_dir, config.load_way), _digest(model_dir, TOKENIZER)
    except OSError as error:
        raise StartupError(f"{error.filename}: {error.strerror}") from None
    return ("model (config.json and index of the weights)", model), ("tokenizer", tokenizer)


def kv_facts(resolved: ResolvedConfig) -> Facts:
    """What must be equal besides the model for one process to read K/V of another."""
    return (("K/V layout", " ".join((resolved.dtype, *resolved.kv_mode))),)


def _model(folder: Path, load_way: str) -> str:
    names = ["config.json", *(name for name in INDEXES if (folder / name).is_file())]
    about = [_digest(folder, names)]
    for path in sorted(weight_files(folder, load_way)):
        about.append(f"{path.relative_to(folder)} {path.stat().st_size}")
        if path.suffix == ".safetensors":
            with path.open("rb") as file:
                length = int.from_bytes(file.read(HEADER_SIZE), "little")
                about.append(sha256(file.read(min(length, MOST_HEADER))).hexdigest())
    return sha256("\n".join(about).encode()).hexdigest()[:16]


def _digest(folder: Path, names: list[str] | tuple[str, ...]) -> str:
    """Hash of those of these files that exist."""
    total = sha256()
    for name in names:
        path = folder / name
        if path.is_file():
            total.update(f"{name} {path.stat().st_size}\n".encode())
            total.update(path.read_bytes())
    return total.hexdigest()[:16]
