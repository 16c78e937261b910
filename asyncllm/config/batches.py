"""Options for memory, batching, request limits and output."""

from __future__ import annotations

from dataclasses import dataclass

from asyncllm.api.parsing import reasoning, tools
from asyncllm.config import roles
from asyncllm.config.flag import Requirement, above_zero, at_least, between, flag, unit_interval

CACHED = Requirement(
    "the prefix cache, without --disable_dynamic_prompt_cache",
    lambda c: not c.disable_dynamic_prompt_cache,
)
GENERATES = Requirement("--run_mode normal or decode", lambda c: c.run_mode in roles.GENERATE)
GUESSES = Requirement("--speculative ngram", lambda c: c.speculative == "ngram")


@dataclass(frozen=True, kw_only=True)
class BatchOptions:
    """Memory, batching, request limits and output."""

    max_total_token_num: int | None = flag(
        None, check=at_least(1),
        help="KV slots, one per token; default: as many as fit in --mem_fraction",
    )  # fmt: skip
    mem_fraction: float = flag(
        0.9, check=unit_interval,
        aliases=("gpu-memory-utilization", "mem-fraction-static"),
        help="share of the device memory for weights, workspace and KV; lower it if memory runs "
        "out (LightLLM's default is now 0.8)",
    )  # fmt: skip
    batch_max_tokens: int | None = flag(
        None, check=at_least(1),
        help="maximum new tokens per step, over all requests; default: 16384 on CUDA "
        "(4096 with less than 36 GiB), 1024 on CPU",
    )  # fmt: skip
    chunked_prefill_size: int | None = flag(
        None, check=at_least(1),
        help="maximum new tokens of one request per step, and of the whole step while other "
        "requests decode; default: 4096 on CUDA (2048 with less than 36 GiB), 256 on CPU",
    )  # fmt: skip
    prefill_share: float = flag(
        1.0, check=lambda x: None if 0 < x <= 1 else "must be above 0 and at most 1",
        help="share of a step's time that prefill may take while other requests decode; 0.5: steps "
        "may take twice as long as decode alone; 1: no limit",
    )  # fmt: skip
    running_max_req_size: int = flag(
        1000, check=between(1, 65536),
        help="maximum number of running requests; 256 by default on a GPU with less than 36 GiB "
        "(LightLLM's default is now 256)",
    )  # fmt: skip
    max_req_total_len: int = flag(
        16384, check=at_least(2), aliases=("max-model-len", "context-length"),
        help="maximum prompt plus output tokens of a request; lowered to the model's limit (with a "
        "warning if given) and, by default, to the number of KV slots; a given value above that is "
        "an error (LightLLM's default is now the model's limit)",
    )  # fmt: skip
    max_req_input_len: int | None = flag(
        None, check=at_least(1),
        help="maximum prompt tokens of a request, less than --max_req_total_len; default: no "
        "separate limit (LightLLM has dropped this option)",
    )  # fmt: skip
    long_truncation_mode: str = flag(
        "None", choices=("None", "head", "center"),
        help="what to do with prompts that exceed --max_req_input_len, or that do not fit together "
        "with the requested max_new_tokens: None: refuse them; head: drop their first tokens; "
        "center: drop tokens in the middle (LightLLM has dropped this option)",
    )  # fmt: skip
    eos_id: tuple[int, ...] = flag(
        (), nargs="+", check=at_least(0), metavar="ID",
        help="token ids that end an answer, instead of those of config.json, "
        "generation_config.json and the tokenizer's eos_token",
    )  # fmt: skip
    generation_config: str = flag(
        "auto", choices=("auto", "none"),
        help="auto: parameters that a request does not set (temperature, top_p, top_k, min_p, "
        "repetition_penalty, do_sample, max_new_tokens) default to the model's "
        "generation_config.json; none: to each route's own defaults",
    )  # fmt: skip
    completions_default_max_tokens: int = flag(
        16, check=at_least(0),
        help="default of max_tokens on /v1/completions if neither the request nor "
        "generation_config.json sets it; 0: as many as fit into the context, as on all other "
        "routes",
    )  # fmt: skip
    output_constraint_mode: str = flag(
        "llguidance", choices=("llguidance", "xgrammar", "none"),
        help="backend for outputs that follow a JSON schema, regular expression or grammar; "
        "xgrammar, as in LightLLM, means llguidance here; none: refuse such requests (LightLLM's "
        "default)",
    )  # fmt: skip
    constraint_time_limit: float = flag(
        5.0, check=above_zero, metavar="SECONDS",
        help="CPU time that a request's constraint may use in total (to compute which tokens the "
        "grammar allows next); a request that exceeds it ends with an error. Looking ahead in the "
        "grammar for draft tokens has a separate limit of half of this",
    )  # fmt: skip
    tool_call_parser: str | None = flag(
        None, choices=tools.FORMATS,
        help="format in which the model writes tool calls; default: detected from its chat "
        "template, else hermes",
    )  # fmt: skip
    reasoning_parser: str | None = flag(
        None, choices=reasoning.FORMATS,
        help="format of the model's reasoning; default: detected from its chat template if it is "
        "unambiguous, else reasoning is not separated from the answer",
    )  # fmt: skip
    disable_dynamic_prompt_cache: bool = flag(False, help="disable the prefix cache")
    disable_shared_prefix_attention: bool = flag(
        False, needs=CACHED,
        help="let each running request read all of its K/V; without this option, decode steps on "
        "CUDA read the K/V of a prefix shared by several requests once if that is faster",
    )  # fmt: skip
    diverse_mode: bool = flag(
        False, needs=CACHED,
        help="for requests with n above 1, compute the prompt only once: the other choices start "
        "when the first one's prompt is in the prefix cache; without this option, all start "
        "together and each may compute the prompt",
    )  # fmt: skip
    token_healing_mode: bool = flag(
        False,
        help="let the model regenerate the last tokens of a text prompt (at most two), so that a "
        "prompt may end in the middle of a word",
    )  # fmt: skip
    speculative: str = flag(
        "none", choices=("none", "ngram"), needs=GENERATES,
        help="ngram: speculative decoding by n-gram lookup, without a draft model; draft tokens "
        "come from earlier text of the same request (as when editing code) or from what a grammar "
        "forces; outputs do not change; drafts are only used when they pay off",
    )  # fmt: skip
    speculative_tokens: int = flag(
        16, check=between(1, 64), needs=GUESSES,
        help="maximum number of draft tokens per request and step",
    )  # fmt: skip
    max_waiting: int = flag(
        1024, check=at_least(1),
        help="maximum number of waiting requests; more are answered 429. While other clients wait, "
        "one client (API key, else address) may only have half of them",
    )  # fmt: skip
