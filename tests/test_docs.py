"""What the documentation names is there: pages, headings, files, options, metrics, routes, codes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from asyncllm.api.openapi import document
from asyncllm.cli import ALIASES, FOREIGN
from asyncllm.config import FLAGS
from asyncllm.core import request_director
from asyncllm.core.metrics import ProcessCounters, RegistryMetrics, ServerMetrics, StatsSnapshot
from asyncllm.core.request_director import TRANSFER_FAILED
from asyncllm.topology import PLACEMENT

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
SOURCES = [p for d in ("asyncllm", "bench", "tests") for p in (ROOT / d).rglob("*") if p.is_file()]
# options of pip, of llama-gguf-split, of lm-eval, and any
OTHERS = {"no-compile", "merge", "model", "option"}


def text_of(name: str) -> str:
    return (ROOT / "docs" / name).read_text()


def anchors(page: Path) -> set[str]:
    """Of headings, as GitHub makes them."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    heads = (
        re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", h) for h in re.findall(r"^#+ (.+)$", text, re.M)
    )
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        path, _, anchor = link.partition("#")
        if path.startswith("http"):
            continue
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def quoted() -> Iterator[tuple[str, str]]:
    for page in PAGES:
        text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
        yield from ((page.name, each) for each in re.findall(r"`([^`\n]+)`", text))


def test_files_are_there() -> None:
    known = {str(path.relative_to(ROOT)) for path in SOURCES}
    mine = re.compile(r"[\w./]+\.py|(?:tests|bench|docs|asyncllm)/[\w./]*\w")
    missing = [
        (page, name)
        for page, name in quoted()
        if mine.fullmatch(name)
        and not (ROOT / name).exists()
        and not any(path.endswith(f"/{name}") for path in known)
    ]
    assert missing == []


def test_classes_are_there() -> None:
    python = "".join(path.read_text() for path in SOURCES if path.suffix == ".py")
    known = set(re.findall(r"\w+", python)) | {"HuggingFaceTB"}
    told = {
        (page, name)
        for page, text in quoted()
        for name in re.findall(r"\b[A-Z]+[a-z]+[A-Z]\w+", text)
    }
    assert len(told) > 50
    assert {(page, name) for page, name in told if name not in known} == set()


def test_options_are_there() -> None:
    of_scripts = "".join(path.read_text() for path in (ROOT / "bench").glob("*.py"))
    known = {*FLAGS, *ALIASES, *FOREIGN, *OTHERS, "help", "version"}
    missing = [
        (page, name)
        for page, text in quoted()
        for name in re.findall(r"(?<![\w-])--([a-z][\w-]*)", text)
        if name not in known and name.replace("-", "_") not in known
        if f'"--{name}"' not in of_scripts
    ]
    assert missing == []


def test_metrics_are_there() -> None:
    groups = StatsSnapshot(groups={0: StatsSnapshot(), 1: StatsSnapshot()})
    process = ProcessCounters(actors=[("a", 0, 0.0, 0.0)])
    server = ServerMetrics("m")
    server.update(groups, process)
    exposed = server.exposition() + RegistryMetrics({}, {}, 0, 0, process).exposition()
    names = set(re.findall(rb"^# TYPE (\w+)", exposed, re.M))
    known = {name.decode() for name in names}
    known |= {f"{name}_total" for name in known} | {name.removesuffix("_total") for name in known}
    told = {
        name for _, text in quoted() for name in re.findall(r"\b(?:async|light)llm_\w+\b", text)
    }
    chapter = text_of("operations.md").partition("\n## Metrics\n")[2].partition("\n## ")[0]
    told |= {
        name if name.startswith(("asyncllm_", "lightllm_")) else f"asyncllm_{name}"
        for name in re.findall(r"`(\w+_\w+[a-z])`", chapter)
    }
    beginnings = {name for name in told if name.endswith("_")}  # asyncllm_pd_kv_*
    assert {n for n in beginnings if not any(k.startswith(n) for k in known)} == set()
    assert told - beginnings - known == set()


def test_every_route_is_told() -> None:
    page = text_of("api.md")
    paths = {route.path.removesuffix("/{id}") for route in document.ROUTES}
    paths |= {"/invocations", "/cluster", "/pd_nodes"}
    assert {path for path in paths if f"{path}`" not in page} == set()


def test_every_error_code_is_told() -> None:
    sources = (
        "".join(
            path.read_text()
            for layer in ("api", "actors", "core", "constrain")
            for path in (ROOT / "asyncllm" / layer).rglob("*.py")
        )
        + (ROOT / "asyncllm" / "errors.py").read_text()
    )
    codes = set(re.findall(r'(?<!, error\.)\bcode(?:: \w+)? ?= ?"(\w+)"', sources))
    codes |= set(re.findall(r'\bFailure\([^()]+?, "(\w+)"', sources))
    codes |= {request_director.NO_NODES, request_director.FAILED}
    codes |= {"invalid_json"}  # of a body as a whole
    table = text_of("api.md").partition("| status | `type` | `code` |")[2].partition("\n\n")[0]
    told = {
        code for row in table.splitlines()[2:] for code in re.findall(r"`(\w+)`", row.split("|")[3])
    }
    assert told == codes - {TRANSFER_FAILED}  # the master tries again


def test_the_table_of_roles_is_the_placement() -> None:
    rows = re.findall(r"^\| (\w+) \| [^|]+ \| ([\w, ]+) \|$", text_of("architecture.md"), re.M)
    told = {role: frozenset(actors.split(", ")) for role, actors in rows if role in PLACEMENT}
    assert told == PLACEMENT


def test_the_table_of_files_is_whole() -> None:
    page = text_of("architecture.md")
    table = page.partition("\n## Files\n")[2].partition("\n## ")[0]
    package = ROOT / "asyncllm"
    known = {p.name for p in package.iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()}
    known -= {"__init__.py", "__main__.py"}
    told = set(re.findall(r"`(\w+(?:\.py|/))", table))
    assert {name for name in known if name not in told and f"{name}/" not in told} == set()
