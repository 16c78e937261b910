"""Tiny random checkpoints of every family, and how far our log-probabilities are from those of
transformers. A family more is a row of ``CASES``."""

from __future__ import annotations

import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from asyncllm.core.request import SamplingParams
from asyncllm.engine.device import CpuDevice, CudaDevice
from asyncllm.models.rope import LinearScaling
from asyncllm.models.spec import ModelSpec, QueryGrowth
from tests.models.harness import Driver, Ranks, Sequence, make_device, random_ids

VOCAB, WINDOW = 211, 12
TRAINED, LONGEST = 64, 65  # of angles that depend on the length
SHAPE = {
    "vocab_size": VOCAB, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3,
    "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 16, "rms_norm_eps": 0.05,
    "max_position_embeddings": 1024, "pad_token_id": 0, "initializer_range": 0.35,
}  # fmt: skip


def unchanged(model: PreTrainedModel) -> None:
    """The reference as it is."""


@dataclass(frozen=True)
class Case:
    """A checkpoint of a family.

    Attributes:
        config, model: classes of transformers.
        changes: to ``SHAPE``.
        max_len: the server's longest sequence.
        prepare: changes the reference after it has been saved.
        unseen: fields of the spec that nothing here depends on, with the reason.
    """

    config: str
    model: str
    changes: dict[str, Any] = field(default_factory=dict)
    max_len: int = 1024
    prepare: Callable[[PreTrainedModel], None] = unchanged
    unseen: frozenset[str] = frozenset()


def long_angles(model: PreTrainedModel) -> None:
    """The angles of ``LONGEST`` for every length, as a server for such requests has them."""
    rotary: Any = model.get_decoder().rotary_emb
    kind = model.config.rope_parameters["rope_type"]
    longer, _ = ROPE_INIT_FUNCTIONS[kind](model.config, seq_len=LONGEST)
    rotary.original_inv_freq = longer
    rotary.inv_freq = longer.clone()
    rotary.max_seq_len_cached = LONGEST
    rotary.original_max_seq_len = 0  # dynamic angles are not to change back


LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 32,
}  # fmt: skip
YARN = {
    "rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "beta_fast": 4.0, "beta_slow": 0.3,
    "original_max_position_embeddings": TRAINED,
}  # fmt: skip
LONGROPE = {
    "rope_type": "longrope", "rope_theta": 500.0, "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5],
    "long_factor": [1.5, 2.0, 2.5, 3.0, 4.0, 5.0], "partial_rotary_factor": 0.75,
}  # fmt: skip
PHI3 = {"rope_parameters": LONGROPE, "original_max_position_embeddings": TRAINED}
TYPES = ["sliding_attention", "full_attention", "sliding_attention"]
GEMMA3 = {
    "layer_types": TYPES, "sliding_window": WINDOW, "query_pre_attn_scalar": 8,
    "rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
        "full_attention": {"rope_type": "linear", "rope_theta": 1000.0, "factor": 3.0},
    },
}  # fmt: skip
SIGLIP = {
    "model_type": "siglip_vision_model", "hidden_size": 16, "intermediate_size": 16,
    "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14,
}  # fmt: skip
PIXTRAL = {**SIGLIP, "model_type": "pixtral", "head_dim": 8}
MINISTRAL3 = {
    "rope_parameters": {
        **YARN, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.5,
        "original_max_position_embeddings": 16, "truncate": False,
        "beta_fast": 1.5, "beta_slow": 0.1,
    },
}  # fmt: skip
DEEPSEEK = {
    "num_key_value_heads": 6, "qk_nope_head_dim": 12, "qk_rope_head_dim": 16, "v_head_dim": 12,
    "head_dim": 16, "kv_lora_rank": 24, "q_lora_rank": 20, "first_k_dense_replace": 1,
    "n_routed_experts": 8, "n_shared_experts": 1, "moe_intermediate_size": 24,
    "num_experts_per_tok": 3, "routed_scaling_factor": 1.5,
    "rope_parameters": {**YARN, "mscale": 0.707, "mscale_all_dim": 1.0},
}  # fmt: skip
GROUPS = {"n_group": 4, "topk_group": 2}

MOE = {"num_experts": 7, "num_experts_per_tok": 3, "moe_intermediate_size": 24}
ONE_GROUP = frozenset({"group_score"})  # there is nothing to choose between

CASES = {
    "llama": Case("LlamaConfig", "LlamaForCausalLM", {"rope_parameters": LLAMA3}),
    "llama, biases": Case(
        "LlamaConfig", "LlamaForCausalLM",
        {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True,
         "rope_parameters": YARN},
    ),
    "llama, dynamic": Case(
        "LlamaConfig", "LlamaForCausalLM",
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 500.0, "factor": 40.0},
         "max_position_embeddings": TRAINED},
        max_len=LONGEST, prepare=long_angles,
    ),
    "qwen2": Case("Qwen2Config", "Qwen2ForCausalLM", {"head_dim": 8}),
    "qwen2, windows": Case(
        "Qwen2Config", "Qwen2ForCausalLM",
        {"head_dim": 8, "use_sliding_window": True, "sliding_window": WINDOW,
         "max_window_layers": 1, "tie_word_embeddings": True},
    ),
    "qwen3": Case("Qwen3Config", "Qwen3ForCausalLM"),
    "mistral": Case("MistralConfig", "MistralForCausalLM", {"sliding_window": WINDOW}),
    "mistral, no window": Case("MistralConfig", "MistralForCausalLM", {"sliding_window": None}),
    "ministral": Case(
        "MinistralConfig", "MinistralForCausalLM", {"sliding_window": WINDOW, "layer_types": TYPES}
    ),
    "ministral3": Case("Ministral3Config", "Ministral3ForCausalLM", MINISTRAL3),
    "mistral3 text": Case(
        "Mistral3Config", "Mistral3ForConditionalGeneration",
        {"text_config": {**SHAPE, "model_type": "mistral", "sliding_window": None},
         "vision_config": PIXTRAL, "tie_word_embeddings": False},
    ),
    "ministral3 text": Case(
        "Mistral3Config", "Mistral3ForConditionalGeneration",
        {"text_config": {**SHAPE, **MINISTRAL3, "model_type": "ministral3"},
         "vision_config": PIXTRAL, "tie_word_embeddings": True},
    ),
    "gemma2": Case(
        "Gemma2Config", "Gemma2ForCausalLM",
        {"sliding_window": WINDOW, "query_pre_attn_scalar": 8, "attn_logit_softcapping": 2.0,
         "final_logit_softcapping": 4.0},
    ),
    "gemma3": Case("Gemma3TextConfig", "Gemma3ForCausalLM", GEMMA3),
    "gemma3 text": Case(
        "Gemma3Config", "Gemma3ForConditionalGeneration",
        {"text_config": {**SHAPE, **GEMMA3}, "vision_config": SIGLIP, "mm_tokens_per_image": 4},
    ),
    "phi3": Case(
        "Phi3Config", "Phi3ForCausalLM", {"sliding_window": WINDOW, "hidden_size": 96}
    ),
    "phi3, short": Case(
        "Phi3Config", "Phi3ForCausalLM", {**PHI3, "hidden_size": 96}, max_len=TRAINED,
        unseen=frozenset({"long"}),
    ),
    "phi3, long": Case(
        "Phi3Config", "Phi3ForCausalLM", {**PHI3, "hidden_size": 96}, max_len=LONGEST,
        prepare=long_angles, unseen=frozenset({"short"}),
    ),
    "deepseek v2 lite": Case(
        "DeepseekV2Config", "DeepseekV2ForCausalLM", {**DEEPSEEK, "q_lora_rank": None},
        unseen=frozenset({"group_score"}),
    ),
    "deepseek v2": Case(
        "DeepseekV2Config", "DeepseekV2ForCausalLM",
        {**DEEPSEEK, **GROUPS, "topk_method": "group_limited_greedy", "attention_bias": True},
    ),
    "deepseek v3": Case(
        "DeepseekV3Config", "DeepseekV3ForCausalLM", {**DEEPSEEK, **GROUPS}
    ),
    "mixtral": Case(
        "MixtralConfig", "MixtralForCausalLM",
        {"num_local_experts": 5, "sliding_window": WINDOW, "intermediate_size": 24},
        unseen=ONE_GROUP | {"shared"},
    ),
    "qwen2 moe": Case(
        "Qwen2MoeConfig", "Qwen2MoeForCausalLM",
        {**MOE, "head_dim": 8, "shared_expert_intermediate_size": 33, "mlp_only_layers": [1]},
        unseen=ONE_GROUP,
    ),
    "qwen2 moe, windows": Case(
        "Qwen2MoeConfig", "Qwen2MoeForCausalLM",
        {**MOE, "head_dim": 8, "shared_expert_intermediate_size": 20, "norm_topk_prob": True,
         "use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 2,
         "qkv_bias": False},
        unseen=ONE_GROUP,
    ),
    "qwen3 moe": Case(
        "Qwen3MoeConfig", "Qwen3MoeForCausalLM",
        {**MOE, "norm_topk_prob": True, "decoder_sparse_step": 2, "attention_bias": True},
        unseen=ONE_GROUP | {"shared"},
    ),
}  # fmt: skip


def make(
    case: Case, folder: Path, spread: float = 1.0, dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """Saves a checkpoint with large random weights, and gives the model of transformers in float32.

    Args:
        spread: multiplies weights; as they are the model tells any difference apart, but so does
            rounding: half precision wants less.
        dtype: to which weights are rounded.
    """
    torch.manual_seed(0)
    made = getattr(transformers, case.config)(**{**SHAPE, **case.changes})
    model = getattr(transformers, case.model)._from_config(made, attn_implementation="eager").eval()
    for name, parameter in model.named_parameters():
        with torch.no_grad():
            if name.endswith("norm.weight"):
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
            elif name.endswith("bias"):
                parameter.normal_(std=0.3)
            parameter.copy_((parameter * spread).to(dtype))
    model.save_pretrained(folder)
    case.prepare(model)
    return typing.cast("PreTrainedModel", model)


class Reference:
    """Log-probabilities of transformers."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.scores = cache(lambda ids: self._scores(model, ids))

    def _scores(self, model: PreTrainedModel, ids: tuple[int, ...]) -> Tensor:
        with torch.no_grad():
            return model(input_ids=torch.tensor([ids])).logits[0].float().log_softmax(-1)

    def distance(self, seq: Sequence, start: int = 0) -> float:
        """The largest difference of a log-probability of ``seq``.

        Also by how much its tokens are worse than the best. Prompts count from ``start`` on.
        """
        ids = seq.prompt + seq.outputs
        scores = self.scores(tuple(ids))[:-1]
        want = scores.gather(1, torch.tensor(ids[1:])[:, None])[:, 0][start:]
        got = torch.tensor(seq.prompt_logprobs + seq.logprobs)
        assert got.shape == want.shape
        best = scores[len(seq.prompt) - 1 :].max(-1).values
        worse = best - want[-len(seq.outputs) :]
        return float(torch.cat([(got - want).abs(), worse]).nan_to_num(1e9).max())

    def apart(self, other: Reference) -> float:
        """The largest difference between two, over the prompts of :func:`largest_difference`."""
        found = [0.0]
        for lane, size in enumerate(SIZES):
            ids = random_ids(size, VOCAB, lane)
            after = torch.tensor(ids[1:])[:, None]
            pair = (each.scores(tuple(ids))[:-1].gather(1, after) for each in (self, other))
            found += [float((mine - theirs).abs()) for mine, theirs in zip(*pair, strict=True)]
        return max(found)


SIZES = (1, 2, 45, 31)  # of prompts
PARAMS = SamplingParams(temperature=0.0, logprobs=0, prompt_logprobs=0)


def largest_difference(reference: Reference, device: CpuDevice | CudaDevice | Ranks) -> float:
    """Over prompts of many lengths, whole and in chunks of 16, decoded together, and a prefix hit.

    All are longer than the window, but the first two.
    """
    driver, worst = Driver(device, 1024), []
    for chunk in (1 << 30, 16):
        seqs = [
            Sequence(lane, random_ids(size, VOCAB, lane), PARAMS) for lane, size in enumerate(SIZES)
        ]
        driver.generate(seqs, 8, chunk)
        worst += [reference.distance(seq) for seq in seqs]
    plain = replace(PARAMS, prompt_logprobs=-1)
    hit = Sequence(4, [*seqs[2].prompt[:40], *random_ids(3, VOCAB, 9)], plain)
    hit.slots = seqs[2].slots[:40]
    driver.run([(hit, 3, 40), (seqs[0], 1, 0)])
    driver.generate([hit], 6)
    worst.append(reference.distance(hit, start=len(hit.prompt) - 1))
    return max(worst)


def quick_difference(reference: Reference, device: CpuDevice | CudaDevice | Ranks) -> float:
    """Over one prompt and two tokens after it."""
    seq = Sequence(0, random_ids(45, VOCAB, 2), PARAMS)
    Driver(device, 64).generate([seq], 3)
    return reference.distance(seq)


# what does not change numbers: names for users, limits, what is read before the weights
SAID = frozenset(
    {"architecture", "max_position", "longest", "dtype", "eos_ids", "stored", "ignored", "gguf"}
)
# for what is None
GIVEN: dict[str, Any] = {
    "window": 40, "softcap": 3.0, "logit_softcap": 3.0, "scaling": LinearScaling(1.1, 99), "rope": None,
    "query_growth": QueryGrowth(0.1, 30), "q_rank": 8,
}  # fmt: skip


def perturbed(value: Any, name: str = "", hint: Any = None) -> Iterator[tuple[str, list[Any]]]:
    """(path, makers of other values) of every field of a spec, however deep."""
    if is_dataclass(value):
        hints = typing.get_type_hints(type(value))
        for f in fields(value):
            for path, makers in perturbed(getattr(value, f.name), f.name, hints[f.name]):
                yield (
                    f"{name}.{path}" if name else path,
                    [
                        lambda make=make, f=f: replace(value, **{f.name: make()})  # type: ignore[type-var]
                        for make in makers
                    ],
                )
    elif isinstance(value, tuple) and any(map(is_dataclass, value)):
        for i in sorted({value.index(item) for item in value}):
            for path, makers in perturbed(value[i], f"{name}[{i}]"):
                yield (
                    path,
                    [
                        lambda make=make, i=i: (*value[:i], make(), *value[i + 1 :])
                        for make in makers
                    ],
                )
    elif others := _others(value, name, hint):
        yield name, [lambda other=other: other for other in others]


def _others(value: Any, name: str, hint: Any) -> list[Any]:
    choices = typing.get_args(hint)
    if value is None:
        return [GIVEN[name]] if name in GIVEN else []
    if isinstance(value, bool):
        return [not value]
    if name == "dim":
        return [value - 2]  # pairs
    if name == "trained":
        return [2 * value, value // 2]  # borders that lie between dimensions move with some only
    if isinstance(value, int):
        return [value + 1, value - 1]
    if isinstance(value, float):
        return [value * (2 if name.startswith("beta_") else 1.2) or 0.5]
    if isinstance(value, str):
        return [c for c in choices if c != value] if choices else [value + "x"]
    if isinstance(value, tuple) and value:
        first, *rest = value
        return [(other, *rest) for other in _others(first, name, None)]
    return []


def make_other(folder: Path, case: Case, spec: ModelSpec) -> CpuDevice | CudaDevice:
    """A device that takes the checkpoint for what ``spec`` says."""
    return make_device(
        folder, "fp32", "cpu", num_slots=64, num_lanes=1, max_len=case.max_len, spec=spec
    )
