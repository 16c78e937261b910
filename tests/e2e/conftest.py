"""One reference model and one server for all tests that do not change its state."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer

from tests.e2e.process import Server

PROSE = Path(__file__).parents[2] / "LICENSE"


class Reference:
    """The embedded model in transformers, float32, on the device that the server uses."""

    def __init__(self, model_dir: Path) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from transformers import AutoModelForCausalLM

            self.device = "cuda" if torch.cuda.is_available() else "cpu"
            self.model: Any = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
        self.model.eval().to(self.device)

    def scores(self, ids: list[int], last: int = 0) -> torch.Tensor:
        """[num, vocab_size] log-probabilities of the token after each position.

        Args:
            last: only of that many last positions; 0: of all.
        """
        with torch.no_grad():
            box = torch.tensor([ids], device=self.device)
            logits = self.model(box, logits_to_keep=last, use_cache=False).logits[0]
        return logits.float().log_softmax(-1).cpu()

    def check_greedy(self, prompt: list[int], answer: list[int], margin: float) -> int:
        """Each token of ``answer`` must be the best, or short of the best by less than ``margin``.

        Returns how many are not the best (near-ties).
        """
        scores = self.scores(prompt + answer, len(answer) + 1)[:-1]
        best = scores.max(-1).values
        chosen = scores.gather(1, torch.tensor(answer)[:, None])[:, 0]
        gaps = best - chosen
        assert gaps.max() < margin, (
            f"token {int(gaps.argmax())}: {float(gaps.max()):.4f} below best"
        )
        return int((gaps > 0).sum())


@pytest.fixture(scope="session")
def reference(demo_dir: Path) -> Reference:
    return Reference(demo_dir)


@pytest.fixture(scope="session")
def tokenizer(demo_dir: Path) -> Tokenizer:
    return Tokenizer.from_file(str(demo_dir / "tokenizer.json"))


@pytest.fixture(scope="session")
def prose(tokenizer: Tokenizer) -> list[int]:
    """A long English text as ids."""
    return list(tokenizer.encode(PROSE.read_text()).ids)


@pytest.fixture(scope="session")
def server(demo_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Float32, default chunks, prefix cache on."""
    log = tmp_path_factory.mktemp("server") / "log"
    with Server(demo_dir, log, "--data_type", "fp32") as running:
        yield running
        assert running.process.poll() is None, running.text()
