"""Resolves the options for one model on one device.

Does not use torch: values that depend on the model or the device are passed in.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Literal

from asyncllm.config.model import DTYPES
from asyncllm.config.options import Config
from asyncllm.errors import StartupError
from asyncllm.models.kv_format import KvMode

DEFAULT_CHUNK = {"cuda": 4096, "small": 2048, "cpu": 256}
DEFAULT_BATCH = {"cuda": 16384, "small": 4096, "cpu": 1024}
# on a GPU with less memory than this the usual budgets leave an 8B model none for K/V
SMALL_GPU = 36 << 30
SMALL_RUNNING = 256
# English takes 4 bytes per token, Russian written as \uXXXX 18; up to 170,000 tokens the minimum
# size is the limit; parsing times are tested for it
BODY_BYTES_PER_TOKEN = 24
MIN_BODY_SIZE = 4 << 20
GPU_ONLY = ("disable_cudagraph", "disable_symm_mem_allreduce")

Dtype = Literal["fp32", "bf16", "fp16"]
DeviceName = Literal["cpu", "cuda"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ResolvedConfig:
    """What the options mean for one model on one device; ``notes`` and ``warnings`` are for the
    log.

    Attributes:
        max_req_total_len: prompt plus output tokens of one request.
        max_req_input_len: prompt tokens of one request; None: only max_req_total_len applies.
        eos_ids: token ids that end an answer, possibly none.
        model_name: the answer of /get_model_name.
        served_names: names that requests may use; the first is the id in /v1/models.
        generation_config: values of the model's file that are defaults for requests.
        max_body_size: bytes of a request body.
        kv_mode: effective K/V format and decode kernel, by the names of --mode.
        quant: the requested types of weights, as from ``quantisation.to_text``.
        num_slots: KV slots, 0 until ``with_slots`` is called.
    """

    device: DeviceName
    dtype: Dtype
    max_req_total_len: int
    chunked_prefill_size: int
    batch_max_tokens: int
    running_max_req_size: int
    eos_ids: tuple[int, ...]
    model_name: str
    served_names: tuple[str, ...]
    len_is_explicit: bool
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()  # what was explicitly requested but does not apply
    num_slots: int = 0
    generation_config: dict[str, object] = field(default_factory=dict)
    max_body_size: int = MIN_BODY_SIZE
    max_req_input_len: int | None = None
    kv_mode: tuple[str, ...] = ()
    quant: str = ""

    def __post_init__(self) -> None:
        most, total = self.max_req_input_len, self.max_req_total_len
        if most is not None and most >= total:
            raise StartupError(
                f"--max_req_input_len {most:,} must be less than max_req_total_len, {total:,}"
            )

    def with_slots(self, num_slots: int) -> ResolvedConfig:
        """A copy for a KV cache of ``num_slots`` tokens: no request may be longer than that.

        Raises:
            StartupError: no slots at all, or fewer than an explicit --max_req_total_len.
        """
        raises_it = "raise --max_total_token_num or --mem_fraction"
        if num_slots < 2:
            raise StartupError(f"no memory for KV: room for {num_slots} tokens; {raises_it}")
        if self.max_req_total_len <= num_slots:
            return replace(self, num_slots=num_slots)
        if self.len_is_explicit:
            raise StartupError(
                f"--max_req_total_len {self.max_req_total_len:,} is more than the KV cache holds, "
                f"{num_slots:,} tokens; {raises_it}"
            )
        note = (
            f"max_req_total_len lowered from {self.max_req_total_len:,} to {num_slots:,}, "
            f"the KV slots (--max_total_token_num, --mem_fraction)"
        )
        return replace(
            self, num_slots=num_slots, max_req_total_len=num_slots, notes=(*self.notes, note)
        )


def resolve_limits(
    config: Config,
    *,
    device: DeviceName,
    gpu_memory: int | None = None,
    checkpoint_dtype: str,
    model_limit: int,
    model_eos: tuple[int, ...],
    model_dir_names: tuple[str, ...],
    has_experts: bool,
    kv_format: str | None,
) -> ResolvedConfig:
    """Determine the values that depend on the model and the device.

    Args:
        device: the device chosen for ``config.device``.
        gpu_memory: bytes of a GPU; None: there is none, or it is large.
        checkpoint_dtype: as in the checkpoint's config.json, e.g. "bfloat16".
        model_limit: positions the model supports.
        model_eos: end-of-answer ids named by the model.
        model_dir_names: names of the model from its folder or hub id, the preferred one first.
        has_experts: whether it is a mixture-of-experts model.
        kv_format: K/V format that the checkpoint specifies, if any.

    Raises:
        StartupError: an explicit value contradicts the model or another explicit value.
    """
    notes = list(_renamed(config))
    warnings = list(_without_effect(config, device, has_experts))
    length = config.max_req_total_len
    len_is_explicit = "max_req_total_len" in config.explicit
    if length > model_limit:
        (warnings if len_is_explicit else notes).append(
            f"max_req_total_len lowered from {length:,} to {model_limit:,}, the model's limit"
        )
        length = model_limit
    chunk, batch, running = _budgets(config, device, gpu_memory)
    if running < config.running_max_req_size:
        notes.append(f"running_max_req_size is {running:,} on a GPU with less than 36 GiB")
    kv, said = _kv_mode(config, device, kv_format)
    eos_ids = config.eos_id or tuple(dict.fromkeys(model_eos))
    if not eos_ids:
        notes.append("the model names no end token: answers end by length or stop (--eos_id)")
    return ResolvedConfig(
        device=device,
        dtype=_dtype(config.data_type, checkpoint_dtype),
        max_req_total_len=length,
        max_req_input_len=config.max_req_input_len,
        max_body_size=config.max_body_size or max(MIN_BODY_SIZE, BODY_BYTES_PER_TOKEN * length),
        chunked_prefill_size=chunk,
        batch_max_tokens=batch,
        running_max_req_size=running,
        eos_ids=eos_ids,
        model_name=config.model_name,
        served_names=_names(config, model_dir_names),
        len_is_explicit=len_is_explicit,
        notes=(*notes, *said),
        warnings=tuple(warnings),
        kv_mode=kv,
    )


def _names(config: Config, of_folder: tuple[str, ...]) -> tuple[str, ...]:
    """Names that requests may use."""
    names = (*config.served_model_name, config.model_name, *of_folder, "default")
    if not config.served_model_name and "model_name" not in config.explicit:
        names = (*of_folder[:1], config.model_name, "default", *of_folder[1:])
    return tuple(dict.fromkeys(names))


def _kv_mode(
    config: Config, device: DeviceName, wanted: str | None
) -> tuple[tuple[str, ...], list[str]]:
    """The effective format and kernel, and notes about the one that the checkpoint specifies."""
    mode, notes = KvMode.named(config.mode, config.llm_kv_type), list[str]()
    fmt = None if mode.format is None else mode.format.name
    if wanted is not None and wanted != fmt:
        if fmt is None and "llm_kv_type" not in config.explicit:
            fmt = wanted
            if mode.kernel is not None and mode.kernel.halves:
                raise StartupError(
                    f"--mode {mode.kernel.name} does not read {wanted}, the K/V format that the "
                    "checkpoint specifies; --llm_kv_type None keeps K/V in 16 bits"
                )
            notes.append(
                f"K/V are in {wanted}, as the checkpoint specifies; scales are per token, not "
                "those of the checkpoint (--llm_kv_type None: not in 8 bits)"
            )
        else:
            notes.append(
                f"the checkpoint specifies K/V in {wanted}; they are in {fmt or 'its own type'}"
            )
    kernel = mode.kernel.name if mode.kernel is not None and device == "cuda" else None
    return tuple(name for name in (fmt, kernel) if name), notes


def _without_effect(config: Config, device: DeviceName, has_experts: bool) -> Iterator[str]:
    """A line for each option without effect for this device or model, if it has no line yet."""
    for name in GPU_ONLY:
        if device == "cpu" and getattr(config, name) and config.applies(name):
            yield f"--{name} has no effect: it only applies to GPUs, and this is the CPU"
    kernel = KvMode.named(config.mode).kernel
    if device == "cpu" and kernel is not None:
        yield (f"--mode {kernel.name} has no effect: it names a GPU kernel, and this is the CPU")
    if config.enable_ep_moe and config.applies("enable_ep_moe") and not has_experts:
        yield "--enable_ep_moe has no effect: the model has no experts"


def _renamed(config: Config) -> Iterator[str]:
    """A line for each value that is an alias of another."""
    if config.output_constraint_mode == "xgrammar":
        yield "--output_constraint_mode xgrammar: llguidance constrains outputs instead"


def _budgets(config: Config, device: DeviceName, gpu_memory: int | None) -> tuple[int, int, int]:
    """(chunked_prefill_size, batch_max_tokens, running_max_req_size); an explicit value overrides
    the others' defaults."""
    small = gpu_memory is not None and gpu_memory < SMALL_GPU
    kind = "small" if small else device
    chunk, batch = config.chunked_prefill_size, config.batch_max_tokens
    if chunk is not None and batch is not None and batch < chunk:
        raise StartupError(
            f"--batch_max_tokens {batch:,} is less than --chunked_prefill_size {chunk:,}"
        )
    if batch is None:
        batch = max(DEFAULT_BATCH[kind], chunk or 0)
    running = config.running_max_req_size
    if small and "running_max_req_size" not in config.explicit:
        running = min(running, SMALL_RUNNING)
    return (chunk or min(DEFAULT_CHUNK[kind], batch)), batch, running


def _dtype(wanted: str, checkpoint: str) -> Dtype:
    name = checkpoint.removeprefix("torch.") if wanted == "auto" else wanted
    match DTYPES.get(name, name):
        case "fp32" | "bf16" | "fp16" as dtype:
            return dtype
        case _:
            raise StartupError(
                f"checkpoint type {checkpoint} is not supported; use --data_type bf16, fp16 or fp32"
            )
