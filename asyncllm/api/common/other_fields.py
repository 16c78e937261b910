"""Fields of OpenAI's requests, and of other servers' on its routes, that are not honoured here.

Each is refused by name unless it has a value that asks for nothing, or cannot matter. Knows names
and values; what is honoured is in :mod:`asyncllm.api.openai.request`.
"""

from __future__ import annotations

from typing import Final

from asyncllm.api.common.request_model import Unavailable

_PRIORITY: Final = Unavailable("priorities of requests", 0)
_REQUEST_ID: Final = Unavailable("naming a request (the header X-Request-Id does)", "")
_GROUP: Final = Unavailable("choosing a group")
_MOVING: Final = Unavailable("moving K/V between servers of other makers")
_EXPERTS: Final = Unavailable("returning routed experts", 0, False)

REFUSED: Final = {
    "moderation": Unavailable("moderation"),
    "regular_constraint": Unavailable("LightLLM's name of guided_regex", ""),
    # vLLM's
    "bad_words": Unavailable("banning words (logit_bias bans tokens)", []),
    "use_beam_search": Unavailable("beam search", False),
    "length_penalty": Unavailable("beam search", 1, 1.0),
    "prompt_embeds": Unavailable("a prompt of embeddings"),
    "prompt_logprobs": Unavailable(
        "prompt_logprobs (echo with logprobs gives them on /v1/completions)", -1
    ),
    "truncate_prompt_tokens": Unavailable("truncating the prompt"),
    "truncation_side": Unavailable("truncating the prompt"),
    "logits_processors": Unavailable("a logits processor", []),
    "spaces_between_special_tokens": Unavailable("leaving out spaces between special tokens", True),
    "structural_tag": Unavailable("a structural tag", ""),
    "guided_json_object": Unavailable("vLLM's old name of response_format's json_object", False),
    "guided_whitespace_pattern": Unavailable("a pattern for white space", ""),
    "watermarking": Unavailable("a watermark", False),
    "repetition_detection": Unavailable("ending at repetitions"),
    "priority": _PRIORITY,
    "request_id": _REQUEST_ID,
    "return_token_offsets": Unavailable("offsets of tokens", False),
    "return_prompt_text": Unavailable("the prompt's text in the answer", False),
    "routed_experts_prompt_start": _EXPERTS,
    "vllm_xargs": Unavailable("arguments of extensions", {}),
    "cache_salt": Unavailable("a prefix cache of one's own", ""),
    "kv_transfer_params": _MOVING,
    "ec_transfer_params": _MOVING,
    # SGLang's
    "custom_logit_processor": Unavailable("a logits processor"),
    "custom_params": Unavailable("a logits processor", {}),
    "no_stop_trim": Unavailable("its name of include_stop_str_in_output", False),
    "stop_regex": Unavailable("stopping at a pattern", "", []),
    "json_schema": Unavailable("SGLang's name of guided_json", ""),
    "regex": Unavailable("SGLang's name of guided_regex", ""),
    "ebnf": Unavailable("SGLang's name of guided_grammar", ""),
    "lora_path": Unavailable("an adapter"),
    "return_hidden_states": Unavailable("hidden states", False),
    "return_routed_experts": _EXPERTS,
    "routed_experts_start_len": _EXPERTS,
    "return_cached_tokens_details": Unavailable("more about cached tokens", False),
    "session_params": Unavailable("a session", {}),
    "rid": _REQUEST_ID,
    "extra_key": Unavailable("a prefix cache of one's own", ""),
    "ngram_corpus_id": Unavailable("a corpus of n-grams"),
    "routed_dp_rank": _GROUP,
    "data_parallel_rank": _GROUP,
    "disagg_prefill_dp_rank": _GROUP,
    "bootstrap_host": _MOVING,
    "bootstrap_port": _MOVING,
    "bootstrap_room": _MOVING,
    "images_config": Unavailable("images", {}),
    # llama.cpp's
    "grammar": Unavailable("llama.cpp's name of guided_grammar", ""),
    "typical_p": Unavailable("typical decoding", 1, 1.0),
    "top_a": Unavailable("sampling by top_a", 0, 0.0),
    "tfs_z": Unavailable("tail-free sampling", 1, 1.0),
    "mirostat": Unavailable("mirostat", 0),
    "dynatemp_range": Unavailable("a dynamic temperature", 0, 0.0),
    "dry_multiplier": Unavailable("DRY sampling", 0, 0.0),
    "xtc_probability": Unavailable("XTC sampling", 0, 0.0),
    "repeat_penalty": Unavailable("llama.cpp's name of repetition_penalty", 1, 1.0),
    "n_predict": Unavailable("llama.cpp's name of max_tokens", -1),
    "n_probs": Unavailable("llama.cpp's name of logprobs", 0),
}
COMPLETION_REFUSED: Final = {"suffix": Unavailable("suffix", ""), **REFUSED}
CHAT_REFUSED: Final = {
    "audio": Unavailable("audio"),
    "modalities": Unavailable("output other than text", ["text"], []),
    "web_search_options": Unavailable("searching the web"),
    "echo": Unavailable("echo", False),
    "best_of": Unavailable("best_of", 1),
    "add_special_tokens": Unavailable("adding special tokens to a chat", False),
    "chat_template": Unavailable("a chat template of the request"),
    "documents": Unavailable("documents", []),
    "mm_processor_kwargs": Unavailable("multimodal input", {}),
    "media_io_kwargs": Unavailable("multimodal input", {}),
    "max_dynamic_patch": Unavailable("images"),
    "min_dynamic_patch": Unavailable("images"),
    "use_audio_in_video": Unavailable("audio", False),
    "input_ids": Unavailable("a chat of token ids"),
    "role_settings": Unavailable("LightLLM's settings of roles", {}),
    "character_settings": Unavailable("LightLLM's settings of characters", []),
    **REFUSED,
}

_CACHE: Final = "the prefix cache needs no hints"
# of objects inside of bodies
CACHE_HINT: Final = {"prompt_cache_breakpoint": _CACHE}
CACHE_CONTROL: Final = {"cache_control": _CACHE}
OF_ANSWERS: Final = dict.fromkeys(
    ("id", "status", "phase", "caller", "async", "namespace", "toolset_name"),
    "it tells of an earlier answer what the prompt does not",
)
LATE_TOOLS: Final = {"defer_loading": "all tools are told from the start"}
IGNORED: Final = {
    "user": "nothing is kept of users",
    "session_id": "a conversation is found again by its tokens",
    "stream_interval": "how many tokens share a chunk changes no text",
    "guided_decoding_backend": "there is one backend of structured output",
    "custom_labels": "metrics have no labels of requests",
}
# of OpenAI's routes for conversations
FOR_OPENAI: Final = {
    "safety_identifier": "nothing is kept of users",
    "service_tier": "all requests have one",
    "prompt_cache_key": _CACHE,
    "prompt_cache_retention": _CACHE,
    "prompt_cache_options": _CACHE,
}
CHAT_IGNORED: Final = {
    **IGNORED,
    **FOR_OPENAI,
    "store": "completions are not stored, and no route gives them back",
    "metadata": "it goes with stored completions",
    "return_mm_kwargs": "there is no multimodal input",
    "log_metrics": "all requests are counted",
}
