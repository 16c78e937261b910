"""Describes a checkpoint: shapes, attention, rotary embedding, special ids.

The only code that reads Hugging Face attribute names. Does not know tensors.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from asyncllm.errors import StartupError, reason_of
from asyncllm.models.config_numbers import count, number, truth
from asyncllm.models.quant_config import StoredForm, kv_format, stored_form
from asyncllm.models.registry import Family, family
from asyncllm.models.rope import ConfigDict as ConfigDict
from asyncllm.models.rope import Rope, reach, read_rope

Activation = Literal["silu", "gelu_tanh"]

_ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
}
# unsupported keys that change the computation, and the values with which they do not, beside None
_UNSERVED: dict[str, tuple[object, ...]] = {
    "clip_qkv": (0, False),
    "full_attn_mod": (0, 1),
    "interpolate_factor": (0, 1),
    "is_causal": (True,),
    "lm_head_bias": (False,),
    "qk_layernorm": (False,),
    "rope_interleaved": (False,),
    "use_bidirectional_attention": (False,),
}
# with and without "torch." before it
_DTYPE_NAMES = {
    "float32": "fp32",
    "float": "fp32",
    "bfloat16": "bf16",
    "float16": "fp16",
    "half": "fp16",
    "auto": "auto",
}


# prefixes of multimodal models' tensors outside the text part
VISION = (
    "vision_tower.",
    "multi_modal_projector.",
    "model.vision_tower.",
    "model.multi_modal_projector.",
)


@dataclass(frozen=True, slots=True)
class QueryGrowth:
    """The query at position p is multiplied by 1 + beta * log(1 + p // trained)."""

    beta: float
    trained: int


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionSpec:
    """The attention of a layer. Layers with equal specs share their plan of a step."""

    kind: Literal["gqa", "mla"]
    num_q_heads: int
    num_kv_heads: int
    head_dim: int  # of queries and keys
    v_dim: int  # of values
    scale: float  # multiplies q·k
    rope: Rope | None
    window: int | None = None  # tokens that a token sees, including itself; None: all previous ones
    softcap: float | None = None  # scores become softcap * tanh(score / softcap)
    sinks: bool = False  # each head has a learned score that absorbs weight but has no value
    query_growth: QueryGrowth | None = None  # applied by the decoder, not by the backend
    # mla: ranks of the latent that keys and values are computed from (rotary only in a part that
    # all heads share), and of the one for queries, if there is one
    kv_rank: int = 0
    q_rank: int | None = None

    def on(self, heads: HeadShard) -> AttentionSpec:
        """The spec of a rank that has ``heads``."""
        return replace(self, num_q_heads=len(heads.q_heads), num_kv_heads=len(heads.kv_heads))


@dataclass(frozen=True, slots=True, kw_only=True)
class MlpSpec:
    """A gated MLP: down(activation(gate(x)) * up(x))."""

    width: int  # outputs of gate and of up
    bias: bool = False
    activation: Activation = "silu"


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertNames:
    """The checkpoint's names for the linear layers of an expert, and for the shared MLP."""

    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    shared: str = "shared_experts"


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertsSpec:
    """A layer's mixture of experts: gated MLPs, a few of which process each token.

    A token's experts are the ``top_k`` of best score among those of the best groups; their weights
    are their scores without the bias.
    """

    num_experts: int
    top_k: int
    inner: int  # size of an expert
    scoring: Literal["softmax", "sigmoid"] = "softmax"  # of the router's logits, over all experts
    bias: bool = False  # each expert's score gets a learned bias for the selection only
    groups: int = 1  # equal groups of adjacent experts
    top_groups: int = 1  # number of groups that experts are chosen from
    group_score: Literal["max", "top2"] = "max"  # its best expert's score, or the sum of two
    renormalise: bool = False  # weights are divided by their sum
    scale: float = 1.0  # multiplies the weights
    shared_inner: int = 0  # size of the MLP that processes every token; 0: none
    shared_gate: bool = False  # its result is multiplied by a learned sigmoid gate
    activation: Activation = "silu"
    names: ExpertNames = ExpertNames()

    def __post_init__(self) -> None:
        if self.inner < 1 or self.shared_inner < 0:
            raise StartupError(
                f"experts of size {self.inner}, shared ones of {self.shared_inner}: config.json "
                f"asks for what cannot be"
            )
        kept = self.num_experts // max(self.groups, 1) * self.top_groups
        if not (
            0 < self.top_groups <= self.groups
            and self.num_experts % self.groups == 0
            and 0 < self.top_k <= kept
            and (self.group_score == "max" or self.num_experts >= 2 * self.groups)
        ):
            raise StartupError(
                f"{self.top_k} of {self.num_experts} experts from {self.top_groups} of "
                f"{self.groups} groups: config.json asks for what cannot be chosen"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """Shape of a decoder-only transformer."""

    architecture: str
    vocab_size: int
    hidden_size: int
    layers: tuple[AttentionSpec, ...]
    mlps: tuple[MlpSpec | ExpertsSpec, ...]  # of each layer
    rms_eps: float
    max_position: int  # longest sequence, according to config.json
    tie_embeddings: bool
    dtype: str  # of the checkpoint: fp32, bf16 or fp16; auto: config.json leaves it to the weights
    eos_ids: tuple[int, ...]
    stored: StoredForm | None = None  # of quantised linear layers; None: unquantised
    # types of matrices of a GGUF file by their names, of those in few bits
    gguf: tuple[tuple[str, str], ...] = ()
    kv_format: str | None = None  # K/V format that the checkpoint specifies
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: bool = False  # q and k of each head are normed before rotation
    norm_offset: float = 0.0  # norms multiply by this plus their weight
    sandwich_norms: bool = False  # outputs of attention and MLP are normed before they are added
    embed_scale: float = 1.0  # multiplies embeddings
    logit_softcap: float | None = None  # logits become softcap * tanh(logit / softcap)
    mlp_name: str = "mlp"  # of a layer's MLP in the checkpoint
    fused_projections: bool = False  # the checkpoint fuses q, k, v, and gate, up
    prefix: str = "model."  # of the checkpoint's names
    head: str = "lm_head"  # its name for the output matrix
    ignored: tuple[str, ...] = ()  # name prefixes that are not for the decoder

    @property
    def has_experts(self) -> bool:
        """Whether some layers are mixtures of experts."""
        return any(isinstance(mlp, ExpertsSpec) for mlp in self.mlps)

    @property
    def shares_experts(self) -> bool:
        """Whether the groups of --dp share one set of experts; other models are replicated.

        MLA has no K/V heads to divide among ranks, but experts can be divided.
        """
        return self.has_experts and any(layer.kind == "mla" for layer in self.layers)

    @classmethod
    def from_dir(cls, model_dir: Path) -> ModelSpec:
        """Read config.json, generation_config.json for more end tokens, and hf_quant_config.json
        where config.json says nothing of quantisation.

        Raises:
            StartupError: a file or a needed key is missing or broken, or asks for what is not
                supported.
        """
        path = model_dir / "config.json"
        if not path.exists():
            raise StartupError(f"{path} does not exist: --model_dir must hold a model")
        config, more = _read(path), generation_config(model_dir)
        other = model_dir / "hf_quant_config.json"
        if not _quantization(config) and other.exists():
            if not isinstance(said := _read(other).get("quantization"), dict):
                raise StartupError(f"{other} has no object 'quantization'")
            config["quantization_config"] = {"quant_method": "modelopt", **said}
        try:
            return cls.from_hf(config, more)
        except KeyError as error:
            raise StartupError(f"{path} has no {error}") from None
        except (TypeError, ValueError, AttributeError) as error:
            raise StartupError(f"{path} has a value of another type: {error}") from None
        except ArithmeticError as error:
            raise StartupError(f"{path} has a number that cannot be used: {error}") from None

    @classmethod
    def from_hf(cls, hf: ConfigDict, generation: ConfigDict) -> ModelSpec:
        """From the contents of config.json and generation_config.json (transformers 4 and 5)."""
        architecture, served = family(hf.get("architectures"), hf.get("model_type"))
        hf = served.config(hf)
        for name, harmless in _UNSERVED.items():
            if (value := hf.get(name)) is not None and value not in harmless:
                raise StartupError(f"{architecture} with {name} {value!r} is not available yet")
        bias = truth(hf, "attention_bias")
        num_layers = count(hf, "num_hidden_layers")
        mlp = MlpSpec(
            width=count(hf, "intermediate_size"),
            bias=truth(hf, "mlp_bias"),
            activation=_activation(hf),
        )
        quantization = _quantization(hf)
        dtype = hf.get("dtype") or hf.get("torch_dtype") or "auto"
        if (plain := str(dtype).removeprefix("torch.")) not in _DTYPE_NAMES:
            raise StartupError(f"checkpoint dtype {dtype!r} is not available yet")
        spec = cls(
            architecture=architecture,
            vocab_size=count(hf, "vocab_size"),
            hidden_size=count(hf, "hidden_size"),
            layers=_layers(hf),
            mlps=(mlp,) * num_layers,
            rms_eps=number("rms_norm_eps", hf.get("rms_norm_eps", 1e-6), zero=True),
            max_position=count(hf, "max_position_embeddings", 2048, least=2),
            tie_embeddings=truth(hf, "tie_word_embeddings"),
            dtype=_DTYPE_NAMES[plain],
            eos_ids=_eos(hf, generation),
            stored=stored_form(quantization),
            kv_format=kv_format(quantization),
            qkv_bias=bias,
            out_bias=bias,
        )
        spec = served.read(spec, hf)
        _refuse_untaken(spec, hf, served)
        longest = reach((layer.rope for layer in spec.layers), spec.max_position)
        return replace(spec, max_position=longest)


@dataclass(frozen=True, slots=True)
class HeadShard:
    """Heads of one tensor-parallel rank: global indices in local order, -1 for zero padding."""

    q_heads: tuple[int, ...]
    kv_heads: tuple[int, ...]


def shard_heads(spec: AttentionSpec, tp: int, rank: int) -> HeadShard:
    """Assign whole GQA groups to ranks.

    KV heads are replicated where tp is a multiple of them and the query heads of a group divide;
    otherwise the groups are padded with zero groups to a multiple of tp, so that any head count
    works with any tp (9 query and 3 KV heads on 2 ranks: 2 + 2 groups, the last one zero).
    """
    num_kv_heads = spec.num_kv_heads
    group = spec.num_q_heads // num_kv_heads
    copies = tp // num_kv_heads if tp % num_kv_heads == 0 else 1
    if copies > 1 and group % copies == 0:
        kv_head, part = divmod(rank, copies)
        size = group // copies
        first = kv_head * group + part * size
        return HeadShard(tuple(range(first, first + size)), (kv_head,))
    per_rank = -(-num_kv_heads // tp)
    kv_heads = [
        h if h < num_kv_heads else -1 for h in range(rank * per_rank, (rank + 1) * per_rank)
    ]
    q_heads = [h * group + i if h >= 0 else -1 for h in kv_heads for i in range(group)]
    return HeadShard(tuple(q_heads), tuple(kv_heads))


def text_part(hf: ConfigDict, tied: bool) -> ConfigDict:
    """The part of a multimodal model's config.json that describes its text model.

    Args:
        tied: whether embedding and output matrix are the same if nothing is said.
    """
    names = ("dtype", "torch_dtype", "eos_token_id", "quantization_config", "compression_config")
    shared = {name: hf[name] for name in names if hf.get(name) is not None}
    return {
        **hf["text_config"],
        "tie_word_embeddings": hf.get("tie_word_embeddings", tied),
        **shared,
    }


def _layers(hf: ConfigDict) -> tuple[AttentionSpec, ...]:
    """The type of each layer; without layer_types all are of one type."""
    num_layers = count(hf, "num_hidden_layers")
    types = hf.get("layer_types") or ["full_attention"] * num_layers
    if len(types) != num_layers:
        raise StartupError(f"layer_types are {len(types)}, num_hidden_layers is {num_layers}")
    made = {kind: _attention(hf, kind) for kind in dict.fromkeys(types)}
    return tuple(made[kind] for kind in types)


def _attention(hf: ConfigDict, kind: str) -> AttentionSpec:
    if kind not in {"full_attention", "sliding_attention"}:
        raise StartupError(f"layers of type {kind!r} are not available yet")
    slides = kind == "sliding_attention" and hf.get("sliding_window") is not None
    heads = count(hf, "num_attention_heads")
    kv_heads = heads if hf.get("num_key_value_heads") is None else count(hf, "num_key_value_heads")
    if hf.get("head_dim") is None:
        hf = {**hf, "head_dim": count(hf, "hidden_size") // heads}
    head_dim = count(hf, "head_dim")
    if heads % kv_heads:
        raise StartupError(f"{heads} attention heads cannot share {kv_heads} heads of K and V")
    return AttentionSpec(
        kind="gqa",
        num_q_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        v_dim=head_dim,
        scale=head_dim**-0.5,
        rope=read_rope(hf, head_dim, kind),
        window=count(hf, "sliding_window") if slides else None,
    )


def _refuse_untaken(spec: ModelSpec, hf: ConfigDict, served: Family) -> None:
    """Refuses what other architectures have, and transformers does not apply in this one."""
    taken = {
        "attn_logit_softcapping": all(layer.softcap for layer in spec.layers),
        "final_logit_softcapping": spec.logit_softcap,
    }
    for name, cap in taken.items():
        if hf.get(name) and not cap:
            raise StartupError(f"{spec.architecture} with {name} {hf[name]!r} is not available yet")
    for layer in spec.layers:
        turned = layer.head_dim if layer.rope is None else layer.rope.dim
        if layer.kind == "gqa" and turned != layer.head_dim and not served.turns_parts:
            raise StartupError(
                f"{spec.architecture} that turns {turned} of {layer.head_dim} elements of a head "
                f"(partial_rotary_factor) is not available yet"
            )


def optional(hf: ConfigDict, name: str) -> float | None:
    """The number ``name``; None: it is missing or null. Raises StartupError."""
    if hf.get(name) is None:
        return None
    return number(name, hf[name])


def _activation(hf: ConfigDict) -> Activation:
    name = hf.get("hidden_act") or "silu"
    if name not in _ACTIVATIONS:
        raise StartupError(f"hidden_act {name!r} is not available yet")
    return _ACTIVATIONS[name]


def generation_config(model_dir: Path) -> ConfigDict:
    """The contents of generation_config.json; {} if there is none. Raises StartupError."""
    path = model_dir / "generation_config.json"
    return _read(path) if path.exists() else {}


def _read(path: Path) -> ConfigDict:
    try:
        found = json.loads(path.read_bytes())
    except OSError as error:
        raise StartupError(f"{path} cannot be read: {reason_of(error)}") from None
    except (ValueError, RecursionError) as error:
        raise StartupError(f"{path} is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise StartupError(f"{path} holds no JSON object")
    return found


def _quantization(hf: ConfigDict) -> ConfigDict | None:
    return hf.get("quantization_config") or hf.get("compression_config")


def _eos(hf: ConfigDict, generation: ConfigDict) -> tuple[int, ...]:
    """End tokens of both files: chat models name the turn's end only in generation_config.json.

    Ids beyond the vocabulary cannot occur and are left out.
    """
    found: list[int] = []
    for value in (hf.get("eos_token_id"), generation.get("eos_token_id")):
        for token in value if isinstance(value, list) else [value]:
            if token is None:
                continue
            if type(token) is not int or token < 0:
                raise StartupError(f"eos_token_id {token!r} is not a token id (--eos_id)")
            if token < count(hf, "vocab_size"):
                found.append(token)
    return tuple(dict.fromkeys(found))
