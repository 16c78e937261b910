"""Which JSON schemas are accepted, by keyword.

    python bench/schemas.py

Prints the table of docs/compatibility.md, over the schemas in tests/data.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

from asyncllm.constrain.llguidance_backend import GrammarEngine
from asyncllm.errors import RequestError

SUITE = Path(__file__).parents[1] / "tests/data/json_schema_suite.json"


def main() -> None:
    grammars = GrammarEngine([*(bytes([byte]) for byte in range(256)), b""], 257, (256,))
    accepted: Counter[str] = Counter()
    every: Counter[str] = Counter()
    for keyword, _, schema, *_ in json.loads(SUITE.read_text()):
        every[keyword] += 1
        try:
            grammars.build("schema", json.dumps(schema))
        except RequestError:
            continue
        accepted[keyword] += 1
    print("| keyword | accepted | of |\n|---|---|---|")
    for keyword in sorted(every):
        print(f"| {keyword} | {accepted[keyword]} | {every[keyword]} |")
    print(f"| all | {accepted.total()} | {every.total()} |")


if __name__ == "__main__":
    main()
