"""Options for the model: where it is, and how it is read, stored and computed."""

from __future__ import annotations

from dataclasses import dataclass

from asyncllm.config import quantisation
from asyncllm.config.flag import flag, not_empty
from asyncllm.models.kv_format import DECODE_KERNELS, FORMATS, KV_TYPES

DTYPES = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32"}


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """The model, its names, types and device."""

    model_name: str = flag(
        "default_model_name", check=not_empty,
        help="name returned by /get_model_name; requests may use it",
    )  # fmt: skip
    served_model_name: tuple[str, ...] = flag(
        (), nargs="+", check=not_empty, metavar="NAME",
        help="more names that requests may use; the first is the id in /v1/models",
    )  # fmt: skip
    model_dir: str | None = flag(
        None, check=not_empty, aliases=("model-path", "model"), metavar="DIR",
        help="folder with config, safetensors and tokenizer, a GGUF file, or a Hugging Face hub id "
        "such as org/name; without it the embedded SmolLM2-135M-Instruct is served",
    )  # fmt: skip
    tokenizer_mode: str = flag(
        "fast", choices=("slow", "fast", "auto"),
        help="slow: the Python tokenizer, or with a warning the Rust one if the model has no "
        "other; fast: the Rust one; auto: fast, else slow",
    )  # fmt: skip
    control_tokens_in_content: str = flag(
        "text", choices=("text", "token"),
        help="how to encode special tokens (such as those that begin a turn) in the content of "
        "users and tools in a chat; text: as plain text, so that nobody can forge a turn; token: "
        "as these tokens, like other servers",
    )  # fmt: skip
    load_way: str = flag(
        "HF", choices=("HF", "DS"),
        help="format of the weights; HF: *.safetensors, else *.bin; DS: layer_XX-model_YY*.pt of "
        "DeepSpeed, Llama only (LightLLM has dropped this option)",
    )  # fmt: skip
    trust_remote_code: bool = flag(
        False,
        help="run the model folder's own Python code for the tokenizer only: its model and "
        "configuration files are never run, so the architecture must be a supported one",
    )  # fmt: skip
    device: str = flag(
        "auto", choices=("auto", "cpu", "cuda"),
        help="device; auto: cuda if there is a GPU",
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
    """The format of K/V, and the decode kernel."""

    mode: tuple[str, ...] = flag(
        (), nargs="+", metavar="MODE", choices=(*FORMATS, *DECODE_KERNELS),
        help="a K/V format, a decode kernel, or both; triton_int8kv: int8, one scale per token and "
        "head; ppl_int8kv: int8, one scale per 8 channels; triton_fp8kv: fp8 (e4m3), one scale per "
        "token and head; ppl_fp16: a kernel for 16-bit K/V only, which does not split the keys of "
        "a request; triton_flashdecoding: splits them; triton_gqa_attention: processes the query "
        "heads of a KV head together; triton_gqa_flashdecoding: both. Default: "
        "K/V in the type of --data_type, or as the checkpoint's kv_cache_scheme says, and the "
        "fastest kernel (LightLLM has dropped this option)",
    )  # fmt: skip
    llm_kv_type: str = flag(
        "None", choices=tuple(KV_TYPES),
        help="the K/V format by its newer name: int8kv is --mode triton_int8kv, fp8kv is --mode "
        "triton_fp8kv; None, if given, is the type of --data_type whatever the checkpoint says",
    )  # fmt: skip
    disable_cudagraph: bool = flag(
        False, help="launch every step kernel by kernel, without CUDA graphs"
    )
