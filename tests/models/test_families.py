"""Every family against transformers in float32, and whether that comparison tells anything."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from asyncllm.errors import StartupError
from asyncllm.models.registry import MODELS
from tests.models import figures
from tests.models.families import (
    CASES,
    SAID,
    Case,
    Reference,
    largest_difference,
    make,
    make_other,
    perturbed,
    quick_difference,
)
from tests.models.harness import Ranks, make_device, read_spec

WITH_EXPERTS = [name for name, case in CASES.items() if any("expert" in k for k in case.changes)]
CLOSE = 2e-4  # of float32, in log-probabilities of some -30


@pytest.fixture(scope="module", params=CASES)
def made(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Case, Path, Reference]:
    case, folder = CASES[request.param], tmp_path_factory.mktemp("family")
    return case, folder, Reference(make(case, folder))


def test_every_architecture_is_compared_and_has_its_row() -> None:
    assert {case.model for case in CASES.values()} == set(MODELS)
    text = figures.PAGE.read_text()
    kept = json.loads(figures.KEPT.read_text())
    assert figures.page(text, kept) == text, "python -m tests.models.figures render"
    assert set(kept) == set(CASES)


@pytest.mark.gpu
def test_matches_transformers_on_a_gpu(made: tuple[Case, Path, Reference]) -> None:
    """In float32, whose products inside attention are tf32."""
    case, folder, reference = made
    device = make_device(folder, "fp32", "cuda", num_slots=1024, max_len=case.max_len)
    assert largest_difference(reference, device) < 0.1
    device.close()


@pytest.mark.parametrize("tp", [1, 2])
def test_matches_transformers(made: tuple[Case, Path, Reference], tp: int) -> None:
    case, folder, reference = made
    device = (
        Ranks(folder, tp, max_len=case.max_len)
        if tp > 1
        else make_device(folder, "fp32", "cpu", num_slots=1024, max_len=case.max_len)
    )
    assert largest_difference(reference, device) < CLOSE
    device.close()


@pytest.mark.parametrize("made", WITH_EXPERTS, indirect=True)
def test_experts_on_three_ranks_match_transformers(made: tuple[Case, Path, Reference]) -> None:
    case, folder, reference = made
    device = Ranks(folder, 3, max_len=case.max_len, whole_experts=True)
    assert largest_difference(reference, device) < CLOSE
    device.close()


def test_every_field_of_the_spec_counts(made: tuple[Case, Path, Reference]) -> None:
    case, folder, reference = made
    spec, ignored = read_spec(folder), []
    same = make_other(folder, case, spec)
    assert quick_difference(reference, same) < CLOSE
    same.close()
    for path, others in perturbed(spec):
        name = path.rpartition(".")[2].partition("[")[0]
        if name in SAID | case.unseen or (name == "head" and spec.tie_embeddings):
            continue
        found = []
        for other in others:
            try:
                device = make_other(folder, case, other())
            except (StartupError, RuntimeError):  # of what fits neither checkpoint nor itself
                found.append(1e9)
                continue
            found.append(quick_difference(reference, device))
            device.close()
        # a border is crossed in one direction
        noticed = max(found) if name == "trained" else min(found)
        if noticed < 10 * CLOSE:
            ignored.append((path, found))
    assert ignored == []


@pytest.mark.parametrize("name", ["gemma3 text", "mistral3 text"])
def test_text_parts_go_by_the_names_of_transformers_4_and_5(tmp_path: Path, name: str) -> None:
    case = CASES[name]
    reference = Reference(make(case, tmp_path))
    file = tmp_path / "model.safetensors"
    tensors, prefixes = load_file(file), ("language_model.model.", "vision_tower.", "multi_modal")
    assert all(any(t.startswith(p) for t in tensors) for p in prefixes)
    renamed = {}
    for tensor, value in tensors.items():
        new = tensor.replace("language_model.model.", "model.language_model.")
        if new.startswith(prefixes[1:]):
            new = f"model.{new}"
        renamed[new.replace("language_model.lm_head", "lm_head")] = value
    save_file(renamed, file)
    assert quick_difference(reference, make_other(tmp_path, case, read_spec(tmp_path))) < CLOSE
    save_file({**renamed, "audio_tower.weight": torch.zeros(1)}, file)
    with pytest.raises(StartupError, match=r"unknown tensors, the first: audio_tower\.weight"):
        make_other(tmp_path, case, read_spec(tmp_path))


def test_a_tied_text_part_with_another_head_is_served_with_it(tmp_path: Path) -> None:
    """As config.json of Mistral-Small-3.1 leaves it to its reader."""
    case = CASES["mistral3 text"]
    reference, config = Reference(make(case, tmp_path)), tmp_path / "config.json"
    said = json.loads(config.read_text())
    config.write_text(json.dumps({**said, "tie_word_embeddings": True}))
    spec = read_spec(tmp_path)
    assert not spec.tie_embeddings
    assert quick_difference(reference, make_other(tmp_path, case, spec)) < CLOSE
