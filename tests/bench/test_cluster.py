"""The bench of several processes: what it starts, and that it measures it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import cluster
from bench.mkmodel import write_model
from bench.serve import BenchError
from tests.conftest import TINY

MODEL = {**TINY, "vocab_size": 1200}  # prompts of the bench have ids from 1000 on
SMALL = "tiny=--n 6 --conc 3 --inp 20 --out 8 --procs 1 --warmup 1"


@pytest.fixture
def bench_dir(tmp_path: Path) -> Path:
    write_model(MODEL, tmp_path / "model")
    return tmp_path / "model"


def option(words: list[str], name: str) -> str:
    return words[words.index(f"--{name}") + 1]


def test_each_node_has_its_place_its_port_and_its_gpus() -> None:
    found = cluster.plan("tp=4,dp=2,nnodes=2", ["--x"], ["0", "1", "2", "3"])
    first, second = found.parts
    assert [part.environment for part in found.parts] == [
        {"CUDA_VISIBLE_DEVICES": "0,1"},
        {"CUDA_VISIBLE_DEVICES": "2,3"},
    ]
    assert [option(part.words, "node_rank") for part in found.parts] == ["0", "1"]
    assert option(first.words, "port") != option(second.words, "port")
    assert found.url.endswith(option(first.words, "port"))
    for name in ("multinode_httpmanager_port", "multinode_router_gloo_port", "nccl_port", "tp"):
        assert option(first.words, name) == option(second.words, name)
    every = cluster.plan("tp=2,nnodes=2", [], ["4", "5"], "all").parts
    assert [part.environment["CUDA_VISIBLE_DEVICES"] for part in every] == ["4,5", "5,4"]
    (plain,) = cluster.plan("tp=2", [], ["0", "1", "2", "3"]).parts
    assert plain.environment == {"CUDA_VISIBLE_DEVICES": "0,1"}
    assert "--nnodes" not in plain.words
    assert cluster.plan("tp=2,nnodes=2", []).parts[1].environment == {}


def test_separated_nodes_and_servers_side_by_side() -> None:
    common = ["--model_dir", "m", "--host", "127.0.0.1", "--x"]
    found = cluster.plan("p=1,d=2,tp=2", common, [*"012345"])
    master, prefill, *decode = found.parts
    assert "--x" not in master.words
    assert [p.environment["CUDA_VISIBLE_DEVICES"] for p in found.parts] == ["", "0,1", "2,3", "4,5"]
    assert {option(p.words, "run_mode") for p in decode} == {"decode"}
    assert option(prefill.words, "pd_master_port") == option(master.words, "port")
    assert found.url.endswith(option(master.words, "port"))
    assert found.joined == 3
    found = cluster.plan("servers=2", common, ["4", "5"])
    assert [p.environment["CUDA_VISIBLE_DEVICES"] for p in found.parts] == ["4", "5"]
    ports = [option(p.words, "port") for p in found.parts]
    assert found.url == ",".join(f"http://127.0.0.1:{port}" for port in ports)
    assert not any(p.follows for p in found.parts)


def test_a_strategy_is_the_masters() -> None:
    common = ["--model_dir", "m", "--host", "127.0.0.1"]
    master, *nodes = cluster.plan("p=1,d=1@round_robin", common).parts
    assert option(master.words, "select_p_d_node_strategy") == "round_robin"
    assert not any("--select_p_d_node_strategy" in part.words for part in nodes)


@pytest.mark.parametrize(
    "text", ["tp", "tp=x", "tp=0", "gpus=2", "tp=2,nodes=2", "", "tp=2@random"]
)
def test_what_is_no_topology_is_named(text: str) -> None:
    with pytest.raises(BenchError, match=repr(text)):
        cluster.plan(text, [])


def test_topologies_are_started_and_measured(
    bench_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.json"
    words = ["--model_dir", str(bench_dir), "--options", "--device cpu --data_type fp32"]
    words += ["--rounds", "1", "--load", SMALL, "--vocab", "1200"]
    words += ["--logs", str(tmp_path), "--json", str(out)]
    topologies = ["tp=2,nnodes=2", "p=1,d=1", "servers=2"]
    assert cluster.main([*words, *topologies]) == 0, capsys.readouterr().err
    found = json.loads(out.read_text())
    assert [found[text][0]["tiny"]["ok"] for text in topologies] == [6, 6, 6]
    assert found["p=1,d=1"][0]["tiny"]["kv_tail_ms"] > 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split()[:2] == ["tiny", "tp=2,nnodes=2"]
    assert lines[1].split()[3] == "1.000"
    assert "node 1 (127.0.0.1) has joined" in (tmp_path / "0-tp=2,nnodes=2" / "node0").read_text()


def test_a_load_that_nobody_knows_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert cluster.main(["--model_dir", "/nowhere", "--load", "nope", "tp=1"]) == 2
    assert "--load nope: one of lat1, " in capsys.readouterr().err
