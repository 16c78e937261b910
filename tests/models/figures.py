"""How far every family is from transformers, as the table of docs/models.md.

python -m tests.models.figures measure cpu FILE [ROW ...]     all but the GPU's column
python -m tests.models.figures measure cuda FILE [ROW ...]    the GPU's
python -m tests.models.figures render [FILE ...]              takes them over, writes the table
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import transformers

from tests.models.families import CASES, Case, Reference, largest_difference, make
from tests.models.harness import Ranks, make_device, read_spec

DOCS = Path(__file__).parents[2] / "docs"
KEPT, PAGE = DOCS / "models.json", DOCS / "models.md"
BEGIN, END = "<!-- figures: python -m tests.models.figures -->\n", "<!-- end of figures -->\n"
HALF_SPREAD = 0.5  # of the weights that are compared in bf16, beside those compared in fp32

Figures = dict[str, dict[str, float]]  # by case and column


def on(device: str, dtype: str) -> Callable[[Case, Path, Reference], float]:
    def measured(case: Case, folder: Path, reference: Reference) -> float:
        made = make_device(folder, dtype, device, num_slots=1024, max_len=case.max_len)
        found = largest_difference(reference, made)
        made.close()
        return found

    return measured


def among(size: int, groups: int) -> Callable[[Case, Path, Reference], float]:
    """The worst of ``groups`` of ``size`` ranks, which step together where they share experts."""

    def measured(case: Case, folder: Path, reference: Reference) -> float:
        found = []
        together = groups if read_spec(folder).shares_experts else 1
        for driven in range(groups):
            given = {"groups": together, "driven": driven % together}
            made = Ranks(folder, size, max_len=case.max_len, **given)
            found.append(largest_difference(reference, made))
            made.close()
        return max(found)

    return measured


def themselves(case: Case, folder: Path, reference: Reference) -> float:
    """How far transformers in bf16 is from itself in fp32: what bf16 costs anybody."""
    model = getattr(transformers, case.model).from_pretrained(
        folder, dtype=torch.bfloat16, attn_implementation="eager"
    )
    case.prepare(model)
    return reference.apart(Reference(model))


FULL, HALF = 1.0, HALF_SPREAD
COLUMNS = {
    "cpu fp32": ("cpu", FULL, on("cpu", "fp32")),
    "cpu bf16": ("cpu", HALF, on("cpu", "bf16")),
    "cuda bf16": ("cuda", HALF, on("cuda", "bf16")),
    "tp 2": ("cpu", FULL, among(2, 1)),
    "dp 2": ("cpu", FULL, among(1, 2)),
    "transformers bf16": ("cpu", HALF, themselves),
}


def measure(device: str, names: list[str]) -> Figures:
    """Of the columns that are measured on ``device``, for the rows ``names`` or for all."""
    figures: Figures = {name: {} for name in names or CASES}
    for name in figures:
        case = CASES[name]
        for spread in (FULL, HALF):
            columns = {
                column: how
                for column, (where, given, how) in COLUMNS.items()
                if (where, given) == (device, spread)
            }
            with tempfile.TemporaryDirectory() as folder:
                if columns:
                    dtype = torch.float32 if spread == FULL else torch.bfloat16
                    reference = Reference(make(case, Path(folder), spread, dtype))
                for column, how in columns.items():
                    figures[name][column] = how(case, Path(folder), reference)
        sys.stderr.write(f"{name}: {figures[name]}\n")
    return figures


def table(figures: Figures) -> str:
    """Markdown; what has not been measured is a dash."""
    lines = [f"| | {' | '.join(COLUMNS)} |", "|---" * (len(COLUMNS) + 1) + "|"]
    for name in CASES:
        found = figures.get(name, {})
        cells = (f"{found[c]:.1e}" if c in found else "-" for c in COLUMNS)
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def page(text: str, figures: Figures) -> str:
    """``text`` with the table of ``figures`` between its marks."""
    head, rest = text.split(BEGIN)
    _, tail = rest.split(END)
    return f"{head}{BEGIN}{table(figures)}{END}{tail}"


def render(files: list[Path]) -> None:
    """Take over what ``files`` hold, and write the page."""
    kept: Figures = json.loads(KEPT.read_text()) if KEPT.exists() else {}
    for file in files:
        for name, found in json.loads(file.read_text()).items():
            kept[name] = {**kept.get(name, {}), **found}
    kept = {name: kept[name] for name in CASES if name in kept}
    KEPT.write_text(json.dumps(kept, indent=1) + "\n")
    PAGE.write_text(page(PAGE.read_text(), kept))


if __name__ == "__main__":
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    match sys.argv[1:]:
        case ["measure", ("cpu" | "cuda") as device, file, *names]:
            Path(file).write_text(json.dumps(measure(device, names)) + "\n")
        case ["render", *files]:
            render([Path(file) for file in files])
        case _:
            sys.exit(__doc__)
