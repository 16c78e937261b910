"""Names, labels and values of the Prometheus text."""

from __future__ import annotations

from dataclasses import replace

import pytest
from prometheus_client.parser import text_string_to_metric_families

from asyncllm.core.metrics import (
    REFUSED,
    AnsweredRequest,
    ProcessCounters,
    ServerMetrics,
    StatsSnapshot,
    describe_slots,
)
from asyncllm.messages import AllocatorStats, SchedulerStats
from asyncllm.records import GroupLoad

ANSWER = AnsweredRequest("/v1/completions", 200, 10, 5, "stop", 0.25, 0.03, 0.4)


def samples(metrics: ServerMetrics) -> dict[str, float]:
    """``name{label=value,...}`` -> value."""
    found = {}
    for family in text_string_to_metric_families(metrics.exposition().decode()):
        for sample in family.samples:
            labels = ",".join(f"{k}={v}" for k, v in sorted(sample.labels.items()))
            found[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
    return found


def test_every_name_is_there_from_the_start() -> None:
    names = {key.split("{")[0] for key in samples(ServerMetrics("m"))}
    own = (
        "kv_slots_used kv_slots_cached kv_slots_total kv_sliding_slots_used "
        "kv_sliding_slots_cached kv_sliding_slots_total evicted_sliding_tokens_total "
        "requests_running requests_waiting "
        "inflight_steps steps_total preemptions_total prompt_tokens_total generated_tokens_total "
        "prompt_tokens_computed_total "
        "prefix_hit_tokens_total prefix_lookup_tokens_total evicted_tokens_total "
        "time_to_first_token_seconds_count time_per_output_token_seconds_bucket "
        "request_duration_seconds_sum request_prompt_tokens_count request_generated_tokens_count "
        "dead_letters_total foreign_frames_total strangers_total jit_after_warmup_total step_ms launch_ms gpu_gap_ms "
        "loop_lag_ms"
    )
    theirs = (
        "request_count_total request_success_total request_failure_total request_duration_count "
        "request_first_token_duration_count request_mean_time_per_token_duration_count "
        "request_input_length_count request_generated_tokens_count queue_size batch_current_size "
        "num_running_reqs prompt_tokens_total generation_tokens_total"
    )
    assert names >= {f"asyncllm_{n}" for n in own.split()}
    assert names >= {f"lightllm_{n}" for n in theirs.split()}
    assert not [n for n in names if n.endswith("_created")]


def test_kinds_of_weights() -> None:
    got = samples(ServerMetrics("m", linears=[("fp8_channel", 28), ("bf16", 2)]))
    assert got["asyncllm_linear_layers{kind=fp8_channel}"] == 28
    assert got["asyncllm_linear_layers{kind=bf16}"] == 2


def test_two_servers_in_one_process_do_not_share_series() -> None:
    first, second = ServerMetrics("a"), ServerMetrics("b")
    first.observe(ANSWER)
    assert samples(first)["lightllm_request_count_total{model_name=a}"] == 1
    assert samples(second)["lightllm_request_count_total{model_name=b}"] == 0


def test_an_answer_is_counted_under_its_labels() -> None:
    metrics = ServerMetrics("m")
    metrics.observe(ANSWER)
    metrics.observe(replace(ANSWER, status=400, reason="error", ttft_s=-1.0, tpot_s=-1.0))
    got = samples(metrics)
    assert got["asyncllm_http_requests_total{route=/v1/completions,status=200}"] == 1
    assert got["asyncllm_http_requests_total{route=/v1/completions,status=400}"] == 1
    assert got["asyncllm_request_finished_total{reason=stop}"] == 1
    assert got["asyncllm_request_finished_total{reason=error}"] == 1
    assert got["asyncllm_time_to_first_token_seconds_count"] == 1
    assert got["asyncllm_time_to_first_token_seconds_sum"] == pytest.approx(0.25)
    assert got["asyncllm_time_per_output_token_seconds_sum"] == pytest.approx(0.03)
    assert got["asyncllm_request_duration_seconds_sum"] == pytest.approx(0.8)
    assert got["asyncllm_request_prompt_tokens_sum"] == 20
    assert got["lightllm_request_count_total{model_name=m}"] == 2
    assert got["lightllm_request_success_total{model_name=m}"] == 1
    assert got["lightllm_request_failure_total{model_name=m}"] == 1
    assert got["lightllm_generation_tokens_total{model_name=m}"] == 10
    assert got["lightllm_request_first_token_duration_count{model_name=m}"] == 1


def test_a_client_that_left_is_a_failure() -> None:
    metrics = ServerMetrics("m")
    metrics.observe(replace(ANSWER, reason="abort"))
    assert samples(metrics)["lightllm_request_failure_total{model_name=m}"] == 1


def test_an_answer_without_generation_counts_as_http_only() -> None:
    metrics = ServerMetrics("m")
    metrics.observe(AnsweredRequest("/health", 200, 0, 0, "", -1.0, -1.0, 0.001))
    got = samples(metrics)
    assert got["asyncllm_http_requests_total{route=/health,status=200}"] == 1
    assert got["asyncllm_request_duration_seconds_count"] == 0
    assert got["lightllm_request_count_total{model_name=m}"] == 0


def test_a_refused_request_enters_no_distribution() -> None:
    metrics = ServerMetrics("m")
    metrics.observe(ANSWER)
    before = samples(metrics)
    metrics.observe(AnsweredRequest("/v1/completions", 429, 0, 0, REFUSED, -1.0, -1.0, 0.0))
    after = samples(metrics)
    assert {key: value - before.get(key, 0) for key, value in after.items()
            if value != before.get(key)} == {
        "asyncllm_http_requests_total{route=/v1/completions,status=429}": 1,
        "lightllm_request_count_total{model_name=m}": 1,
        "lightllm_request_failure_total{model_name=m}": 1,
    }  # fmt: skip


def test_prompt_tokens_are_all_of_them_under_both_names_and_computed_ones_have_their_own() -> None:
    metrics = ServerMetrics("m")
    metrics.observe(ANSWER)
    metrics.update(StatsSnapshot(SchedulerStats(prompt_tokens=3)), ProcessCounters())
    got = samples(metrics)
    assert got["asyncllm_prompt_tokens_total"] == 10
    assert got["lightllm_prompt_tokens_total{model_name=m}"] == 10
    assert got["asyncllm_prompt_tokens_computed_total"] == 3


def test_update_replaces_what_the_actors_hold() -> None:
    metrics = ServerMetrics("m")
    process = ProcessCounters([("scheduler", 3, 1.5, 0.02), ("runner", 0, 0.5, 0.1)], 2, 4)
    metrics.update(
        StatsSnapshot(SchedulerStats(steps=5), AllocatorStats(used=9)), ProcessCounters()
    )
    requests = SchedulerStats(running=3, waiting=1, steps=6)
    metrics.update(StatsSnapshot(requests, AllocatorStats(used=7, cached=2, total=100)), process)
    got = samples(metrics)
    assert got["asyncllm_kv_slots_used"] == 7
    assert got["asyncllm_kv_slots_total"] == 100
    assert got["asyncllm_steps_total"] == 6
    assert got["asyncllm_mailbox_depth{actor=scheduler}"] == 3
    assert got["asyncllm_handler_seconds_total{actor=runner}"] == 0.5
    assert got["asyncllm_callback_cpu_seconds_max{actor=scheduler}"] == 0.02
    assert got["asyncllm_dead_letters_total"] == 2
    assert got["asyncllm_foreign_frames_total"] == 4
    assert got["lightllm_num_running_reqs{model_name=m}"] == 3
    assert got["lightllm_batch_current_size{model_name=m}"] == 3
    assert got["lightllm_queue_size{model_name=m}"] == 1


def test_loop_lag_has_its_endpoint() -> None:
    metrics = ServerMetrics("m")
    metrics.lag(0, 0.0003)
    metrics.lag(0, 0.3)
    got = samples(metrics)
    assert got["asyncllm_loop_lag_seconds_bucket{endpoint=0,le=0.0005}"] == 1
    assert got["asyncllm_loop_lag_seconds_count{endpoint=0}"] == 2


def test_both_slot_spaces_are_told() -> None:
    slots = AllocatorStats(used=30, cached=20, total=100)
    assert describe_slots(slots) == "KV used 30.0%, cached 20.0%"
    slots = replace(slots, sliding_used=5, sliding_cached=1, sliding_total=10)
    assert describe_slots(slots) == (
        "KV used 30.0%, cached 20.0%, of layers with a window used 50.0%, cached 10.0%"
    )
    assert StatsSnapshot(allocator=slots).load == GroupLoad(
        used=30, expected=0, total=100, sliding_used=5, sliding_total=10, cached=20
    )
