"""Rotary embeddings of every variant, value by value against transformers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import Gemma3TextConfig, LlamaConfig, Phi3Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.gemma3.modeling_gemma3 import Gemma3RotaryEmbedding
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding

from asyncllm.errors import StartupError
from asyncllm.models.rope import Rope, notes, read_rope
from asyncllm.models.rope_tables import inverse_frequencies, rope_table

HEAD_DIM, TRAINED, LONGEST = 64, 64, 4096
SHAPE = {
    "hidden_size": 256, "num_attention_heads": 4, "num_hidden_layers": 2, "head_dim": HEAD_DIM,
    "max_position_embeddings": LONGEST,
}  # fmt: skip
SHORT = [1.0 + i / 40 for i in range(HEAD_DIM // 2)]
LONG = [1.0 + i * i / 9 for i in range(HEAD_DIM // 2)]
YARN = {"rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": TRAINED}
LONGROPE = {
    "rope_type": "longrope", "short_factor": SHORT, "long_factor": LONG,
    "original_max_position_embeddings": TRAINED,
}  # fmt: skip
VARIANTS: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 3.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.5},
    "llama3": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": TRAINED,
    },
    "yarn": YARN,
    "yarn, factor told": {**YARN, "attention_factor": 0.7},
    "yarn, mscale": {**YARN, "mscale": 0.8, "mscale_all_dim": 0.3},
    "yarn, one mscale": {**YARN, "mscale": 0.8},
    "yarn, betas": {**YARN, "beta_fast": 20.0, "beta_slow": 2.0, "truncate": False},
    "longrope": LONGROPE,
    "longrope, factor": {**LONGROPE, "factor": 32.0},
    "longrope, factor told": {**LONGROPE, "attention_factor": 1.3},
}  # fmt: skip


def read(**given: Any) -> Rope:
    return read_rope({**SHAPE, **given}, HEAD_DIM)


def theirs(module: Any, num_positions: int, *layer_type: str) -> torch.Tensor:
    """cos and sin of transformers, as our table has them: one half of each."""
    like = torch.zeros(1, 1, dtype=torch.float32)
    cos, sin = module(like, torch.arange(num_positions)[None], *layer_type)
    half = cos.shape[-1] // 2
    return torch.cat([cos[0, :, :half], sin[0, :, :half]], dim=-1)


@pytest.mark.parametrize("theta", [10000.0, 5e5])
@pytest.mark.parametrize("variant", VARIANTS)
def test_angles_are_those_of_transformers(variant: str, theta: float) -> None:
    given = {**VARIANTS[variant], "rope_theta": theta}
    config = LlamaConfig(**SHAPE, rope_parameters=dict(given))
    ours = rope_table(read(rope_parameters=given), LONGEST)
    assert torch.equal(ours, theirs(LlamaRotaryEmbedding(config), LONGEST))


@pytest.mark.parametrize("variant", VARIANTS)
def test_spellings_of_transformers_4_say_the_same(variant: str) -> None:
    scaling = dict(VARIANTS[variant])
    new = read(rope_parameters={**scaling, "rope_theta": 7e4})
    old = {**scaling, "type": scaling.pop("rope_type")}
    assert read(rope_theta=7e4, rope_scaling=old | scaling) == new
    assert read(rope_theta=7e4, rope_scaling={**scaling, "rope_type": old["type"]}) == new
    part = read(rope_theta=7e4, rope_scaling=None, partial_rotary_factor=0.5)
    assert part == read(
        rope_parameters={"rope_type": "default", "rope_theta": 7e4, "partial_rotary_factor": 0.5}
    )
    assert part.dim == HEAD_DIM // 2


@pytest.mark.parametrize("variant", ["default", "yarn", "longrope"])
def test_a_part_of_the_head(variant: str) -> None:
    given = {**VARIANTS[variant], "rope_theta": 1e4, "partial_rotary_factor": 0.75}
    if variant == "longrope":
        given |= {"short_factor": SHORT[:24], "long_factor": LONG[:24]}
    ours = rope_table(read(rope_parameters=given), LONGEST)
    module: Any
    if variant == "default":
        module = Phi3RotaryEmbedding(
            Phi3Config(**SHAPE, rope_parameters=dict(given), pad_token_id=0)
        )
    else:  # Phi-3 knows no other; Llama knows no parts
        module = LlamaRotaryEmbedding(LlamaConfig(**SHAPE, rope_parameters=dict(given)))
    assert ours.shape == (LONGEST, 48)
    assert torch.equal(ours, theirs(module, LONGEST))


def test_layers_of_a_type_have_their_own() -> None:
    parameters = {
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
    }
    types = list(parameters)
    config = Gemma3TextConfig(**SHAPE, rope_parameters=parameters, layer_types=types)
    for layer_type in parameters:
        rope = read_rope({**SHAPE, "rope_parameters": parameters}, HEAD_DIM, layer_type)
        module = Gemma3RotaryEmbedding(config)
        assert torch.equal(rope_table(rope, 512), theirs(module, 512, layer_type))


@pytest.mark.parametrize("max_len", [TRAINED, TRAINED + 1, LONGEST, LONGEST + 1, 3 * LONGEST])
@pytest.mark.parametrize("variant", ["dynamic", "longrope"])
def test_angles_that_depend_on_the_length_are_those_of_the_longest(
    variant: str, max_len: int
) -> None:
    given = {**VARIANTS[variant], "rope_theta": 1e4}
    config = LlamaConfig(**SHAPE, rope_parameters=dict(given))
    want, factor = ROPE_INIT_FUNCTIONS[variant](config, seq_len=max_len)
    rope = read(rope_parameters=given)
    assert torch.equal(inverse_frequencies(rope, max_len), want)
    assert rope.attention_factor == factor


def test_what_the_longest_request_decides_is_told() -> None:
    ropes = [read(rope_parameters=given) for given in (LONGROPE, VARIANTS["dynamic"], YARN)]
    assert notes([*ropes, *ropes, None], TRAINED) == [
        "longrope: short factors for all requests, since --max_req_total_len 64 is within 64 "
        "positions",
        "dynamic rope: its own base for all requests, since --max_req_total_len 64 is within "
        "4,096 positions",
    ]
    assert notes(ropes, LONGEST + 1) == [
        "longrope: long factors for all requests, since --max_req_total_len 4,097 is beyond 64 "
        "positions",
        "dynamic rope: a larger base for all requests, since --max_req_total_len 4,097 is beyond "
        "4,096 positions",
    ]


def test_attn_factor_multiplies_what_yarn_multiplies() -> None:
    """In the file of DeepSeek-R1-0528-Qwen3-8B it makes it 1."""
    given = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    rope = read(rope_scaling={**given, "attn_factor": 0.8782488562869419}, rope_theta=1e6)
    assert rope.attention_factor == pytest.approx(1.0, abs=1e-12)
    assert rope.scaling == read(rope_scaling=given, rope_theta=1e6).scaling


def test_positions_before_the_scaling_may_stand_beside_it() -> None:
    """As in Phi-3's files, where they are no part of ``rope_scaling``."""
    scaling = {"type": "longrope", "short_factor": SHORT, "long_factor": LONG}
    inside = read(rope_parameters={**LONGROPE, "rope_theta": 1e4})
    assert read(rope_scaling=scaling, original_max_position_embeddings=TRAINED) == inside


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ({"rope_type": "proportional"}, "rope scaling 'proportional' is not available yet"),
        (
            {"rope_type": "linear", "factor": 0},
            "factor of the rotary embedding is 0: not a positive number",
        ),
        (
            {**YARN, "original_max_position_embeddings": 0},
            "embeddings is 0: not a positive integer",
        ),
        (
            {"rope_type": "dynamic", "factor": 2.0, "partial_rotary_factor": 1 / 32},
            "dynamic rotary embedding wants more than one pair",
        ),
        ({"rope_type": "dynamic"}, "rope scaling 'dynamic' has no 'factor'"),
        ({"rope_type": "llama3", "factor": 2.0}, "rope scaling 'llama3' has no 'low_freq_factor'"),
        ({"rope_type": "longrope"}, "rope scaling 'longrope' has no 'short_factor'"),
        ({**LONGROPE, "long_factor": [1.0]}, "longrope has 32 short and 1 long factors, not 32"),
        ({"partial_rotary_factor": 0.55}, "partial_rotary_factor 0.55 of heads of 64 gives no"),
        ({"partial_rotary_factor": 1.5}, "partial_rotary_factor 1.5 of heads of 64 gives no"),
        ({"mrope_section": [2, 3]}, "rope scaling 'default' with 'mrope_section' is not avail"),
        (
            {**YARN, "attn_factor": 2.0, "attention_factor": 1.0},
            "has both attention_factor and attn",
        ),
        ({**YARN, "attn_factor": 0}, "attn_factor of the rotary embedding is 0: not a positive"),
    ],
    ids=str,
)
def test_what_is_not_there_is_named(given: dict[str, Any], line: str) -> None:
    with pytest.raises(StartupError, match=line):
        read(rope_parameters=given)
