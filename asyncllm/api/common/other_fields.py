"""Fields of OpenAI's requests, and of other servers' on its routes, that are not honoured here.

Each is refused by name unless it has a value that asks for nothing, or cannot matter. Knows names
and values; what is honoured is in :mod:`asyncllm.api.openai.request`.
"""

from __future__ import annotations

from typing import Final

from asyncllm.api.common.request_model import Unavailable

_PRIORITY: Final = Unavailable("priorities of requests", 0)
_REQUEST_ID: Final = Unavailable("a request id in the body (use the header X-Request-Id)", "")
_GROUP: Final = Unavailable("choosing a data-parallel group")
_MOVING: Final = Unavailable("K/V transfer by another server's protocol")
_EXPERTS: Final = Unavailable("returning routed experts", 0, False)

REFUSED: Final = {
    "moderation": Unavailable("moderation"),
    "regular_constraint": Unavailable("LightLLM's name for guided_regex", ""),
    # vLLM's
    "bad_words": Unavailable("banning words (use logit_bias)", []),
    "use_beam_search": Unavailable("beam search", False),
    "length_penalty": Unavailable("beam search", 1, 1.0),
    "prompt_embeds": Unavailable("a prompt of embeddings"),
    "prompt_logprobs": Unavailable(
        "prompt_logprobs (use echo and logprobs on /v1/completions)", -1
    ),
    "truncate_prompt_tokens": Unavailable("prompt truncation per request"),
    "truncation_side": Unavailable("prompt truncation per request"),
    "logits_processors": Unavailable("a logits processor", []),
    "spaces_between_special_tokens": Unavailable("joining special tokens without spaces", True),
    "structural_tag": Unavailable("a structural tag", ""),
    "guided_json_object": Unavailable("vLLM's old name for response_format json_object", False),
    "guided_whitespace_pattern": Unavailable("a pattern for white space", ""),
    "watermarking": Unavailable("a watermark", False),
    "repetition_detection": Unavailable("stopping at repetitions"),
    "priority": _PRIORITY,
    "request_id": _REQUEST_ID,
    "return_token_offsets": Unavailable("token offsets", False),
    "return_prompt_text": Unavailable("the prompt's text in the answer", False),
    "routed_experts_prompt_start": _EXPERTS,
    "vllm_xargs": Unavailable("arguments for extensions", {}),
    "cache_salt": Unavailable("a separate prefix cache", ""),
    "kv_transfer_params": _MOVING,
    "ec_transfer_params": _MOVING,
    # SGLang's
    "custom_logit_processor": Unavailable("a logits processor"),
    "custom_params": Unavailable("a logits processor", {}),
    "no_stop_trim": Unavailable("SGLang's name for include_stop_str_in_output", False),
    "stop_regex": Unavailable("stopping at a regular expression", "", []),
    "json_schema": Unavailable("SGLang's name for guided_json", ""),
    "regex": Unavailable("SGLang's name for guided_regex", ""),
    "ebnf": Unavailable("SGLang's name for guided_grammar", ""),
    "lora_path": Unavailable("a LoRA adapter"),
    "return_hidden_states": Unavailable("hidden states", False),
    "return_routed_experts": _EXPERTS,
    "routed_experts_start_len": _EXPERTS,
    "return_cached_tokens_details": Unavailable("details of cached tokens", False),
    "session_params": Unavailable("a session", {}),
    "rid": _REQUEST_ID,
    "extra_key": Unavailable("a separate prefix cache", ""),
    "ngram_corpus_id": Unavailable("a corpus of n-grams"),
    "routed_dp_rank": _GROUP,
    "data_parallel_rank": _GROUP,
    "disagg_prefill_dp_rank": _GROUP,
    "bootstrap_host": _MOVING,
    "bootstrap_port": _MOVING,
    "bootstrap_room": _MOVING,
    "images_config": Unavailable("images", {}),
    # llama.cpp's
    "grammar": Unavailable("llama.cpp's name for guided_grammar", ""),
    "typical_p": Unavailable("typical decoding", 1, 1.0),
    "top_a": Unavailable("sampling by top_a", 0, 0.0),
    "tfs_z": Unavailable("tail-free sampling", 1, 1.0),
    "mirostat": Unavailable("mirostat", 0),
    "dynatemp_range": Unavailable("a dynamic temperature", 0, 0.0),
    "dry_multiplier": Unavailable("DRY sampling", 0, 0.0),
    "xtc_probability": Unavailable("XTC sampling", 0, 0.0),
    "repeat_penalty": Unavailable("llama.cpp's name for repetition_penalty", 1, 1.0),
    "n_predict": Unavailable("llama.cpp's name for max_tokens", -1),
    "n_probs": Unavailable("llama.cpp's name for logprobs", 0),
}
COMPLETION_REFUSED: Final = {"suffix": Unavailable("suffix", ""), **REFUSED}
CHAT_REFUSED: Final = {
    "audio": Unavailable("audio"),
    "modalities": Unavailable("output other than text", ["text"], []),
    "web_search_options": Unavailable("web search"),
    "echo": Unavailable("echo", False),
    "best_of": Unavailable("best_of", 1),
    "add_special_tokens": Unavailable("adding special tokens to a chat", False),
    "chat_template": Unavailable("a chat template in the request"),
    "documents": Unavailable("documents", []),
    "mm_processor_kwargs": Unavailable("multimodal input", {}),
    "media_io_kwargs": Unavailable("multimodal input", {}),
    "max_dynamic_patch": Unavailable("images"),
    "min_dynamic_patch": Unavailable("images"),
    "use_audio_in_video": Unavailable("audio", False),
    "input_ids": Unavailable("a chat of token ids"),
    "role_settings": Unavailable("LightLLM's role settings", {}),
    "character_settings": Unavailable("LightLLM's character settings", []),
    **REFUSED,
}

_CACHE: Final = "the prefix cache needs no hints"
# of objects inside of bodies
CACHE_HINT: Final = {"prompt_cache_breakpoint": _CACHE}
CACHE_CONTROL: Final = {"cache_control": _CACHE}
OF_ANSWERS: Final = dict.fromkeys(
    ("id", "status", "phase", "caller", "async", "namespace", "toolset_name"),
    "it describes an earlier answer and is not part of the prompt",
)
LATE_TOOLS: Final = {"defer_loading": "all tools are in the prompt from the start"}
IGNORED: Final = {
    "user": "nothing is stored about users",
    "session_id": "the prefix cache recognises a conversation by its tokens",
    "stream_interval": "it only changes how many tokens share a chunk",
    "guided_decoding_backend": "there is only one backend for structured output",
    "custom_labels": "metrics have no labels per request",
}
# of OpenAI's routes for conversations
FOR_OPENAI: Final = {
    "safety_identifier": "nothing is stored about users",
    "service_tier": "there is only one service tier",
    "prompt_cache_key": _CACHE,
    "prompt_cache_retention": _CACHE,
    "prompt_cache_options": _CACHE,
}
CHAT_IGNORED: Final = {
    **IGNORED,
    **FOR_OPENAI,
    "store": "completions are not stored",
    "metadata": "it belongs to stored completions, and none are stored",
    "return_mm_kwargs": "there is no multimodal input",
    "log_metrics": "all requests are counted",
}
