"""docs/api.md has the tables that the code declares."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from asyncllm.api import tables

DOC = Path(__file__).parents[2] / "docs" / "api.md"


def test_docs_are_fresh() -> None:
    text = DOC.read_text()
    assert tables.fill(text) == text, "docs/api.md is stale: write tables.fill(text) to it"


def test_docs_have_every_table() -> None:
    shown = set(re.findall(r"<!-- table (\w+) -->", DOC.read_text()))
    assert shown == {*tables.FIELDS, *tables.REFUSED}


def test_a_change_shows() -> None:
    stale = "<!-- table native -->\nold\n<!-- end -->"
    fresh = tables.fill(stale)
    assert "| `inputs` |" in fresh
    assert tables.fill(fresh) == fresh
    with pytest.raises(KeyError):
        tables.fill("<!-- table nope -->\n<!-- end -->")
