"""Options of LightLLM, current and former, that asyncllm does not have.

Options that would change answers, capacity or exposure are refused at start; those that make no
difference here only cause a warning. Knows names and numbers of values; knows neither argparse nor
our own options.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Values = Literal["none", "one", "many"]


@dataclass(frozen=True, slots=True)
class ForeignOption:
    """One option.

    Args:
        reason: why it is refused, or why it makes no difference.
        refused: the server does not start.
        values: how many values it takes.
        harmless: accepted values without effect; other values are refused.
    """

    reason: str
    refused: bool
    values: Values = "none"
    harmless: tuple[str, ...] = ()


# reason -> names; "name=" takes a value, "name=+" several, "name=a|b" is refused but for a and b
_REFUSED = {
    "the chat template comes from the model folder": "chat_template=",
    "expert weights use the type of --data_type": "expert_dtype=",
    "8-bit K/V use per-token scales (--mode), not calibrated ones": "kv_quant_calibration_config_path=",
    "only CUDA and the CPU are supported": "hardware_platform=cuda",
    "K/V are only kept in the device's memory": "enable_cpu_cache enable_disk_cache",
    "HTTP is served by aiohttp; see the options under Access": "hypercorn_config=",
    "--api_key already protects every route": "enable_monitor_auth",
    "sizes are set individually (--running_max_req_size, --batch_max_tokens)": "p_mode= "
    "performance_mode=",
    "only text models are supported": "enable_multimodal enable_multimodal_audio",
    "reward models are not supported": "use_reward_model",
    "there is no speculative decoding with a draft model; see --speculative": "mtp_draft_model_dir=+ mtp_mode= mtp_step=",
    "weights cannot be changed or moved while serving": "enable_rl enable_torch_memory_saver",
    "requests set prompt_logprobs instead": "return_all_prompt_logprobs",
    "routed experts are not returned": "enable_return_routed_experts",
    "requests set allowed_token_ids instead": "first_token_constraint_mode",
}
_IGNORED = {
    "there is no scheduling tick: a step is planned as soon as there is room for one on the device": "schedule_time_interval=",
    "the prompt cache is on unless --disable_dynamic_prompt_cache": "use_dynamic_prompt_cache",
    "steps always mix prefill and decode": "enable_prefill_decode_mixed",
    "prompts are always computed in chunks (--chunked_prefill_size)": "disable_chunked_prefill",
    "requests set prompt_logprobs; no option is needed": "enable_prompt_logprobs",
    "no shared memory is used": "disable_shm_warning",
    "no rpyc is used": "visual_rpyc_port=",
    "images, audio and video are not supported": "afs_embed_capacity= afs_image_embed_dir= audio_dp= "
    "audio_gpu_ids=+ audio_infer_batch_size= audio_tp= cache_capacity= cache_reserved_ratio= "
    "config_server_visual_redis_port= disable_audio disable_image_resize disable_vision "
    "embed_cache_storage_size= enable_mps enable_multimodal_url_cache max_image_pixels= "
    "max_image_token_count= visual_dp= visual_gpu_ids=+ visual_infer_batch_size= "
    "visual_nccl_ports=+ visual_send_batch_size= visual_tp= visual_use_proxy_mode "
    "vit_att_backend=+ vit_quant_cfg= vit_quant_type=",
    "there is no cache outside the device's memory": "cpu_cache_storage_size= cpu_cache_token_page_size= disk_cache_dir= disk_cache_storage_size= "
    "enable_dp_prompt_cache_fetch",
    "experts are not replicated": "auto_update_redundancy_expert ep_redundancy_expert_config_path=",
    "shared experts are computed separately": "enable_fused_shared_experts",
    "models with linear attention are not supported": "disable_linear_att_small_page_cpu_cache "
    "linear_att_cache_size= linear_att_hash_page_size= linear_att_page_block_num= "
    "linear_att_ssm_data_type=",
    "groups are balanced as requests arrive (--dp_balancer)": "dp_prefill_wait_step= "
    "enable_dp_prefill_balance",
    "kernels are chosen by shape": "enable_fa3 enable_flashinfer_decode "
    "enable_flashinfer_prefill enable_torch_fallback enable_triton_fallback "
    "llm_decode_att_backend=+ llm_prefill_att_backend=+ sampling_backend= penalty_counter_mode=",
    "the K/V format determines how many channels share a scale (--mode)": "llm_kv_quant_group_size=",
    "graphs are captured for all shapes in use": "enable_prefill_cudagraph "
    "graph_grow_step_size= graph_max_batch_size= graph_max_len_in_batch= graph_split_batch_size= "
    "prefill_cudagraph_max_handle_token=",
    "the all-reduce is chosen automatically": "disable_custom_allreduce "
    "disable_flashinfer_allreduce enable_custom_allgather enable_decode_microbatch_overlap "
    "enable_prefill_microbatch_overlap enable_tpsp_mix_mode",
    "requests are admitted by free K/V slots": "disable_aggressive_schedule "
    "router_max_new_token_len= router_max_wait_tokens= router_token_ratio=",
    "throughput is logged every 10 s unless idle": "disable_log_stats log_stats_interval=",
    "prompts and answers are never logged": "detail_log",
    "metrics are pulled from /metrics": "grouping_key=+ job_name= metric_gateway= push_interval=",
    "the server monitors itself (--step_timeout)": "health_monitor",
    "there is no profiler route": "enable_profiling=",
    "/v1/models always names asyncllm as the owner": "model_owner=",
    "weights are not moved while serving": "enable_weight_cpu_backup",
}


def _table() -> dict[str, ForeignOption]:
    found = {}
    for refused, table in ((True, _REFUSED), (False, _IGNORED)):
        for reason, names in table.items():
            for word in names.split():
                name, takes, rest = word.partition("=")
                values: Values = "many" if rest == "+" else "one" if takes else "none"
                harmless = tuple(rest.split("|")) if rest not in ("", "+") else ()
                found[name] = ForeignOption(reason, refused, values, harmless)
    return found


FOREIGN = _table()
