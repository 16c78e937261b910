"""Quality of K/V in 8 bits: that it is measured rightly, and its bounds on the embedded model."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from asyncllm import cli
from asyncllm.errors import StartupError
from bench import offline, perplexity
from bench.perplexity import Feed, Figures, child, kept, python_reference, score, table
from tests.bench.test_offline import LIMITS
from tests.models.test_llama import expected_logprobs

WORST = {"triton_int8kv": 0.01, "triton_fp8kv": 0.02}  # of perplexity


def asked(mode: str, **changes: Any) -> argparse.Namespace:
    text = Path(__file__)
    fields = {"child": mode, "text": text, "window": 120, "windows": 2, "chunk": 32, "out": 3}
    return argparse.Namespace(**{**fields, **changes})


def test_scores_are_those_of_transformers_behind_a_hit_too(tiny_dir: Path) -> None:
    reference = LlamaForCausalLM.from_pretrained(tiny_dir, dtype=torch.float32).eval()
    words = ["--model_dir", str(tiny_dir), *LIMITS, "--data_type", "fp32"]
    for more, near in (([], True), (["--mode", "triton_fp8kv"], False)):
        parts = offline.load(cli.parse([*words, *more]))
        ids = torch.randint(3, 250, (91,), generator=torch.Generator().manual_seed(1)).tolist()
        off = (torch.tensor(score(Feed(parts), ids, 16)) - expected_logprobs(reference, ids)).abs()
        assert parts.device is not None
        parts.device.close()
        assert bool(off.max() < 2e-4) is near
        # exact: the first chunk, whose tokens see nothing that has been rounded
        assert off[:15].max() < 2e-4
        assert near or off[15:45].max() > 1e-3 < off[46:].max()


def test_a_mode_is_compared_with_the_first_one(tiny_dir: Path) -> None:
    rest = ["--model_dir", str(tiny_dir), "--device", "cpu", "--data_type", "fp32"]
    found = {mode: child(asked(mode), rest) for mode in ("none", "ppl_int8kv")}
    first, other = found.values()
    assert first["tokens"] == other["tokens"] == 2 * 119
    assert first["slot"] / other["slot"] == 4 * 16 / 20
    assert 0 < abs(first["nats"] - other["nats"]) < 0.1
    rows = [line.split(" | ") for line in table(found, 3).splitlines()[3:]]
    assert [row[0] for row in rows] == ["| none", "| ppl_int8kv"]
    assert [row[4] for row in rows] == ["30", str(kept(first, other, 3))]
    assert [row[6] for row in rows] == ["x 1.00", "x 3.20"]
    weights = child(asked("quant_type=fp8w8a8"), rest)
    assert weights["weights"] < 0.9 * first["weights"]
    assert 0 < abs(first["nats"] - weights["nats"]) < 0.2
    with pytest.raises(StartupError, match=r"fewer than 9 windows"):
        child(asked("none", window=1000, windows=9), rest)


@pytest.mark.slow
def test_bounds_on_the_embedded_model(demo_dir: Path) -> None:
    """On real text, of which the second half of a window reads a prefix in 8 bits."""
    found: dict[str, float] = {}
    for mode in ("none", *WORST):
        named = [] if mode == "none" else ["--mode", mode]
        words = ["--model_dir", str(demo_dir), *LIMITS, "--data_type", "fp32", *named]
        parts = offline.load(cli.parse(words))
        assert parts.text is not None
        ids = list(parts.text.encode(python_reference(), add_special_tokens=False))[:240]
        scores = score(Feed(parts), ids, 60)
        found[mode] = -sum(scores) / len(scores)
        assert parts.device is not None
        parts.device.close()
    assert 1 < found["none"] < 4
    for mode, worst in WORST.items():
        assert math.expm1(found[mode] - found["none"]) < worst, found


def test_texts_are_not_shorter_than_what_is_asked_for() -> None:
    assert len(python_reference()) > 100_000


def test_what_is_kept_is_the_beginning() -> None:
    first: Figures = {"outputs": [[1, 2, 3], [4, 5, 6]]}
    other: Figures = {"outputs": [[1, 2, 9], [4, 8, 6]]}
    assert [kept(first, other, num) for num in (1, 2, 3)] == [2, 1, 0]
    assert perplexity.MODES[0] == "none"
