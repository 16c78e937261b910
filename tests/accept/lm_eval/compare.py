"""lm-eval's numbers from a server (BASE_URL, MODEL) and from transformers (MODEL_DIR), compared.

Both sides compute in float32. Exits 1 where a log-likelihood differs by more than TOLERANCE, where
one side takes a continuation for the greedy one and the other does not, or where texts differ.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import lm_eval
from lm_eval.tasks import TaskManager

TOLERANCE = 1e-2
WINDOW = 256  # one of the texts is longer
TASKS = ("local_choice", "local_rolling", "local_generate")

os.chdir(Path(__file__).parent)  # the tasks name their data relative to it
manager = TaskManager(include_path=".", include_defaults=False)


def samples(model: str, args: dict[str, Any]) -> dict[str, list[Any]]:
    """The answers to every task's requests, in order: [text] or (log-likelihood, is greedy)."""
    found = lm_eval.simple_evaluate(
        model=model, model_args=args, tasks=list(TASKS),
        task_manager=manager, bootstrap_iters=0, batch_size=1,
    )["samples"]  # fmt: skip
    return {
        task: [
            x for s in sorted(found[task], key=lambda s: s["doc_id"]) for x in s["filtered_resps"]
        ]
        for task in TASKS
    }


theirs = samples(
    "hf",
    {
        "pretrained": os.environ["MODEL_DIR"],
        "dtype": "float32",
        "device": "cpu",
        "max_length": WINDOW,
    },
)
ours = samples(
    "local-completions",
    {
        "model": os.environ["MODEL"],
        "base_url": os.environ["BASE_URL"] + "/completions",
        "tokenizer": os.environ["MODEL_DIR"],
        "tokenized_requests": True,
        "max_length": WINDOW + 2,  # this side takes two off for what is generated
        "num_concurrent": 4,
        "max_retries": 1,
    },
)
failed = 0
for task in TASKS:
    assert len(ours[task]) == len(theirs[task]) > 0
    worst = 0.0
    for mine, reference in zip(ours[task], theirs[task], strict=True):
        if isinstance(reference, str):
            same = mine == reference
        else:
            pair = [x if isinstance(x, tuple | list) else (x,) for x in (mine, reference)]
            gap = abs(pair[0][0] - pair[1][0])
            worst = max(worst, gap)
            same = gap <= TOLERANCE and pair[0][1:] == pair[1][1:]
        if not same:
            failed += 1
            sys.stdout.write(f"DIFFERENT {task}: server {mine!r}, transformers {reference!r}\n")
    sys.stdout.write(f"{task}: {len(ours[task])} answers, largest difference {worst:.6f}\n")
sys.stdout.write(f"{failed} failed\n")
sys.exit(failed > 0)
