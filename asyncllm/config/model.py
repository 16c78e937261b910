"""Options of the model: where it lies, how it is read, stored and computed."""

from __future__ import annotations

from dataclasses import dataclass

from asyncllm.config import quantisation
from asyncllm.config.flag import flag, not_empty
from asyncllm.models.kv_format import DECODE_KERNELS, FORMATS, KV_TYPES

DTYPES = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32"}


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Which model, under which names, with which types and device."""

    model_name: str = flag(
        "default_model_name", check=not_empty,
        help="name that /get_model_name answers and requests may use",
    )  # fmt: skip
    served_model_name: tuple[str, ...] = flag(
        (), nargs="+", check=not_empty, metavar="NAME",
        help="further names that requests may use; the first is the id in /v1/models",
    )  # fmt: skip
    model_dir: str | None = flag(
        None, check=not_empty, aliases=("model-path", "model"), metavar="DIR",
        help="folder with config, safetensors and tokenizer, a GGUF file, or a Hugging Face hub id "
        "such as org/name; without it the embedded SmolLM2-135M-Instruct is served",
    )  # fmt: skip
    tokenizer_mode: str = flag(
        "fast", choices=("slow", "fast", "auto"),
        help="slow: the Python tokenizer, with a warning the Rust one where the model has no other; "
        "fast: the Rust one; auto: fast, else slow",
    )  # fmt: skip
    control_tokens_in_content: str = flag(
        "text", choices=("text", "token"),
        help="what becomes of added tokens, such as those that begin a turn, that users and tools spell in a "
        "chat; text: they are encoded as plain text, so that nobody forges a turn; token: they are "
        "these tokens, as in other servers",
    )  # fmt: skip
    load_way: str = flag(
        "HF", choices=("HF", "DS"),
        help="format of the weights; HF: *.safetensors, else *.bin; DS: layer_XX-model_YY*.pt of "
        "DeepSpeed, Llama only (LightLLM has dropped it)",
    )  # fmt: skip
    trust_remote_code: bool = flag(
        False,
        help="run the model folder's own Python code for the tokenizer, and no other: its model and "
        "configuration files are never run, so that the architecture must be one that is served",
    )  # fmt: skip
    device: str = flag(
        "auto", choices=("auto", "cpu", "cuda"),
        help="where to compute; auto: cuda where there is a GPU",
    )  # fmt: skip
    data_type: str = flag(
        "auto", choices=("auto", *DTYPES.values(), *DTYPES),
        help="type of weights and KV; auto: the checkpoint's",
    )  # fmt: skip
    quant_type: str = flag("none", metavar="TYPE", check=quantisation.complaint,
        help=quantisation.HELP)  # fmt: skip
    quant_cfg: str | None = flag(None, metavar="FILE", help=quantisation.FILE_HELP)


@dataclass(frozen=True, kw_only=True)
class AttentionOptions:
    """The format of K/V, and what computes with them."""

    mode: tuple[str, ...] = flag(
        (), nargs="+", metavar="MODE", choices=(*FORMATS, *DECODE_KERNELS),
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
        "None", choices=tuple(KV_TYPES),
        help="format of K/V by its newer name: int8kv is --mode triton_int8kv, fp8kv --mode "
        "triton_fp8kv; None, if given, is the type of --data_type whatever the checkpoint says",
    )  # fmt: skip
    disable_cudagraph: bool = flag(
        False, help="launch every step kernel by kernel, without CUDA graphs"
    )
