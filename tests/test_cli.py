"""Spellings, suggestions, refusals with exit code 2, help and the generated page."""

import gc
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest

from asyncllm import __version__, cli, config
from asyncllm.cli import ALIASES, FOREIGN, main, markdown, parse
from asyncllm.config import FLAGS, Config
from asyncllm.errors import StartupError
from asyncllm.server import signals

ROOT = Path(__file__).parents[1]


def run(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *args], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )


def refusal(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line with which ``argv`` is refused."""
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith("asyncllm: ")
    return err


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[Config]:
    """Configurations handed to a stand-in for ``rank.serve``."""
    seen: list[Config] = []

    def serve(config: Config, ahead: object, early: object) -> int:
        seen.append(config)
        if config.model_dir == "missing":
            raise StartupError("no such folder:\n  missing")
        return 7

    stand_in = types.ModuleType("asyncllm.rank")
    stand_in.serve = serve  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "asyncllm.rank", stand_in)
    monkeypatch.setattr(signals, "hold", lambda: None)  # this process goes on
    monkeypatch.setattr(signals, "end_when_stopped", lambda **_: None)
    monkeypatch.setattr(cli.log, "setup", lambda *args, **more: None)
    monkeypatch.setattr(cli, "quiet_libraries", lambda: None)
    return seen


def sample(name: str) -> tuple[list[str], object]:
    """Words that set option ``name`` to a value that it accepts alone, and that value."""
    option = FLAGS[name]
    if option.kind is bool:
        return [], True
    if name == "trust_forwarded_for":
        value = "10.0.0.0/8"
    elif option.needs or option.choices or name in ("dp", "nnodes"):
        value = option.choices[0] if option.default is None else option.default
    else:
        value = {int: 64, float: 0.5, str: "text"}[option.kind]
        value = "w8a8" if name == "quant_type" else value
        if name == "cors_allow_origins":
            value = "https://example.org:8443"
    return [str(value)], (value,) if option.nargs else value


PARSEABLE = [
    name
    for name, option in FLAGS.items()
    if (option.default is not None and option.kind is not bool) or not option.needs
    if name != "mode"
]


@pytest.mark.parametrize("name", PARSEABLE)
def test_every_option_in_both_spellings(name: str) -> None:
    words, value = sample(name)
    for spelling in (f"--{name}", f"--{name.replace('_', '-')}"):
        got = parse([spelling, *words])
        assert getattr(got, name) == value
        assert got.explicit == {name}
    if words:
        assert parse([f"--{name.replace('_', '-')}={words[0]}"]) == parse([f"--{name}", *words])


@pytest.mark.parametrize(
    ("alias", "name"),
    [
        ("--tensor-parallel-size", "tp"),
        ("--tensor_parallel_size", "tp"),
        ("--max-model-len", "max_req_total_len"),
        ("--context-length", "max_req_total_len"),
        ("--gpu-memory-utilization", "mem_fraction"),
        ("--mem-fraction-static", "mem_fraction"),
        ("--model-path", "model_dir"),
        ("--model", "model_dir"),
        ("--served-model-name", "served_model_name"),
    ],
)
def test_aliases(alias: str, name: str) -> None:
    words, value = sample(name)
    assert getattr(parse([alias, *words]), name) == value


def test_several_values() -> None:
    got = parse(["--eos_id", "1", "2", "--served-model-name", "a", "b", "--trust-remote-code"])
    assert got.eos_id == (1, 2)
    assert got.served_model_name == ("a", "b")
    assert got.trust_remote_code
    got = parse(["--api_key", "a", "b", "--api-key", "c", "--api_key=d"])
    assert got.api_key == ("a", "b", "c", "d")


def test_an_explicit_default_is_remembered() -> None:
    assert parse(["--max-model-len", "16384"]).explicit == {"max_req_total_len"}
    assert parse([]).explicit == frozenset()
    assert parse([]) == Config()


@pytest.mark.parametrize(
    ("typed", "near"),
    [
        ("--prot", "--port"),
        ("--model_dirr", "--model_dir"),
        ("--max-total-token-nums", "--max_total_token_num"),
        ("--TP", "--tp"),
        ("--tensor-paralel-size=2", "--tensor_parallel_size"),
        ("--hlep", "--help"),
    ],
)
def test_unknown_options_suggest_the_nearest(
    typed: str, near: str, capsys: pytest.CaptureFixture[str]
) -> None:
    line = refusal([typed, "1"], capsys)
    assert line.endswith(f"unknown option {typed.partition('=')[0]}; did you mean {near}?\n")


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["--log_json=1"], "--log_json: takes no value, but has '1'"),
        (["--constraint_time_limit", "inf"], "--constraint_time_limit must be a finite number, "),
        (["--drain_timeout", "nan"], "--drain_timeout must be a finite number, not nan"),
    ],
)
def test_a_switch_has_no_value_and_no_number_is_infinite(
    argv: list[str], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert refusal(argv, capsys).startswith(f"asyncllm: {line}")


def test_unknown_option_with_nothing_near(capsys: pytest.CaptureFixture[str]) -> None:
    assert "unknown option --zzzzqqqq; see --help" in refusal(["--zzzzqqqq"], capsys)


@pytest.mark.parametrize(
    ("argv", "part"),
    [
        (["--run_mode", "pd_master", "--tp", "2"], "--tp 2 with --run_mode pd_master: it runs"),
        (["--run_mode", "config_server", "--tp", "2"], "--run_mode config_server: it runs no"),
        (
            ["--run_mode", "pd_master", "--port", "9000", "--cluster_port", "9000"],
            "--cluster_port 9000 is --port: HTTP is served there",
        ),
        (
            ["--run_mode", "config_server", "--config_server_port", "9000", "--cluster_port=9000"],
            "--cluster_port 9000 is --port: HTTP is served there",
        ),
        (
            ["--nnodes", "2", "--tp", "2", "--port", "9000", "--multinode_httpmanager_port=9000"],
            "--multinode_httpmanager_port 9000 is --port: HTTP is served there",
        ),
        (
            ["--nnodes", "2", "--tp", "2", "--nccl_host", "0.0.0.0", "--port", "12345"],
            "--multinode_httpmanager_port 12345 is --port: HTTP is served there",
        ),
        (
            ["--nnodes", "2", "--tp", "4", "--multinode_httpmanager_port", "20002"],
            "--multinode_httpmanager_port 20002 is a port of rank 1 (--multinode_router_gloo_port",
        ),
        (
            ["--nnodes", "2", "--tp", "4", "--node_rank", "1", "--port", "20003"],
            "--port 20003 is the port of rank 2 (--multinode_router_gloo_port 20001); give another",
        ),
        (
            ["--run_mode", "config_server", "--port", "1", "--config_server_port", "2"],
            "--port 1 and --config_server_port 2: with --run_mode config_server they mean the same",
        ),
        (
            ["--run_mode", "config_server", "--host", "::1", "--config_server_host", "::"],
            "--host ::1 and --config_server_host ::",
        ),
        (
            ["--run_mode", "config_server", "--use_config_server_to_init_nccl"],
            "--use_config_server_to_init_nccl with --run_mode config_server: it hosts",
        ),
        (
            ["--run_mode", "decode", "--config_server_host", "::1"],
            "--config_server_host needs --config_server_port as well",
        ),
        (
            ["--run_mode", "pd_master", "--config_server_port", "1"],
            "--config_server_port needs --config_server_host as well",
        ),
        (
            [
                "--run_mode",
                "prefill",
                "--config_server_host",
                "::1",
                "--config_server_port",
                "1",
                "--pd_master_ip",
                "::1",
            ],
            "--pd_master_ip with --config_server_host: this node serves all pd_masters",
        ),
        (
            [
                "--run_mode",
                "pd_master",
                "--use_config_server_to_init_nccl",
                "--config_server_host",
                "127.0.0.1",
                "--config_server_port",
                "1",
            ],
            "it has no ranks",
        ),
        (["--nnodes", "2"], "--tp 1 ranks cannot be divided among --nnodes 2 nodes"),
        (["--node-rank", "1"], "it only applies with --nnodes above 1"),
        (
            ["--nnodes", "2", "--tp", "2", "--node-rank", "2"],
            "--node_rank 2 must be below --nnodes",
        ),
        (
            ["--nnodes", "2", "--tp", "2", "--multinode_router_gloo_port", "65535"],
            "--multinode_router_gloo_port 65535 leaves no port for the last of --tp 2 ranks: 65536",
        ),
        (["--tp", "3", "--dp", "2"], "--tp must be a multiple of --dp"),
        (["--mode", "triton_int8kv", "ppl_fp16"], "--mode ppl_fp16 does not read --mode"),
        (["--mode=ppl_int8kv", "--llm-kv-type", "fp8kv"], "and --llm_kv_type fp8kv are two"),
        (["--mode", "triton_int4kv"], "--mode must be one of triton_int8kv, ppl"),
        (["--llm_kv_type", "fp8kv_sph"], "must be one of None, int8kv, fp8kv, not 'fp8kv_sph'"),
        (["--load_way", "DSS"], "--load_way"),
        (
            ["--use_config_server_to_init_nccl", "--tp", "2"],
            "needs --config_server_host and --config_server_port",
        ),
        (
            [
                "--use_config_server_to_init_nccl",
                "--tp",
                "2",
                "--config_server_port",
                "1",
                "--config_server_host",
                "10.0.0.1",
            ],
            "--nccl_host 127.0.0.1 must be --config_server_host 10.0.0.1",
        ),
        (["--ssl_keyfile", "key.pem"], "it only applies with --ssl_certfile"),
        (["--quant_type", "fp8w8a8-pt"], "nearest to this is fp8w8a8 "),
        (["--quant_type=ao-int4wo-128"], "nearest to this is a checkpoint of AWQ"),
        (["--sampling_backend"], "--sampling_backend: expected one argument"),
        (["--port", "http"], "--port: needs a whole number, not 'http'"),
        (["--port", "80_00"], "--port: needs a whole number, not '80_00'"),
        (["--port", " 7"], "--port: needs a whole number, not ' 7'"),
        (["--tp", "\u0663"], "--tp: needs a whole number, not '\u0663'"),
        (["--mem_fraction", "much"], "--mem_fraction: needs a number, not 'much'"),
        (["--port", "99999"], "--port must be from 1 to 65535, not 99999"),
        (["--port"], "--port: expected one argument"),
        (["--log_json=yes"], "--log_json"),
        (["serve"], "unknown argument: serve"),
        (["--por", "1"], "did you mean --port?"),
    ],
)
def test_refusals_are_one_line_and_exit_code_2(
    argv: list[str], part: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert part in refusal(argv, capsys)


@pytest.mark.parametrize("name", [name for name, option in FOREIGN.items() if option.refused])
def test_options_of_lightllm_that_would_change_what_is_served_end_the_start(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    line = refusal([f"--{name}", "1"], capsys)
    assert f"--{name} is an option of LightLLM that is not available: " in line
    assert FOREIGN[name].reason in line


@pytest.mark.parametrize("name", [name for name, option in FOREIGN.items() if not option.refused])
def test_options_of_lightllm_that_cannot_matter_are_one_warning(name: str) -> None:
    values = {"none": [], "one": ["1"], "many": ["1", "2"]}[FOREIGN[name].values]
    for spelling in (name, name.replace("_", "-")):
        got = parse(["--port", "9000", f"--{spelling}", *values, "--tp", "2"])
        assert (got.port, got.tp, got.explicit) == (9000, 2, {"port", "tp"})
        words = " ".join([f"--{spelling}", *values])
        assert got.warnings == (f"{words} has no effect: {FOREIGN[name].reason}",)


def test_values_that_ask_for_nothing_are_left_out() -> None:
    argv = ["--hardware-platform", "cuda"]
    (line,) = parse(argv).warnings
    assert line.startswith(" ".join(argv) + " has no effect: ")


def test_foreign_names_and_ours_are_apart() -> None:
    assert not set(FOREIGN) & (set(FLAGS) | set(ALIASES))
    assert not set(ALIASES) & set(FLAGS)


def test_main_serves_and_returns_its_exit_code(served: list[Config]) -> None:
    assert main(["--tp", "2", "--check"]) == 7
    assert gc.isenabled(), "only imports do without"
    assert served == [Config(tp=2, check=True)]


def test_main_takes_the_process_arguments(
    served: list[Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["asyncllm", "--port", "9000"])
    assert main() == 7
    assert served[0].port == 9000


def test_a_start_that_fails_later_is_one_line_too(
    served: list[Config], capsys: pytest.CaptureFixture[str]
) -> None:
    assert refusal(["--model", "missing"], capsys).endswith("no such folder: missing\n")


def test_help_has_every_flag_in_its_chapter(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    position = 0
    for group in config.TOPICS:
        position = text.index(f"\n{group}:\n", position)
    for name in (*FLAGS, "help", "version"):
        assert re.search(rf"^  (-h, )?--{name}\b", text, re.M), name
    for alias in ("--max-model-len", "--tensor-parallel-size"):
        assert alias in text


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"asyncllm {__version__}\n"


def test_page_is_fresh_and_complete() -> None:
    text = markdown()
    assert (ROOT / "docs" / "cli.md").read_text() == text, (
        "run: python -m asyncllm.cli > docs/cli.md"
    )
    ours, refused, ignored = text.split("## Options of LightLLM")
    rows = {m[1]: m[0] for m in re.finditer(r"^\| `--(\w+)` \|.*$", ours, re.M)}
    assert set(rows) == {*FLAGS, "help", "version"}
    for row in rows.values():
        assert row.count("|") == 5, row
    for name, foreign in FOREIGN.items():
        assert (f"`--{name}`" in refused) == foreign.refused
        assert (f"`--{name}`" in ignored) != foreign.refused


@pytest.mark.parametrize(
    ("argv", "part"),
    [
        (["--nnodes", "2"], "and must be a multiple of --nnodes"),
        (["--prot", "1"], "did you mean --port?"),
        (["--chat_template", "x"], "the chat template comes from the model folder"),
    ],
)
def test_refusals_of_a_real_process(argv: list[str], part: str) -> None:
    done = run("-m", "asyncllm", *argv)
    assert (done.returncode, done.stdout) == (2, "")
    assert part in done.stderr
    assert done.stderr.count("\n") == 1


def test_command_line_loads_neither_torch_nor_the_server() -> None:
    heavy = "torch", "transformers", "numpy", "zmq", "aiohttp", "uvloop", "asyncio"
    script = (
        "import sys\n"
        "from asyncllm.cli import main, parse\n"
        "parse(['--tp', '2'])\n"
        "assert main(['--help']) == 0 and main(['--version']) == 0 and main(['--dp', '2']) == 2\n"
        f"sys.exit(' '.join(m for m in {heavy} if m in sys.modules) or 0)\n"
    )
    done = run("-c", script)
    assert done.stderr.startswith("asyncllm: --tp 1 ranks cannot be divided among --dp 2 groups")
    assert done.returncode == 0


def test_the_page_is_written_to_stdout_by_the_module() -> None:
    assert run("-W", "error", "-m", "asyncllm.cli").stdout == markdown()


def test_options_that_compatibility_promises_work() -> None:
    page = (ROOT / "docs" / "compatibility.md").read_text()
    promised, _, _ = page.partition("**Options**")[2].partition("The others [make")
    names = re.findall(r"`--(\w+)`", promised)
    assert len(names) > 25
    assert {*names} <= {*FLAGS}


@pytest.mark.parametrize(
    ("words", "precise"),
    [
        ("", True),
        ("--port 8001", True),
        ("--model_dir /models/x", False),
        ("--model_dir=/models/x --device cpu", False),
    ],
)
@pytest.mark.parametrize("gpu", [False, True])
def test_make_serve_takes_float32_for_the_embedded_model_on_a_cpu(
    tmp_path: Path, words: str, precise: bool, gpu: bool
) -> None:
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("make", "sh"):
        (tools / name).symlink_to(str(shutil.which(name)))
    if gpu:
        (tools / "nvidia-smi").write_text("#!/bin/sh\n")
        (tools / "nvidia-smi").chmod(0o755)
    for device in ("", " --device cpu"):
        command = ["make", "-n", "serve", f"ARGS={words}{device}"]
        made = subprocess.run(
            command, cwd=ROOT, env={"PATH": str(tools)}, capture_output=True, text=True, check=True,
            timeout=60,
        ).stdout  # fmt: skip
        wanted = precise and (not gpu or bool(device))
        assert made.splitlines()[-1].count("--data_type fp32") == wanted
