"""Defaults, checks, refusals, limits and environment."""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import pytest

from asyncllm.config import FLAGS, Config, ResolvedConfig, resolve_limits, roles
from asyncllm.environment import (
    cache_dir,
    child_environment,
    cpu_count,
    hub_offline,
    memory_available,
    quiet_libraries,
)
from asyncllm.errors import StartupError

# option -> documented default; () stands for "none given" of an option with several values
DOCUMENTED: dict[str, Any] = {
    "run_mode": "normal",
    "host": "127.0.0.1",
    "port": 8000,
    "httpserver_workers": 1,
    "zmq_mode": "ipc:///tmp/",
    "pd_master_ip": "0.0.0.0",
    "pd_master_port": 1212,
    "pd_decode_rpyc_port": 42000,
    "config_server_host": None,
    "config_server_port": None,
    "model_name": "default_model_name",
    "model_dir": None,
    "tokenizer_mode": "fast",
    "load_way": "HF",
    "trust_remote_code": False,
    "max_total_token_num": None,
    "mem_fraction": 0.9,
    "batch_max_tokens": None,
    "running_max_req_size": 1000,
    "max_req_total_len": 16384,
    "eos_id": (),
    "tool_call_parser": None,
    "nnodes": 1,
    "node_rank": 0,
    "multinode_httpmanager_port": 12345,
    "multinode_router_gloo_port": 20001,
    "tp": 1,
    "dp": 1,
    "nccl_host": "127.0.0.1",
    "nccl_port": 28765,
    "use_config_server_to_init_nccl": False,
    "mode": (),
}
OURS: dict[str, Any] = {
    "pd_trans_mode": "auto",
    "pd_kv_page_num": 8,
    "pd_kv_page_size": 2048,
    "node_timeout": 300.0,
    "advertise_host": None,
    "cluster_key_file": None,
    "make_cluster_key": None,
    "max_req_input_len": None,
    "long_truncation_mode": "None",
    "use_tgi_api": False,
    "diverse_mode": False,
    "speculative": "none",
    "speculative_tokens": 16,
    "dp_balancer": "cache_aware",
    "cluster_port": None,
    "pd_master_mode": "elastic",
    "select_p_d_node_strategy": "cache_aware",
    "llm_kv_type": "None",
    "token_healing_mode": False,
    "control_tokens_in_content": "text",
    "completions_default_max_tokens": 16,
    "generation_config": "auto",
    "output_constraint_mode": "llguidance",
    "api_key": (),
    "api_key_file": None,
    "ssl_certfile": None,
    "ssl_keyfile": None,
    "cors_allow_origins": (),
    "trust_forwarded_for": (),
    "max_body_size": None,
    "body_timeout": 60.0,
    "max_header_size": 8192,
    "max_headers": 128,
    "keep_alive_timeout": 75.0,
    "sse_keep_alive": 15.0,
    "served_model_name": (),
    "device": "auto",
    "data_type": "auto",
    "quant_type": "none",
    "quant_cfg": None,
    "chunked_prefill_size": None,
    "prefill_share": 1.0,
    "disable_dynamic_prompt_cache": False,
    "constraint_time_limit": 5.0,
    "disable_cudagraph": False,
    "disable_symm_mem_allreduce": False,
    "enable_ep_moe": False,
    "max_waiting": 1024,
    "disable_shared_prefix_attention": False,
    "reasoning_parser": None,
    "check": False,
    "drain_timeout": 30.0,
    "step_timeout": 120.0,
    "dead_after": 10.0,
    "log_level": "info",
    "log_json": False,
}


def resolve(config: Config, **changes: Any) -> ResolvedConfig:
    facts: dict[str, Any] = {
        "device": "cpu",
        "checkpoint_dtype": "bfloat16",
        "model_limit": 8192,
        "model_eos": (2,),
        "model_dir_names": ("tiny", "org/tiny"),
        "has_experts": False,
        "kv_format": None,
    }
    return resolve_limits(config, **{**facts, **changes})


def test_options_and_defaults_are_the_documented_ones_and_ours() -> None:
    values = dataclasses.asdict(Config())
    assert values.pop("explicit") == frozenset()
    assert values.pop("warnings") == ()
    assert values == DOCUMENTED | OURS
    assert set(FLAGS) == set(values)


def test_parsers_begin_with_the_documented_ones() -> None:
    names = FLAGS["tool_call_parser"].choices
    assert names[:3] == ("qwen25", "llama3", "mistral")
    assert {"hermes", "deepseekv3", "qwen3_coder", "glm47", "kimi_k2", "phi4"} <= set(names)
    assert {"deepseek-r1", "qwen3", "glm45", "gpt-oss", "kimi_k2", "mistral", "think"} == set(
        FLAGS["reasoning_parser"].choices
    )


def test_the_longest_body_is_a_contexts_worth_of_text() -> None:
    assert resolve(Config()).max_body_size == 4 << 20
    long = Config(max_req_total_len=1 << 20)
    assert resolve(long, model_limit=1 << 20).max_body_size == 24 << 20
    assert resolve(Config(max_body_size=5000)).max_body_size == 5000


def test_moved_defaults_say_so() -> None:
    for name in ("mem_fraction", "running_max_req_size", "max_req_total_len", "nccl_port"):
        assert "LightLLM's default is now" in FLAGS[name].help


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("port", 0),
        ("port", 65536),
        ("host", " "),
        ("httpserver_workers", 0),
        ("zmq_mode", "inproc://"),
        ("run_mode", "visual_only"),
        ("model_dir", ""),
        ("model_name", ""),
        ("served_model_name", ("a", "")),
        ("tokenizer_mode", "rust"),
        ("load_way", "PT"),
        ("device", "tpu"),
        ("data_type", "int8"),
        ("max_total_token_num", 0),
        ("mem_fraction", 0.0),
        ("mem_fraction", 1.0),
        ("mem_fraction", float("nan")),
        ("batch_max_tokens", 0),
        ("chunked_prefill_size", -1),
        ("running_max_req_size", 0),
        ("max_req_total_len", 1),
        ("eos_id", (2, -1)),
        ("max_waiting", 0),
        ("tp", 0),
        ("dp", 0),
        ("nnodes", 0),
        ("node_rank", -1),
        ("nccl_port", 70000),
        ("mode", ("fast",)),
        ("tool_call_parser", "json"),
        ("reasoning_parser", "on"),
        ("drain_timeout", -1.0),
        ("drain_timeout", float("inf")),
        ("step_timeout", 0.0),
        ("dead_after", 0.4),
        ("cors_allow_origins", ("*", "example.org")),
        ("cors_allow_origins", ("https://example.org/",)),
        ("sse_keep_alive", -1.0),
        ("trust_forwarded_for", ("10.0.0.1", "proxy.local")),
        ("max_body_size", 0),
        ("body_timeout", 0.0),
        ("max_header_size", 63),
        ("max_headers", 0),
        ("keep_alive_timeout", float("inf")),
        ("ssl_certfile", ""),
        ("log_level", "trace"),
    ],
)
def test_values_out_of_range_are_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(StartupError, match=rf"^--{name} must .*, not "):
        Config(**{name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("port", 1),
        ("port", 65535),
        ("mem_fraction", 0.01),
        ("drain_timeout", 0.0),
        ("tp", 8),
        ("eos_id", (0, 5)),
        ("data_type", "float32"),
        ("zmq_mode", "tcp://"),
        ("tokenizer_mode", "slow"),
        *(("tool_call_parser", name) for name in FLAGS["tool_call_parser"].choices),
        *(("reasoning_parser", name) for name in FLAGS["reasoning_parser"].choices),
    ],
)
def test_edge_values_are_accepted(name: str, value: Any) -> None:
    assert getattr(Config(**{name: value}), name) == value


@pytest.mark.parametrize("key", ["", "two words", "kéy", "line\n"])
def test_keys_are_checked_and_never_shown(key: str) -> None:
    with pytest.raises(StartupError) as caught:
        Config(api_key=("good-key", key))
    assert str(caught.value) == "--api_key must be printable ASCII without spaces"
    assert "good-key" not in repr(Config(api_key=("good-key",)))


@pytest.mark.parametrize(
    ("role", "name", "value"),
    [
        ("pd_master", "tp", 2),
        ("pd_master", "nnodes", 2),
        ("pd_master", "mode", ("triton_int8kv",)),
        ("pd_master", "llm_kv_type", "int8kv"),
        ("prefill", "nnodes", 2),
        ("decode", "nnodes", 2),
    ],
)
def test_what_a_role_cannot_honour_ends_the_start(role: str, name: str, value: Any) -> None:
    shown = value[0] if isinstance(value, tuple) else value
    more = {"tp": 2} if name == "nnodes" else {}
    with pytest.raises(StartupError, match=rf"^--{name} {shown} with --run_mode {role}: "):
        Config(run_mode=role, **{name: value}, **more)


def test_what_a_master_never_looks_at_is_one_warning() -> None:
    config = Config(run_mode="pd_master", max_total_token_num=100, httpserver_workers=2)
    (line,) = config.warnings
    assert line == "--max_total_token_num has no effect: --run_mode pd_master runs no model"


@pytest.mark.parametrize("mode", ["0p1d", "1p", "p1d1", "1p1d ", "elastical", "1p12345d"])
def test_numbers_of_nodes_have_one_form(mode: str) -> None:
    with pytest.raises(StartupError, match=r"^--pd_master_mode must be elastic or .* such as 2p1d"):
        Config(run_mode="pd_master", pd_master_mode=mode)
    assert roles.counts("2p13d") == (2, 13)
    assert roles.counts("elastic") is None


@pytest.mark.parametrize(("tp", "dp"), [(1, 2), (3, 2), (2, 4)])
def test_ranks_that_cannot_be_divided_among_the_groups_end_the_start(tp: int, dp: int) -> None:
    with pytest.raises(StartupError, match=rf"^--tp {tp} ranks .* --dp {dp} groups: --tp must be"):
        Config(tp=tp, dp=dp)
    assert Config(tp=4, dp=2).warnings == ()
    (line,) = Config(dp_balancer="round_robin").warnings
    assert line == "--dp_balancer round_robin has no effect: it only applies with --dp above 1"


def test_host_and_port_of_a_config_server_have_two_names() -> None:
    for options in (
        {"config_server_host": "127.0.0.2", "config_server_port": 60088},
        {"host": "127.0.0.2", "port": 60088},
        {"host": "127.0.0.2", "config_server_host": "127.0.0.2", "config_server_port": 60088},
    ):
        config = Config(run_mode="config_server", **options)  # type: ignore[arg-type]
        assert (config.host, config.port, config.warnings) == ("127.0.0.2", 60088, ())
        assert Config.from_json(config.to_json()) == config
    (line,) = Config(run_mode="config_server", model_dir="m").warnings
    assert line == "--model_dir has no effect: --run_mode config_server serves no model"
    # a node or master listens at its own
    config = Config(run_mode="pd_master", config_server_host="::1", config_server_port=60088)
    assert (config.host, config.port) == ("127.0.0.1", 8000)


def test_names_that_do_not_go_together_end_the_start() -> None:
    """All pairs are in tests/models/test_kv_format.py."""
    wrong: list[dict[str, Any]] = [
        {"mode": ("triton_int8kv", "ppl_int8kv")},
        {"mode": ("ppl_fp16", "triton_gqa_attention")},
        {"mode": ("ppl_fp16", "triton_fp8kv")},
        {"mode": ("ppl_int8kv",), "llm_kv_type": "int8kv"},
    ]
    for options in wrong:
        with pytest.raises(StartupError, match=rf"--mode {options['mode'][0]}.* and |not read"):
            Config(**options)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_kernel_by_name_is_a_warning_on_a_cpu(device: str) -> None:
    config = Config(mode=("triton_int8kv", "triton_flashdecoding"), llm_kv_type="int8kv")
    assert config.warnings == ()
    resolved = resolve(config, device=device)
    if device == "cuda":
        assert resolved.kv_mode == ("triton_int8kv", "triton_flashdecoding")
        assert resolved.warnings == ()
        return
    assert resolved.kv_mode == ("triton_int8kv",)
    assert resolved.warnings == (
        "--mode triton_flashdecoding has no effect: it names a GPU kernel, and this is the CPU",
    )


def test_the_format_of_the_checkpoint_counts_where_none_is_asked_for() -> None:
    wants = {"kv_format": "triton_fp8kv", "device": "cuda"}
    resolved = resolve(Config(mode=("triton_gqa_attention",)), **wants)
    assert resolved.kv_mode == ("triton_fp8kv", "triton_gqa_attention")
    (note,) = (line for line in resolved.notes if "checkpoint" in line)
    assert note.startswith(
        "K/V are in triton_fp8kv, as the checkpoint specifies; scales are per token"
    )
    config = Config(mode=("ppl_fp16",))
    with pytest.raises(StartupError, match=r"^--mode ppl_fp16 does not read triton_fp8kv, the"):
        resolve(config, **wants)
    for config, kept in (
        (Config(llm_kv_type="int8kv"), "triton_int8kv"),
        (Config(mode=("ppl_int8kv",)), "ppl_int8kv"),
        (Config(explicit=frozenset({"llm_kv_type"})), None),
    ):
        resolved = resolve(config, **wants)
        assert resolved.kv_mode == ((kept,) if kept else ())
        said = f"the checkpoint specifies K/V in triton_fp8kv; they are in {kept or 'its own type'}"
        assert said in resolved.notes
    assert resolve(Config(llm_kv_type="fp8kv"), **wants).kv_mode == ("triton_fp8kv",)


@pytest.mark.parametrize(
    ("name", "value", "where"),
    [
        ("pd_master_ip", "10.0.0.1", "prefill or decode"),
        ("pd_master_port", 1213, "prefill or decode"),
        ("pd_decode_rpyc_port", 42001, "--run_mode decode"),
        ("cluster_port", 9001, "--run_mode pd_master"),
        ("pd_master_mode", "2p1d", "--run_mode pd_master"),
        ("select_p_d_node_strategy", "random", "--run_mode pd_master"),
        ("config_server_host", "10.0.0.1", "config_server"),
        ("config_server_port", 60088, "config_server"),
        ("multinode_httpmanager_port", 12346, "--nnodes above 1"),
        ("node_timeout", 20.0, "--nnodes above 1"),
        ("advertise_host", "10.0.0.1", "--nnodes above 1"),
        ("cluster_key_file", "key", "--nnodes above 1"),
        ("multinode_router_gloo_port", 20002, "--nnodes above 1"),
        ("nccl_host", "10.0.0.1", "--tp above 1"),
        ("nccl_port", 28766, "--tp above 1"),
        ("use_config_server_to_init_nccl", True, "--tp above 1"),
        ("disable_symm_mem_allreduce", True, "--tp above 1"),
        ("enable_ep_moe", True, "--tp above 1"),
        ("diverse_mode", True, "the prefix cache"),
        ("speculative_tokens", 4, "--speculative ngram"),
        ("trust_forwarded_for", ("10.0.0.1",), "without API keys"),
    ],
)
def test_options_of_another_mode_are_one_warning(name: str, value: Any, where: str) -> None:
    others: dict[str, Any] = {
        "diverse_mode": {"disable_dynamic_prompt_cache": True},
        "trust_forwarded_for": {"api_key": ("k",)},
    }
    config = Config(**{name: value}, **others.get(name, {}))
    (line,) = config.warnings
    shown = "" if value is True else f" {value[0] if isinstance(value, tuple) else value}"
    assert line.startswith(f"--{name}{shown} has no effect: it only applies with ")
    assert where in line
    assert Config.from_json(config.to_json()).warnings == (line,)


def test_every_option_of_another_mode_is_tested_and_none_but_a_lost_key_ends_the_start() -> None:
    assert {name for name, option in FLAGS.items() if option.needs and option.needs.vital} == {
        "ssl_keyfile",
        "node_rank",
    }
    with pytest.raises(StartupError, match=r"^--node_rank 1 has no effect: .*--nnodes above 1$"):
        Config(node_rank=1)
    with pytest.raises(StartupError, match=r"^--ssl_keyfile key.pem has no effect: .*certfile"):
        Config(ssl_keyfile="key.pem")


def test_options_of_another_mode_pass_where_they_count_and_with_their_default() -> None:
    assert Config(tp=2, nccl_port=28766).nccl_port == 28766
    given = Config(pd_master_port=1212, explicit=frozenset({"pd_master_port"}))
    assert given.explicit == {"pd_master_port"}


def test_explicit_holds_given_and_changed_options() -> None:
    config = Config(tp=2, max_req_total_len=16384, explicit=frozenset({"max_req_total_len"}))
    assert config.explicit == {"tp", "max_req_total_len"}


def test_json_round_trip() -> None:
    config = Config(
        tp=2,
        eos_id=(1, 2),
        served_model_name=("a", "b"),
        model_dir="/models/x y",
        mem_fraction=0.5,
        check=True,
        explicit=frozenset({"port"}),
    )
    text = config.to_json()
    assert "\n" not in text
    assert Config.from_json(text) == config
    assert Config.from_json(Config().to_json()) == Config()


def test_json_from_outside_is_checked_too() -> None:
    with pytest.raises(StartupError, match="--port must"):
        Config.from_json(json.dumps({"port": 0, "explicit": []}))


def test_default_length_is_lowered_to_the_model_with_a_note() -> None:
    got = resolve(Config(), model_limit=2048)
    assert got.max_req_total_len == 2048
    assert any("16,384" in note and "2,048" in note for note in got.notes)
    assert resolve(Config(), model_limit=131072).max_req_total_len == 16384
    assert resolve(Config(), model_limit=131072).notes == ()


def test_explicit_length_above_the_model_is_lowered_with_a_warning() -> None:
    config = Config(max_req_total_len=16384, explicit=frozenset({"max_req_total_len"}))
    got = resolve(config, model_limit=2048)
    assert got.max_req_total_len == 2048
    assert got.warnings == ("max_req_total_len lowered from 16,384 to 2,048, the model's limit",)
    assert got.notes == ()
    with pytest.raises(StartupError, match=r"--max_req_total_len 2,048 is more than the KV cache"):
        got.with_slots(1000)
    assert resolve(Config(max_req_total_len=100)).max_req_total_len == 100


def test_slots_lower_the_default_and_contradict_an_explicit_length() -> None:
    got = resolve(Config()).with_slots(1000)
    assert (got.max_req_total_len, got.num_slots) == (1000, 1000)
    assert "8,192 to 1,000" in got.notes[-1]
    assert resolve(Config()).with_slots(8192).max_req_total_len == 8192
    with pytest.raises(StartupError, match=r"5,000 .* 1,000 .*--max_total_token_num.*--mem_frac"):
        resolve(Config(max_req_total_len=5000)).with_slots(1000)
    with pytest.raises(StartupError, match="no memory for KV"):
        resolve(Config()).with_slots(0)


def test_prompts_are_shorter_than_requests() -> None:
    assert resolve(Config(max_req_input_len=8191)).max_req_input_len == 8191
    with pytest.raises(StartupError, match=r"--max_req_input_len 8,192 must be less than .* 8,192"):
        resolve(Config(max_req_input_len=8192))
    with pytest.raises(StartupError, match=r"--max_req_input_len 1,000 must be less than .* 1,000"):
        resolve(Config(max_req_input_len=1000)).with_slots(1000)
    for mode in ("None", "head", "center"):
        assert Config(long_truncation_mode=mode).long_truncation_mode == mode


@pytest.mark.parametrize(
    ("device", "chunk", "batch", "expected"),
    [
        ("cuda", None, None, (4096, 16384)),
        ("cpu", None, None, (256, 1024)),
        ("cpu", 512, 2048, (512, 2048)),
        ("cpu", 4096, None, (4096, 4096)),
        ("cuda", None, 512, (512, 512)),
    ],
)
def test_budgets(
    device: str, chunk: int | None, batch: int | None, expected: tuple[int, int]
) -> None:
    config = Config(chunked_prefill_size=chunk, batch_max_tokens=batch)
    got = resolve(config, device=device)
    assert (got.chunked_prefill_size, got.batch_max_tokens) == expected
    assert got.running_max_req_size == 1000


def test_a_small_gpu_has_smaller_defaults() -> None:
    def sizes(**options: Any) -> tuple[int, ...]:
        config = Config(**options, explicit=frozenset(options))
        got = resolve(config, device="cuda", gpu_memory=24 << 30)
        assert ("less than 36 GiB" in str(got.notes)) != ("running_max_req_size" in options)
        return got.chunked_prefill_size, got.batch_max_tokens, got.running_max_req_size

    assert sizes() == (2048, 4096, 256)
    assert sizes(running_max_req_size=1000) == (2048, 4096, 1000)
    assert sizes(chunked_prefill_size=8192) == (8192, 8192, 256)
    large = resolve(Config(), device="cuda", gpu_memory=80 << 30)
    assert (large.batch_max_tokens, large.running_max_req_size) == (16384, 1000)


def test_budget_below_the_chunk_is_an_error() -> None:
    with pytest.raises(StartupError, match=r"--batch_max_tokens 100 .*--chunked_prefill_size 200"):
        resolve(Config(chunked_prefill_size=200, batch_max_tokens=100))


@pytest.mark.parametrize(
    ("wanted", "checkpoint", "dtype"),
    [
        ("auto", "bfloat16", "bf16"),
        ("auto", "torch.float16", "fp16"),
        ("auto", "fp32", "fp32"),
        ("float32", "bfloat16", "fp32"),
        ("bf16", "float64", "bf16"),
    ],
)
def test_dtype(wanted: str, checkpoint: str, dtype: str) -> None:
    assert resolve(Config(data_type=wanted), checkpoint_dtype=checkpoint).dtype == dtype


def test_checkpoint_type_that_is_not_served_asks_for_the_flag() -> None:
    with pytest.raises(StartupError, match=r"float64.*--data_type"):
        resolve(Config(), checkpoint_dtype="float64")


def test_eos_flag_wins_over_the_model() -> None:
    assert resolve(Config(), model_eos=(2, 7, 2)).eos_ids == (2, 7)
    assert resolve(Config(eos_id=(9,))).eos_ids == (9,)
    assert "--eos_id" in resolve(Config(), model_eos=()).notes[-1]


@pytest.mark.parametrize(
    ("config", "served"),
    [
        (Config(), ("tiny", "default_model_name", "default", "org/tiny")),
        (Config(model_name="m"), ("m", "tiny", "org/tiny", "default")),
        (
            Config(served_model_name=("a", "m"), model_name="m"),
            ("a", "m", "tiny", "org/tiny", "default"),
        ),
    ],
)
def test_names(config: Config, served: tuple[str, ...]) -> None:
    got = resolve(config)
    assert got.served_names == served
    assert resolve(Config(), model_dir_names=()).served_names[0] == "default_model_name"
    assert got.model_name == config.model_name


def test_cache_dir(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/u")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    monkeypatch.setenv("ASYNCLLM_CACHE", "/own")
    assert cache_dir() == Path("/own")
    monkeypatch.delenv("ASYNCLLM_CACHE")
    assert cache_dir() == Path("/xdg/asyncllm")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_dir() == Path("/home/u/.cache/asyncllm")


def test_a_model_without_experts_has_none_to_share_out() -> None:
    config = Config(enable_ep_moe=True, tp=2)
    assert config.warnings == ()
    assert resolve(config, has_experts=True).warnings == ()
    [line] = resolve(config).warnings
    assert line == "--enable_ep_moe has no effect: the model has no experts"


@pytest.mark.parametrize("name", ["disable_cudagraph", "disable_symm_mem_allreduce"])
def test_gpu_options_are_a_warning_on_cpu(name: str) -> None:
    config = Config(tp=2, **{name: True})  # type: ignore[arg-type]
    assert resolve(config, device="cuda").device == "cuda"
    assert resolve(config, device="cuda").warnings == ()
    (line,) = resolve(config, device="cpu").warnings
    assert line == f"--{name} has no effect: it only applies to GPUs, and this is the CPU"


@pytest.mark.parametrize("name", ["enable_ep_moe", "disable_symm_mem_allreduce"])
def test_an_option_without_effect_for_two_reasons_is_one_warning(name: str) -> None:
    config = Config(**{name: True})  # type: ignore[arg-type]
    assert len(config.warnings) == 1
    assert resolve(config, device="cpu").warnings == ()


def test_cpu_count_is_the_affinity_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 3, 5}, raising=False)
    assert cpu_count() == 3


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ({}, 4096_000),
        ({"memory.max": "max", "memory.current": "5"}, 4096_000),
        ({"memory.max": "9000000", "memory.current": "5"}, 4096_000),
        ({"memory.max": "3000", "memory.current": "2500", "memory.stat": "a 1\ninactive_file 100"}, 600),
        ({"memory.max": "3000", "memory.current": "3500"}, 0),
        ({"memory/memory.limit_in_bytes": "3000", "memory/memory.usage_in_bytes": "1000"}, 2000),
    ],
)  # fmt: skip
def test_memory_available_is_the_tightest_of_machine_and_container(
    limits: dict[str, str], expected: int, tmp_path: Path
) -> None:
    group = tmp_path / "sys/fs/cgroup"
    (group / "memory").mkdir(parents=True)
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal: 9000 kB\nMemAvailable:    4000 kB\n")
    for name, text in limits.items():
        (group / name).write_text(text + "\n")
    assert memory_available(tmp_path) == expected


def test_memory_available_without_any_of_these_files_is_the_whole_memory(tmp_path: Path) -> None:
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert memory_available(tmp_path) == whole
    assert 0 < memory_available() <= whole


def test_child_environment_adds_and_leaves_ours_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEPT", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "9")
    child = child_environment(OMP_NUM_THREADS="2")
    assert (child["KEPT"], child["OMP_NUM_THREADS"]) == ("1", "2")
    assert os.environ["OMP_NUM_THREADS"] == "9"


def test_hub_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRANSFORMERS_OFFLINE", raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    assert not hub_offline()
    monkeypatch.setenv("HF_HUB_OFFLINE", "True")
    assert hub_offline()


def test_quiet_libraries_respects_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    # delenv of an absent name would not be undone, so set it first
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "x")
    monkeypatch.delenv("HF_HUB_DISABLE_TELEMETRY")
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "0")
    quiet_libraries()
    assert os.environ["HF_HUB_DISABLE_TELEMETRY"] == "1"
    assert os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] == "0"


def test_every_field_is_an_option_of_a_chapter_in_their_order() -> None:
    assert [field.name for field in dataclasses.fields(Config)] == [*FLAGS, "explicit", "warnings"]
