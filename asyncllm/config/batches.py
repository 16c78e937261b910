"""Options of memory, of what a step takes, and of how requests are answered."""

from __future__ import annotations

from dataclasses import dataclass

from asyncllm.api.parsing import reasoning, tools
from asyncllm.config import roles
from asyncllm.config.flag import Needs, above_zero, at_least, between, flag, unit_interval

CACHED = Needs(
    "the prompt cache, without --disable_dynamic_prompt_cache",
    lambda c: not c.disable_dynamic_prompt_cache,
)
GENERATES = Needs("--run_mode normal or decode", lambda c: c.run_mode in roles.GENERATE)
GUESSES = Needs("--speculative ngram", lambda c: c.speculative == "ngram")


@dataclass(frozen=True, kw_only=True)
class BatchOptions:
    """Memory, steps, the lengths and forms of answers."""

    max_total_token_num: int | None = flag(
        None, check=at_least(1),
        help="KV slots, one per token; default: what fits in --mem_fraction",
    )  # fmt: skip
    mem_fraction: float = flag(
        0.9, check=unit_interval,
        aliases=("gpu-memory-utilization", "mem-fraction-static"),
        help="share of the device memory for weights, work space and KV; lower it if memory runs "
        "out (LightLLM's default is now 0.8)",
    )  # fmt: skip
    batch_max_tokens: int | None = flag(
        None, check=at_least(1),
        help="new tokens of one step over all requests; default: 16384 on CUDA, 1024 on CPU",
    )  # fmt: skip
    chunked_prefill_size: int | None = flag(
        None, check=at_least(1),
        help="new tokens of one request in one step; default: 4096 on CUDA, 256 on CPU",
    )  # fmt: skip
    prefill_share: float = flag(
        1.0, check=lambda x: None if 0 < x <= 1 else "must be above 0 and at most 1",
        help="of a step's time, what prompts may take while others decode; 1: as much as they need",
    )  # fmt: skip
    running_max_req_size: int = flag(
        1000, check=between(1, 65536),
        help="requests that run at the same time (LightLLM's default is now 256)",
    )  # fmt: skip
    max_req_total_len: int = flag(
        16384, check=at_least(2), aliases=("max-model-len", "context-length"),
        help="prompt plus output tokens of one request; lowered to the model's own limit (a given "
        "value with a warning) and, by default, to the KV slots; a given value above those is an "
        "error (LightLLM's default is now the model's limit)",
    )  # fmt: skip
    max_req_input_len: int | None = flag(
        None, check=at_least(1),
        help="prompt tokens of one request, less than --max_req_total_len; default: no limit of "
        "their own (LightLLM has dropped this option)",
    )  # fmt: skip
    long_truncation_mode: str = flag(
        "None", choices=("None", "head", "center"),
        help="what becomes of a prompt that is longer than --max_req_input_len, or that does not fit "
        "beside the max_new_tokens asked for: None: it is refused; head: its first tokens are left "
        "out; center: those in its middle are (LightLLM has dropped this option)",
    )  # fmt: skip
    eos_id: tuple[int, ...] = flag(
        (), nargs="+", check=at_least(0), metavar="ID",
        help="token ids that end an answer, instead of those that config.json, generation_config.json "
        "and the tokenizer's eos_token name",
    )  # fmt: skip
    generation_config: str = flag(
        "auto", choices=("auto", "none"),
        help="auto: where a request is silent, temperature, top_p, top_k, min_p, repetition_penalty, "
        "do_sample and max_new_tokens are those of the model's generation_config.json; none: each "
        "route's own defaults",
    )  # fmt: skip
    completions_default_max_tokens: int = flag(
        16, check=at_least(0),
        help="tokens that /v1/completions generates at most where neither the request nor "
        "generation_config.json says it; 0: what fits into the context, as on all other routes",
    )  # fmt: skip
    output_constraint_mode: str = flag(
        "llguidance", choices=("llguidance", "xgrammar", "none"),
        help="what makes outputs follow a JSON schema, regular expression or grammar; xgrammar, as in "
        "LightLLM, means llguidance here; none: such requests are refused (LightLLM's default)",
    )  # fmt: skip
    constraint_time_limit: float = flag(
        5.0, check=above_zero, metavar="SECONDS",
        help="CPU time that may go into one request's constraint (which tokens does the grammar "
        "allow next?) over its whole life; beyond it the request ends with an error",
    )  # fmt: skip
    tool_call_parser: str | None = flag(
        None, choices=tools.FORMATS,
        help="format in which the model writes tool calls; default: the one that its chat template "
        "shows, hermes where it shows none",
    )  # fmt: skip
    reasoning_parser: str | None = flag(
        None, choices=reasoning.FORMATS,
        help="format of what the model thinks before it answers; default: the one that its chat "
        "template shows for certain, else all is content",
    )  # fmt: skip
    disable_dynamic_prompt_cache: bool = flag(
        False, help="do not reuse the KV of equal prompt beginnings"
    )
    disable_shared_prefix_attention: bool = flag(
        False, needs=CACHED,
        help="each running request reads all of its KV by itself; without it, decode steps on CUDA "
        "read a common beginning once for all that share it, where that saves more than it costs",
    )  # fmt: skip
    diverse_mode: bool = flag(
        False, needs=CACHED,
        help="compute the prompt of a request with n above 1 once: one choice begins, the others "
        "follow when its prompt has been launched; without it they begin together and may each "
        "compute it",
    )  # fmt: skip
    token_healing_mode: bool = flag(
        False,
        help="the last tokens of a text prompt, at most two, are spelled anew by the model, so that "
        "a prompt may end in the middle of a word",
    )  # fmt: skip
    speculative: str = flag(
        "none", choices=("none", "ngram"), needs=GENERATES,
        help="ngram: where a text repeats what is in it or in its prompt, as when code is edited, "
        "its next tokens are guessed and tried together; outputs are the same, and where it does "
        "not pay nothing is guessed",
    )  # fmt: skip
    speculative_tokens: int = flag(
        8, check=between(1, 64), needs=GUESSES,
        help="tokens of one request that are guessed for one step, at most",
    )  # fmt: skip
    max_waiting: int = flag(
        1024, check=at_least(1),
        help="requests that may wait for a place; more are answered 429, and so are those of one "
        "client (API key, else address) beyond half of it while others wait",
    )  # fmt: skip
