"""The shipped configurations, and the choice between them and the literal tables."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from asyncllm.kernels import autotune
from asyncllm.kernels.attention.decode_plan import DecodeConfig, decode_config
from asyncllm.kernels.attention.prefill import PrefillConfig, block_pairs, prefill_config
from asyncllm.kernels.moe.experts import ExpertsConfig

CPU = torch.device("cpu")
KINDS = {"decode": DecodeConfig, "prefill": PrefillConfig}


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
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    monkeypatch.setattr(autotune, "num_sms", lambda device: 100)
    monkeypatch.setattr("asyncllm.kernels.attention.decode_plan.num_sms", lambda device: 100)
    autotune._read.cache_clear()
    return torch.device("cuda")


def test_the_tuned_configuration_is_taken_where_there_is_one(tuned_device: torch.device) -> None:
    assert decode_config(128, 8, 2, tuned_device) == DecodeConfig(32, 2, 5, 7, 2)
    assert decode_config(128, 500, 2, tuned_device) == decode_config(128, 500, 2, CPU)
    assert decode_config(64, 8, 2, tuned_device) == decode_config(64, 8, 2, CPU)
    assert prefill_config(128, 4, 64, 2, tuned_device) == PrefillConfig(64, 32, 4, 3, 4, False)
    assert prefill_config(128, 4, 128, 2, tuned_device) == prefill_config(128, 4, 128, 2, CPU)


def test_a_device_without_a_file_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "No Such GPU")
    assert autotune.tuned(torch.device("cuda"), "decode", "128 few") is None
    assert autotune.tuned(CPU, "decode", "128 few") is None


def test_shipped_files_fit_the_kernels() -> None:
    for path in autotune.config_path("x").parent.glob("*.json"):
        for kernel, entries in json.loads(path.read_text()).items():
            for key, entry in entries.items():
                if kernel == "experts":
                    assert key in {"few", "8", "32", "128", "many"}, (path, key)
                    assert ExpertsConfig.of(entry).block_m >= 16
                    continue
                dim_pad, size = key.split()
                assert dim_pad in {"64", "128", "256"}, (path, key)
                assert size in {"few", "some", "many", "16", "64", "128"}, (path, key)
                KINDS[kernel](**entry)


def test_blocks_are_small_where_large_ones_leave_multiprocessors_idle() -> None:
    assert block_pairs(4, 1 << 20, CPU) == 16
    assert block_pairs(64, 1 << 20, CPU) == 64
    assert block_pairs(4096, 128, CPU) == 64
    assert block_pairs(4096, 256, CPU) == 128
