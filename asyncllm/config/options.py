"""Every option: names, types, defaults, checks. Knows neither argparse, torch nor any model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from asyncllm.api.parsing import reasoning, tools
from asyncllm.config import quantisation, roles
from asyncllm.config.flag import (
    Flag,
    Needs,
    Single,
    above_zero,
    api_key,
    at_least,
    between,
    flag,
    network,
    not_empty,
    origin,
    unit_interval,
)
from asyncllm.core import balancing, choosing
from asyncllm.errors import StartupError
from asyncllm.models.kv_format import DECODE_KERNELS, FORMATS, KV_TYPES, KvMode

# the chapters of LightLLM's option reference, then our own
BASIC = "Basic configuration"
PD = "Prefill/decode separation"
MODEL = "Model configuration"
MEMORY = "Memory and batch processing"
PARALLEL = "Parallel modes"
ATTENTION = "Attention type"
ACCESS = "Access"
OPERATION = "Operation and logging"
GROUPS = (BASIC, PD, MODEL, MEMORY, PARALLEL, ATTENTION, ACCESS, OPERATION)

DTYPES = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32"}

PORT = between(1, roles.MOST_PORT)
PD_NODE = Needs("--run_mode prefill or decode", lambda c: c.run_mode in roles.NODES)
PD_DECODE = Needs("--run_mode decode", lambda c: c.run_mode == roles.DECODE)
PD_MASTER = Needs("--run_mode pd_master", lambda c: c.run_mode == roles.MASTER)
PD_LISTENS = Needs("--run_mode pd_master or config_server", lambda c: c.run_mode in roles.LISTEN)
PD_MODES = Needs(
    "--run_mode prefill, decode, pd_master or config_server, or --use_config_server_to_init_nccl",
    lambda c: c.run_mode != roles.NORMAL or c.use_config_server_to_init_nccl,
)
NODES = Needs("--nnodes above 1", lambda c: c.nnodes > 1)
SERVERS = Needs(
    "--nnodes above 1, --use_config_server_to_init_nccl, or --run_mode other than normal",
    lambda c: c.nnodes > 1 or c.use_config_server_to_init_nccl or c.run_mode != roles.NORMAL,
)
A_NODE = Needs("--nnodes above 1", lambda c: c.nnodes > 1, vital=True)
CERTIFIED = Needs("--ssl_certfile", lambda c: c.ssl_certfile is not None, vital=True)
KEYLESS = Needs("addresses, without API keys", lambda c: not (c.api_key or c.api_key_file))
CACHED = Needs(
    "the prompt cache, without --disable_dynamic_prompt_cache",
    lambda c: not c.disable_dynamic_prompt_cache,
)
GENERATES = Needs("--run_mode normal or decode", lambda c: c.run_mode in roles.GENERATE)
GUESSES = Needs("--speculative ngram", lambda c: c.speculative == "ngram")
# what may differ between the nodes of one server; the rest decides what it answers
OF_ONE_NODE = frozenset(
    {"host", "port", "node_rank", "api_key_file", "ssl_certfile", "ssl_keyfile", "check",
     "log_level", "log_json", "model_dir", "nccl_host", "nccl_port", "advertise_host",
     "cluster_key_file", "make_cluster_key", "node_timeout"}
)  # fmt: skip
RANKS = Needs("--tp above 1", lambda c: c.tp > 1)
DP_GROUPS = Needs("--dp above 1", lambda c: c.dp > 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """All options of one server, checked; equal in each of its processes.

    Raises:
        StartupError: a value out of range, or one that cannot be honoured in this mode.
    """

    # --- basic
    run_mode: str = flag(
        "normal", group=BASIC, choices=roles.ROLES,
        help="what this process is; normal: a whole server by itself; pd_master: the HTTP API in "
        "front of prefill and decode nodes, which it gives its requests; prefill: computes prompts "
        "and pushes their K/V to decode nodes; decode: goes on from there; config_server: knows all "
        "pd_masters and tells nodes of them; it needs no model",
    )  # fmt: skip
    host: str = flag("127.0.0.1", group=BASIC, help="address to listen on", check=not_empty)
    port: int = flag(8000, group=BASIC, help="port to listen on", check=PORT)
    httpserver_workers: int = flag(
        1, group=BASIC, check=between(1, 256),
        help="processes that serve HTTP, rank 0 included; they share one port",
    )  # fmt: skip
    zmq_mode: str = flag(
        "ipc:///tmp/", group=BASIC, choices=("tcp://", "ipc:///tmp/"),
        help="how processes of this server talk: TCP on loopback, or sockets in a private folder "
        "(mode 0700, one per server) under /tmp",
    )  # fmt: skip
    use_tgi_api: bool = flag(
        False, group=BASIC,
        help="/generate, /generate_stream and / speak text-generation-inference's protocol",
    )  # fmt: skip

    # --- prefill/decode separation
    pd_master_ip: str = flag(
        "0.0.0.0", group=PD, check=not_empty, needs=PD_NODE,
        help="address of the pd_master that this node registers with; 0.0.0.0: this machine",
    )  # fmt: skip
    pd_master_port: int = flag(
        1212, group=PD, check=PORT, needs=PD_NODE, help="HTTP port (--port) of that pd_master"
    )
    cluster_port: int | None = flag(
        None, group=PD, check=PORT, needs=PD_LISTENS,
        help="port on which prefill and decode nodes reach this pd_master, and on which they and "
        "pd_masters reach this config_server; default: --port + 1",
    )  # fmt: skip
    pd_master_mode: str = flag(
        roles.ELASTIC, group=PD, check=roles.fixed_or_elastic, needs=PD_MASTER, metavar="MODE",
        help="elastic: nodes come and go, ready with one of each role; <P>p<D>d, such as 2p1d: "
        "ready with so many prefill and decode nodes, and no more are taken",
    )  # fmt: skip
    select_p_d_node_strategy: str = flag(
        choosing.CACHE_AWARE, group=PD, choices=choosing.STRATEGIES, needs=PD_MASTER,
        help="which nodes get a request; cache_aware: the prefill node that knows most of its "
        "prompt, then the one with the least load, and the decode node with most free K/V; "
        "round_robin: in turn; adaptive_load: by chance, the likelier the more K/V is free; random",
    )  # fmt: skip
    pd_decode_rpyc_port: int = flag(
        42000, group=PD, check=PORT, needs=PD_DECODE,
        help="port on which the first rank of a decode node takes K/V; the others take the ones "
        "behind it. If the default is busy a free one is taken, a given one must be free "
        "(LightLLM has dropped this option)",
    )  # fmt: skip
    pd_trans_mode: str = flag(
        "auto", group=PD, choices=("auto", "nccl", "p2p", "tcp"), needs=PD_NODE,
        help="how K/V travel; tcp: through host memory and encrypted sockets; p2p: a decode node "
        "reads the pages of prefill nodes of the same machine; nccl: from GPU to GPU, not "
        "encrypted; auto: the first of p2p, nccl, tcp that both sides have (on a CPU tcp)",
    )  # fmt: skip
    pd_kv_page_num: int = flag(
        16, group=PD, check=between(2, 4096), needs=PD_NODE,
        help="pages through which K/V travel, on each rank; more are in nobody's memory",
    )  # fmt: skip
    pd_kv_page_size: int = flag(
        256, group=PD, check=between(1, 65536), needs=PD_NODE,
        help="tokens whose K/V a page holds (LightLLM: 1024)",
    )  # fmt: skip
    config_server_host: str | None = flag(
        None, group=PD, check=not_empty, needs=PD_MODES,
        help="address of the config_server that knows all pd_masters: these register there, nodes "
        "take their list from there, instead of --pd_master_ip. On the config_server itself the same "
        "as --host",
    )  # fmt: skip
    config_server_port: int | None = flag(
        None, group=PD, check=PORT, needs=PD_MODES,
        help="HTTP port of that config_server; on the config_server itself the same as --port",
    )  # fmt: skip

    # --- model
    model_name: str = flag(
        "default_model_name", group=MODEL, check=not_empty,
        help="name that /get_model_name answers and requests may use",
    )  # fmt: skip
    served_model_name: tuple[str, ...] = flag(
        (), group=MODEL, nargs="+", check=not_empty, metavar="NAME",
        help="further names that requests may use; the first is the id in /v1/models",
    )  # fmt: skip
    model_dir: str | None = flag(
        None, group=MODEL, check=not_empty, aliases=("model-path", "model"), metavar="DIR",
        help="folder with config, safetensors and tokenizer, a GGUF file, or a Hugging Face hub id "
        "such as org/name; without it the embedded SmolLM2-135M-Instruct is served",
    )  # fmt: skip
    tokenizer_mode: str = flag(
        "fast", group=MODEL, choices=("slow", "fast", "auto"),
        help="slow: the Python tokenizer, with a warning the Rust one where the model has no other; "
        "fast: the Rust one; auto: fast, else slow",
    )  # fmt: skip
    control_tokens_in_content: str = flag(
        "text", group=MODEL, choices=("text", "token"),
        help="what becomes of added tokens, such as those that begin a turn, that users and tools spell in a "
        "chat; text: they are encoded as plain text, so that nobody forges a turn; token: they are "
        "these tokens, as in other servers",
    )  # fmt: skip
    load_way: str = flag(
        "HF", group=MODEL, choices=("HF", "DS"),
        help="format of the weights; HF: *.safetensors, else *.bin; DS: layer_XX-model_YY*.pt of "
        "DeepSpeed, Llama only (LightLLM has dropped it)",
    )  # fmt: skip
    trust_remote_code: bool = flag(
        False, group=MODEL,
        help="run the model folder's own Python code for the tokenizer, and no other: its model and "
        "configuration files are never run, so that the architecture must be one that is served",
    )  # fmt: skip
    device: str = flag(
        "auto", group=MODEL, choices=("auto", "cpu", "cuda"),
        help="where to compute; auto: cuda where there is a GPU",
    )  # fmt: skip
    data_type: str = flag(
        "auto", group=MODEL, choices=("auto", *DTYPES.values(), *DTYPES),
        help="type of weights and KV; auto: the checkpoint's",
    )  # fmt: skip
    quant_type: str = flag("none", group=MODEL, metavar="TYPE", check=quantisation.complaint,
        help=quantisation.HELP)  # fmt: skip
    quant_cfg: str | None = flag(None, group=MODEL, metavar="FILE", help=quantisation.FILE_HELP)

    # --- memory and batches
    max_total_token_num: int | None = flag(
        None, group=MEMORY, check=at_least(1),
        help="KV slots, one per token; default: what fits in --mem_fraction",
    )  # fmt: skip
    mem_fraction: float = flag(
        0.9, group=MEMORY, check=unit_interval,
        aliases=("gpu-memory-utilization", "mem-fraction-static"),
        help="share of the device memory for weights, work space and KV; lower it if memory runs "
        "out (LightLLM's default is now 0.8)",
    )  # fmt: skip
    batch_max_tokens: int | None = flag(
        None, group=MEMORY, check=at_least(1),
        help="new tokens of one step over all requests; default: 16384 on CUDA, 1024 on CPU",
    )  # fmt: skip
    chunked_prefill_size: int | None = flag(
        None, group=MEMORY, check=at_least(1),
        help="new tokens of one request in one step; default: 4096 on CUDA, 256 on CPU",
    )  # fmt: skip
    prefill_share: float = flag(
        1.0, group=MEMORY, check=lambda x: None if 0 < x <= 1 else "must be above 0 and at most 1",
        help="of a step's time, what prompts may take while others decode; 1: as much as they need",
    )  # fmt: skip
    running_max_req_size: int = flag(
        1000, group=MEMORY, check=between(1, 65536),
        help="requests that run at the same time (LightLLM's default is now 256)",
    )  # fmt: skip
    max_req_total_len: int = flag(
        16384, group=MEMORY, check=at_least(2), aliases=("max-model-len", "context-length"),
        help="prompt plus output tokens of one request; lowered to the model's own limit (a given "
        "value with a warning) and, by default, to the KV slots; a given value above those is an "
        "error (LightLLM's default is now the model's limit)",
    )  # fmt: skip
    max_req_input_len: int | None = flag(
        None, group=MEMORY, check=at_least(1),
        help="prompt tokens of one request, less than --max_req_total_len; default: no limit of "
        "their own (LightLLM has dropped this option)",
    )  # fmt: skip
    long_truncation_mode: str = flag(
        "None", group=MEMORY, choices=("None", "head", "center"),
        help="what becomes of a prompt that is longer than --max_req_input_len, or that does not fit "
        "beside the max_new_tokens asked for: None: it is refused; head: its first tokens are left "
        "out; center: those in its middle are (LightLLM has dropped this option)",
    )  # fmt: skip
    eos_id: tuple[int, ...] = flag(
        (), group=MEMORY, nargs="+", check=at_least(0), metavar="ID",
        help="token ids that end an answer, instead of those that config.json, generation_config.json "
        "and the tokenizer's eos_token name",
    )  # fmt: skip
    generation_config: str = flag(
        "auto", group=MEMORY, choices=("auto", "none"),
        help="auto: where a request is silent, temperature, top_p, top_k, min_p, repetition_penalty, "
        "do_sample and max_new_tokens are those of the model's generation_config.json; none: each "
        "route's own defaults",
    )  # fmt: skip
    completions_default_max_tokens: int = flag(
        16, group=MEMORY, check=at_least(0),
        help="tokens that /v1/completions generates at most where neither the request nor "
        "generation_config.json says it; 0: what fits into the context, as on all other routes",
    )  # fmt: skip
    output_constraint_mode: str = flag(
        "llguidance", group=MEMORY, choices=("llguidance", "xgrammar", "none"),
        help="what makes outputs follow a JSON schema, regular expression or grammar; xgrammar, as in "
        "LightLLM, means llguidance here; none: such requests are refused (LightLLM's default)",
    )  # fmt: skip
    constraint_time_limit: float = flag(
        5.0, group=MEMORY, check=above_zero, metavar="SECONDS",
        help="CPU time that may go into one request's constraint (which tokens does the grammar "
        "allow next?) over its whole life; beyond it the request ends with an error",
    )  # fmt: skip
    tool_call_parser: str | None = flag(
        None, group=MEMORY, choices=tools.FORMATS,
        help="format in which the model writes tool calls; default: the one that its chat template "
        "shows, hermes where it shows none",
    )  # fmt: skip
    reasoning_parser: str | None = flag(
        None, group=MEMORY, choices=reasoning.FORMATS,
        help="format of what the model thinks before it answers; default: the one that its chat "
        "template shows for certain, else all is content",
    )  # fmt: skip
    disable_dynamic_prompt_cache: bool = flag(
        False, group=MEMORY, help="do not reuse the KV of equal prompt beginnings"
    )
    disable_shared_prefix_attention: bool = flag(
        False, group=MEMORY, needs=CACHED,
        help="each running request reads all of its KV by itself; without it, decode steps on CUDA "
        "read a common beginning once for all that share it, where that saves more than it costs",
    )  # fmt: skip
    diverse_mode: bool = flag(
        False, group=MEMORY, needs=CACHED,
        help="compute the prompt of a request with n above 1 once: one choice begins, the others "
        "follow when its prompt has been launched; without it they begin together and may each "
        "compute it",
    )  # fmt: skip
    token_healing_mode: bool = flag(
        False, group=MEMORY,
        help="the last tokens of a text prompt, at most two, are spelled anew by the model, so that "
        "a prompt may end in the middle of a word",
    )  # fmt: skip
    speculative: str = flag(
        "none", group=MEMORY, choices=("none", "ngram"), needs=GENERATES,
        help="ngram: where a text repeats what is in it or in its prompt, as when code is edited, "
        "its next tokens are guessed and tried together; outputs are the same, and where it does "
        "not pay nothing is guessed",
    )  # fmt: skip
    speculative_tokens: int = flag(
        8, group=MEMORY, check=between(1, 64), needs=GUESSES,
        help="tokens of one request that are guessed for one step, at most",
    )  # fmt: skip
    max_waiting: int = flag(
        1024, group=MEMORY, check=at_least(1),
        help="requests that may wait for a place; more are answered 429, and so are those of one "
        "client (API key, else address) beyond half of it while others wait",
    )  # fmt: skip

    # --- parallel modes
    nnodes: int = flag(
        1, group=PARALLEL, check=between(1, 1024),
        help="machines (nodes) of this server; each has as many of the --tp ranks, and is started "
        "with the same options but those that are its own",
    )  # fmt: skip
    node_rank: int = flag(
        0, group=PARALLEL, check=at_least(0), needs=A_NODE,
        help="number of this machine; 0 serves HTTP and schedules, the others answer /health and "
        "/metrics only",
    )  # fmt: skip
    multinode_httpmanager_port: int = flag(
        12345, group=PARALLEL, check=PORT, needs=NODES,
        help="port of --nccl_host at which the nodes meet node 0",
    )  # fmt: skip
    multinode_router_gloo_port: int = flag(
        20001, group=PARALLEL, check=PORT, needs=NODES,
        help="port on which rank 0 takes messages; rank r listens on the r-th port after it",
    )  # fmt: skip
    node_timeout: float = flag(
        300.0, group=PARALLEL, check=above_zero, metavar="SECONDS", needs=NODES,
        help="time for all nodes to come; one that is missing ends the start everywhere",
    )  # fmt: skip
    advertise_host: str | None = flag(
        None, group=PARALLEL, check=not_empty, metavar="HOST", needs=SERVERS,
        help="name or address by which other nodes reach this one; default: --nccl_host on node 0, "
        "elsewhere the address from which it reaches that, or its pd_master",
    )  # fmt: skip
    tp: int = flag(
        1, group=PARALLEL, check=between(1, 1024), aliases=("tensor-parallel-size",),
        help="ranks, one process and one GPU each, among which the model is divided (with --dp: "
        "the ranks of all groups together)",
    )  # fmt: skip
    dp: int = flag(
        1, group=PARALLEL, check=between(1, 1024),
        help="data-parallel groups among which the --tp ranks are divided, each with requests, "
        "K/V and scheduling of its own; --tp must be a multiple of it. --max_total_token_num, "
        "--running_max_req_size and --batch_max_tokens count for each group",
    )  # fmt: skip
    dp_balancer: str = flag(
        "cache_aware", group=PARALLEL, choices=balancing.POLICIES, needs=DP_GROUPS,
        help="which group gets a request; cache_aware: the one that knows most of its prompt, "
        "then the one with the least load; bs_balancer: the one with fewest requests; round_robin: in turn "
        "(LightLLM's default is bs_balancer)",
    )  # fmt: skip
    nccl_host: str = flag(
        "127.0.0.1", group=PARALLEL, check=not_empty, needs=RANKS,
        help="address at which the ranks of torch.distributed meet (NCCL, gloo on CPU), with "
        "--nnodes that of node 0; they listen there only, and talk over the network interface that "
        "leads there",
    )  # fmt: skip
    nccl_port: int = flag(
        28765, group=PARALLEL, check=PORT, needs=RANKS,
        help="port at which they meet; if the default is busy a free one is taken, a given one "
        "must be free (LightLLM's default is now a free port)",
    )  # fmt: skip
    use_config_server_to_init_nccl: bool = flag(
        False, group=PARALLEL, needs=RANKS,
        help="the ranks meet at the config_server, which listens for them on --nccl_port; "
        "--nccl_host must be --config_server_host. A port at which those of another server meet is "
        "refused, and their server named",
    )  # fmt: skip
    enable_ep_moe: bool = flag(
        False, group=PARALLEL, needs=RANKS,
        help="models of mixed experts: each rank has some experts whole, as many as the others or "
        "one more, instead of a slice of every one",
    )  # fmt: skip
    disable_symm_mem_allreduce: bool = flag(
        False, group=PARALLEL, needs=RANKS,
        help="add up the ranks' shares through NCCL only, not through memory that they all map",
    )  # fmt: skip

    # --- attention
    mode: tuple[str, ...] = flag(
        (), group=ATTENTION, nargs="+", metavar="MODE", choices=(*FORMATS, *DECODE_KERNELS),
        help="one format of K/V, one decode kernel, or both; triton_int8kv: whole numbers of 8 "
        "bits, a scale for each token and head; ppl_int8kv: a scale for each 8 channels; "
        "triton_fp8kv: floats of 8 bits (e4m3), a scale for each token and head; ppl_fp16: one "
        "pass over K/V in 16 bits, the only kernel that does not read 8; "
        "triton_flashdecoding: keys of a row divided; triton_gqa_attention: the query heads of a "
        "KV head together; triton_gqa_flashdecoding: both. Default: K/V in the type of "
        "--data_type, or as the checkpoint's kv_cache_scheme says, and the fastest kernel "
        "(LightLLM has dropped this option)",
    )  # fmt: skip
    llm_kv_type: str = flag(
        "None", group=ATTENTION, choices=tuple(KV_TYPES),
        help="format of K/V by its newer name: int8kv is --mode triton_int8kv, fp8kv --mode "
        "triton_fp8kv; None, if given, is the type of --data_type whatever the checkpoint says",
    )  # fmt: skip
    disable_cudagraph: bool = flag(
        False, group=ATTENTION, help="launch every step kernel by kernel, without CUDA graphs"
    )

    # --- access
    api_key: tuple[str, ...] = flag(
        (), group=ACCESS, nargs="+", check=api_key, metavar="KEY", secret=True,
        help="keys of which a request must bring one (Authorization: Bearer KEY, or x-api-key), on "
        "every route but /health, /healthz, /liveness and /readiness; command lines are visible to "
        "other users of the machine, --api_key_file and the variable ASYNCLLM_API_KEY are not",
    )  # fmt: skip
    api_key_file: str | None = flag(
        None, group=ACCESS, check=not_empty, metavar="FILE",
        help="further keys, one a line; # begins a comment; a file without a key ends the start",
    )  # fmt: skip
    ssl_certfile: str | None = flag(
        None, group=ACCESS, check=not_empty, metavar="FILE",
        help="serve HTTPS with this certificate chain (PEM)",
    )  # fmt: skip
    ssl_keyfile: str | None = flag(
        None, group=ACCESS, check=not_empty, metavar="FILE", needs=CERTIFIED,
        help="its private key (PEM, not encrypted); default: in the certificate's file",
    )  # fmt: skip
    cluster_key_file: str | None = flag(
        None, group=ACCESS, check=not_empty, metavar="FILE", needs=SERVERS,
        help="secret that all nodes have, without which none is heard; only its owner may read the "
        "file (chmod 600 or 400). Two secrets, one a line, while one replaces the other: node 0 "
        "uses the first, the others try both. Not needed on the loopback interface",
    )  # fmt: skip
    make_cluster_key: str | None = flag(
        None, group=ACCESS, check=not_empty, metavar="FILE",
        help="write a new secret for --cluster_key_file to FILE, which must not exist, and exit",
    )  # fmt: skip
    cors_allow_origins: tuple[str, ...] = flag(
        (), group=ACCESS, nargs="+", check=origin, metavar="ORIGIN",
        help="web origins whose pages may use the API, e.g. https://chat.example.org; *: all; what "
        "pages of others send with POST or DELETE is answered 403",
    )  # fmt: skip
    trust_forwarded_for: tuple[str, ...] = flag(
        (), group=ACCESS, nargs="+", check=network, metavar="ADDRESS", needs=KEYLESS,
        help="addresses or networks of proxies in front of this server: a request that comes from "
        "one belongs to the last address in X-Forwarded-For (or Forwarded) that is not one of "
        "them; clients that wait are served in turn, one address each where there are no API keys",
    )  # fmt: skip
    max_body_size: int | None = flag(
        None, group=ACCESS, check=at_least(1), metavar="BYTES",
        help="longest request body, as sent and decompressed; a longer one is answered 413; default: "
        "24 bytes for each token of --max_req_total_len, at least 4 MiB",
    )  # fmt: skip
    body_timeout: float = flag(
        60.0, group=ACCESS, check=above_zero, metavar="SECONDS",
        help="time that a request body may take to come; a slower one is answered 408",
    )  # fmt: skip
    max_header_size: int = flag(
        8192, group=ACCESS, check=between(1, 1 << 20), metavar="BYTES",
        help="longest request line and longest header; a longer one is answered 431",
    )  # fmt: skip
    max_headers: int = flag(
        128, group=ACCESS, check=between(1, 4096),
        help="headers of one request; more are answered 431",
    )  # fmt: skip
    keep_alive_timeout: float = flag(
        75.0, group=ACCESS, check=above_zero, metavar="SECONDS",
        help="a connection without a request for this long is closed",
    )  # fmt: skip
    sse_keep_alive: float = flag(
        15.0, group=ACCESS, check=at_least(0), metavar="SECONDS",
        help="a stream with nothing to send for this long gets a comment, so that proxies keep it "
        "open; 0: never. LightLLM's own routes do so only if it is given: some of their clients know "
        "no comments",
    )  # fmt: skip

    # --- operation
    check: bool = flag(
        False, group=OPERATION,
        help="print resolved configuration, memory plan and ports, then exit 0; with --nnodes on all "
        "nodes at once: try the ways between them as well",
    )  # fmt: skip
    drain_timeout: float = flag(
        30.0, group=OPERATION, check=at_least(0), metavar="SECONDS",
        help="time that running requests get after SIGTERM; a second SIGTERM ends at once",
    )  # fmt: skip
    step_timeout: float = flag(
        120.0, group=OPERATION, check=above_zero, metavar="SECONDS",
        help="a step that takes longer is a hang: stacks are dumped, exit code 70",
    )  # fmt: skip
    dead_after: float = flag(
        10.0, group=OPERATION, check=at_least(0.5), metavar="SECONDS",
        help="a process of this server that is silent for longer is lost: a rank ends the server, or "
        "only its group (--dp), an HTTP worker is replaced",
    )  # fmt: skip
    log_level: str = flag(
        "info", group=OPERATION, choices=("debug", "info", "warning", "error"),
        help="least severity that is logged",
    )  # fmt: skip
    log_json: bool = flag(False, group=OPERATION, help="log one JSON object per line")

    # not flags: names of the options that were given, and a line about each that cannot matter
    explicit: frozenset[str] = frozenset()
    warnings: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, same in roles.second_names(self):
            own, given = getattr(self, name), name in self.explicit
            if own != same and (given or own != FLAGS[name].default):
                raise StartupError(
                    f"--{name} {own} and --config_server_{name} {same}: with --run_mode "
                    f"{self.run_mode} they mean the same; give one"
                )
            object.__setattr__(self, name, same)
        values = {name: getattr(self, name) for name in FLAGS}
        changed = {name for name, value in values.items() if value != FLAGS[name].default}
        object.__setattr__(self, "explicit", self.explicit | changed)
        for name, value in values.items():
            if (wrong := FLAGS[name].complaint(value)) is not None:
                raise StartupError(f"--{name} {wrong}")
        if (wrong := roles.indivisible(self) or roles.refusal(self)) is not None:
            raise StartupError(wrong)
        KvMode.named(self.mode, self.llm_kv_type)
        warnings = [line for name in sorted(changed) for line in self._moot(name, values[name])]
        warnings += roles.unused(self)
        object.__setattr__(self, "warnings", tuple(dict.fromkeys((*self.warnings, *warnings))))

    def _moot(self, name: str, value: Single | tuple[Single, ...]) -> Iterator[str]:
        """A line if this option cannot matter. Raises StartupError where it cannot be honoured."""
        option, given = FLAGS[name], _as_typed(name, value)
        needs = option.needs
        if needs is not None and not needs.met(self):
            line = f"{given} has no effect: it counts with {needs.text}"
            if needs.vital:
                raise StartupError(line)
            yield line

    def digest(self) -> str:
        """Hash of the options that all processes of one server must share."""
        shared = {name: getattr(self, name) for name in FLAGS if name not in OF_ONE_NODE}
        return _hash(shared)[:12]

    def shared(self) -> tuple[tuple[str, str], ...]:
        """(name, value) of those options; a secret value is shortened so that it cannot be
        guessed."""
        values = {name: getattr(self, name) for name in FLAGS if name not in OF_ONE_NODE}
        return tuple(
            (name, f"hidden ({_hash(value)[:4]})" if FLAGS[name].secret else json.dumps(value))
            for name, value in values.items()
        )

    def to_json(self) -> str:
        """All fields as one line, for a child process."""
        return json.dumps(asdict(self), default=sorted)

    @classmethod
    def from_json(cls, text: str) -> Config:
        """The inverse of ``to_json``; ``Config.from_json(c.to_json()) == c``."""
        loaded: dict[str, Any] = json.loads(text)
        explicit = frozenset(loaded.pop("explicit"))
        values: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in loaded.items()
        }
        return cls(**values, explicit=explicit)


def _hash(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _as_typed(name: str, value: object) -> str:
    """``--tp 2``, ``--mode a b``, ``--check``: the option as one would type it."""
    if value is True:
        return f"--{name}"
    return f"--{name} {' '.join(map(str, value)) if isinstance(value, tuple) else value}"


def _flags() -> dict[str, Flag]:
    """The options of ``Config`` by field name, each with its name and element type filled in."""
    kinds = {"int": int, "float": float, "str": str, "bool": bool}
    found = {}
    for item in fields(Config):
        if "flag" in item.metadata:
            base = str(item.type).removesuffix(" | None")
            base = base.removeprefix("tuple[").removesuffix(", ...]")
            found[item.name] = replace(item.metadata["flag"], name=item.name, kind=kinds[base])
    return found


FLAGS = _flags()
