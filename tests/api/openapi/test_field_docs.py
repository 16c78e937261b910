"""docs/api.md has the tables that the code declares."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from asyncllm.api.openapi import field_docs

DOC = Path(__file__).parents[3] / "docs" / "api.md"


def test_docs_are_fresh() -> None:
    text = DOC.read_text()
    assert field_docs.fill(text) == text, "docs/api.md is stale: write tables.fill(text) to it"


def test_docs_have_every_table() -> None:
    shown = set(re.findall(r"<!-- table (\w+) -->", DOC.read_text()))
    assert shown == {*field_docs.MODELS, *field_docs.REFUSED, *field_docs.IGNORED}


def test_a_change_shows() -> None:
    stale = "<!-- table native -->\nold\n<!-- end -->"
    fresh = field_docs.fill(stale)
    assert "| `inputs` |" in fresh
    assert field_docs.fill(fresh) == fresh
    with pytest.raises(KeyError):
        field_docs.fill("<!-- table nope -->\n<!-- end -->")
