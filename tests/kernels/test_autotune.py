"""The shipped configurations, and the choice between them and the literal tables."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch

from asyncllm.engine.quant_cuda import KernelThresholds
from asyncllm.kernels import autotune
from asyncllm.kernels.attention.decode_plan import DecodeConfig, decode_config
from asyncllm.kernels.attention.kv8 import KIND_NAMES
from asyncllm.kernels.attention.prefill import PrefillConfig, block_pairs, prefill_config
from asyncllm.kernels.autotune import DeviceFacts
from asyncllm.kernels.latent.keys import AttendConfig, attend_config
from asyncllm.kernels.latent.prefill import LatentPrefillConfig
from asyncllm.kernels.moe.experts import ExpertsConfig
from asyncllm.kernels.quant.four_bits import FourBitsConfig
from asyncllm.kernels.quant.product import ProductConfig
from asyncllm.kernels.quant.wide import WideConfig
from asyncllm.models.quantization import QuantKind

CPU = torch.device("cpu")
SHAPES, WAYS = {"64", "128", "256"}, ("", " lone", " whole", " whole lone")
PAIRS = {f"{dim} {size}" for dim in SHAPES for size in ("few", "some", "many")}
BLOCKS = {f"{dim} {size}" for dim in SHAPES for size in ("16", "64", "128")}
WEIGHTS = ("fp8", "int8", "int4", "fp8 block")
KINDS = ("", *KIND_NAMES.values())
KEYS = {
    "decode": {key + kind + way for key in PAIRS for kind in KINDS for way in WAYS},
    "prefill": {key + kind for key in BLOCKS for kind in KINDS},
    "latent": {"16 few", "16 many", "64 few", "64 many", "64 shared"},
    "latent prefill": {"all"},
    "experts": {
        f"{kind}{size}"
        for kind in ("", "fp8 ", "fp8 block ", "int8 ")
        for size in ("few", "8", "32", "128", "many")
    },
    "quant": {
        *(
            f"{kind} {rows}"
            for kind in WEIGHTS
            for rows in ("8", "16", "32", "64", "128", "256", "many")
        ),
        *(f"wide {kind} {rows}" for kind in WEIGHTS for rows in ("8", "16", "many")),
    },
    "quant ways": set(get_args(QuantKind)),
    "launch": set(autotune.EARLY),
}
READ: dict[str, Callable[[dict[str, Any]], object]] = {
    "decode": lambda entry: DecodeConfig(**entry),
    "prefill": lambda entry: PrefillConfig(**entry),
    "latent": lambda entry: AttendConfig(**entry),
    "latent prefill": lambda entry: LatentPrefillConfig(**entry),
    "experts": ExpertsConfig.of,
    "quant": lambda entry: quant_config(entry),
    "quant ways": lambda entry: KernelThresholds(**entry),
    "launch": lambda entry: entry == {"early": True} or entry["late"],
}


def quant_config(entry: dict[str, Any]) -> object:
    """Of the kernel that has such fields."""
    configs = ProductConfig, WideConfig, FourBitsConfig
    return next(c for c in configs if fits(c, set(entry)))(**entry)


def fits(config: Any, names: set[str]) -> bool:
    fields = dataclasses.fields(config)
    needed = {f.name for f in fields if f.default is dataclasses.MISSING}
    return needed <= names <= {f.name for f in fields}


def cache(dim: int, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> Any:
    """What configurations are chosen by, of a cache on a device that need not be there."""
    size = dtype.itemsize
    return SimpleNamespace(shape=(1, 8, dim), dtype=dtype, device=device, element_size=lambda: size)


@pytest.fixture
def tuned_device(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> torch.device:
    """A device named "Some GPU" with tuned configurations for head_dim 128."""
    entries = {
        "decode": {"128 few": dataclasses.asdict(DecodeConfig(32, 2, 5, 7, 2))},
        "prefill": {"128 64": dataclasses.asdict(PrefillConfig(64, 32, 4, 3, 4, False))},
    }
    path = tmp_path / "some.json"
    path.write_text(json.dumps(entries))
    monkeypatch.setattr(autotune, "config_path", lambda name: path if name == "Some GPU" else None)
    monkeypatch.setattr(autotune, "_assumed", [DeviceFacts("Some GPU", 100, 90)])
    autotune._read.cache_clear()
    return torch.device("cuda")


def test_the_tuned_configuration_is_taken_where_there_is_one(tuned_device: torch.device) -> None:
    here, plain = cache(128, tuned_device), cache(128, CPU)
    assert decode_config(here, 8) == DecodeConfig(32, 2, 5, 7, 2)
    wide = cache(128, tuned_device, torch.float32)
    assert decode_config(wide, 8) == DecodeConfig(16, 2, 2, 7, 2)
    assert decode_config(here, 500) == decode_config(plain, 500)
    assert decode_config(here, 8, grouped=False) == decode_config(plain, 8, grouped=False)
    assert decode_config(cache(64, tuned_device), 8) == decode_config(cache(64, CPU), 8)
    rounded = torch.int8
    assert decode_config(cache(128, tuned_device, rounded), 8) == decode_config(
        cache(128, CPU, rounded), 8
    )
    assert prefill_config(here, 4, 64, 2) == PrefillConfig(64, 32, 4, 3, 4, False)
    assert prefill_config(here, 4, 128, 2) == prefill_config(plain, 4, 128, 2)


def test_a_device_without_a_file_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(autotune, "_assumed", [DeviceFacts("No Such GPU", 100, 90)])
    assert autotune.tuned(torch.device("cuda"), "decode", "128 few") is None
    assert autotune.tuned(CPU, "decode", "128 few") is None


def test_shipped_files_fit_the_kernels() -> None:
    for path in autotune.config_path("x").parent.glob("*.json"):
        for kernel, entries in json.loads(path.read_text()).items():
            assert set(entries) <= KEYS[kernel], path
            for entry in entries.values():
                READ[kernel](entry)


def test_blocks_are_small_where_large_ones_leave_multiprocessors_idle() -> None:
    assert block_pairs(4, 1 << 20, CPU) == 16
    assert block_pairs(64, 1 << 20, CPU) == 64
    assert block_pairs(4096, 128, CPU) == 64
    assert block_pairs(4096, 256, CPU) == 128


@pytest.mark.parametrize(
    ("capability", "latents", "block_m"),
    [
        (80, AttendConfig(32, 8, 5, 1), 128),
        (89, AttendConfig(16, 8, 2, 1), 64),
        (90, AttendConfig(32, 8, 5, 1), 128),
        (100, AttendConfig(32, 8, 2, 1), 128),
        (120, AttendConfig(16, 8, 2, 1), 64),
    ],
)
def test_what_is_not_tuned_fits_the_shared_memory(
    capability: int, latents: AttendConfig, block_m: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As compiled by Triton 3.6 for each: 152,064, 94,208, 184,832, 213,552 and 94,208 bytes of
    latents, and of heads of 256 106,624 bytes where blocks have 128 pairs."""
    monkeypatch.setattr(autotune, "_assumed", [DeviceFacts("Not Tuned", 100, capability)])
    gpu = torch.device("cuda")
    for size in ("few", "many"):
        assert attend_config(64, size, torch.bfloat16, gpu) == latents
        assert attend_config(16, size, torch.bfloat16, gpu) == AttendConfig(32, 4, 5, 2)
    assert attend_config(64, "many", torch.bfloat16, CPU) == AttendConfig(32, 8, 5, 1)
    assert prefill_config(cache(256, gpu), 2, 128, 2).block_m == block_m
    assert prefill_config(cache(128, gpu), 2, 128, 2) == prefill_config(cache(128, CPU), 2, 128, 2)
