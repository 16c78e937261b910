"""Every family against transformers in float32, and whether that comparison tells anything."""

from __future__ import annotations

from pathlib import Path

import pytest

from asyncllm.errors import StartupError
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

CLOSE = 2e-4  # of float32, in log-probabilities of some -30


@pytest.fixture(scope="module", params=CASES)
def made(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Case, Path, Reference]:
    case, folder = CASES[request.param], tmp_path_factory.mktemp("family")
    return case, folder, Reference(make(case, folder))


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
