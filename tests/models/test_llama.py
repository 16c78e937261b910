"""The decoder against transformers, on tiny random models: every shape of step, token by token."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from asyncllm.core.request import SamplingParams
from asyncllm.engine.build import build_model
from asyncllm.engine.parallel import SingleRank
from asyncllm.models.llama import Decoder
from asyncllm.models.spec import ModelSpec
from tests.models.harness import Driver, Ranks, Sequence, make_device, random_ids

VOCAB = 499


def make_config(**changes: object) -> LlamaConfig:
    return LlamaConfig(**{  # type: ignore[arg-type]
        "architectures": ["LlamaForCausalLM"], "vocab_size": VOCAB,
        "hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": 3,
        "num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 4096,
        "initializer_range": 0.3, **changes,
    })  # fmt: skip


def make_checkpoint(path: Path, **changes: object) -> LlamaForCausalLM:
    torch.manual_seed(0)
    model = LlamaForCausalLM(make_config(**changes)).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(path)
    return model


def expected_logprobs(model: PreTrainedModel, ids: list[int]) -> torch.Tensor:
    """[len(ids) - 1]: log-probability of each token but the first."""
    with torch.no_grad():
        scores = model(torch.tensor([ids])).logits[0].float().log_softmax(-1)
    return scores[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]


# (device, how close log-probabilities are): float32 products of Triton are tf32
DEVICES = [("cpu", 2e-4), pytest.param(("cuda", 3e-2), marks=pytest.mark.gpu)]

VARIANTS = {
    "gqa": {},
    "mha": {"num_key_value_heads": 6},
    "tied": {"tie_word_embeddings": True},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "head_dim": {"head_dim": 32},
    "llama3_rope": {
        "rope_theta": 500000.0,
        "rope_scaling": {
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    },
    "linear_rope": {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
}  # fmt: skip


def check_against(reference: PreTrainedModel, driver: Driver, chunk: int, close: float) -> None:
    """Prompts of many lengths, whole or in chunks, then decoded together, token by token."""
    params = SamplingParams(temperature=0.0, logprobs=0, prompt_logprobs=0)
    seqs = [
        Sequence(lane, random_ids(size, VOCAB, lane), params)
        for lane, size in enumerate((1, 2, 97, 31))
    ]
    driver.generate(seqs, 12, chunk)
    for seq in seqs:
        want = expected_logprobs(reference, seq.prompt + seq.outputs)
        got = torch.tensor(seq.prompt_logprobs + seq.logprobs)
        torch.testing.assert_close(got, want, atol=close, rtol=1e-4)
        with torch.no_grad():
            logits = reference(torch.tensor([seq.prompt + seq.outputs])).logits[0]
        scores = logits[len(seq.prompt) - 1 : -1].log_softmax(-1)
        chosen = scores.gather(1, torch.tensor(seq.outputs)[:, None])[:, 0]
        assert (scores.max(-1).values - chosen).max() <= close  # the best, or a near-tie


@pytest.mark.parametrize("device", DEVICES, ids=["cpu", "cuda"])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("chunk", [1000, 7], ids=["whole", "chunked"])
def test_matches_transformers(
    tmp_path: Path, variant: str, chunk: int, device: tuple[str, float]
) -> None:
    reference = make_checkpoint(tmp_path, **VARIANTS[variant])
    where, close = device
    check_against(reference, Driver(make_device(tmp_path, "fp32", where), 1024), chunk, close)


@pytest.mark.parametrize("variant", ["gqa", "tied", "biases"])
def test_two_ranks_match_transformers(tmp_path: Path, variant: str) -> None:
    reference = make_checkpoint(tmp_path, **VARIANTS[variant])
    check_against(reference, Driver(Ranks(tmp_path, 2), 1024), 7, 2e-4)


@pytest.mark.parametrize("device", DEVICES, ids=["cpu", "cuda"])
def test_cached_prefix_gives_the_same_tokens(tmp_path: Path, device: tuple[str, float]) -> None:
    make_checkpoint(tmp_path)
    driver = Driver(make_device(tmp_path, "fp32", device[0]), 1024)
    prompt = random_ids(50, VOCAB, 1)
    first, second = Sequence(0, prompt), Sequence(1, prompt)
    driver.generate([first], 8)
    second.slots = first.slots[:40]
    driver.run([(second, 10, 40)])
    driver.generate([second], 8)
    assert second.outputs == first.outputs


@pytest.mark.parametrize("device", DEVICES, ids=["cpu", "cuda"])
def test_penalties_see_a_cached_prefix(tmp_path: Path, device: tuple[str, float]) -> None:
    make_checkpoint(tmp_path)
    driver = Driver(make_device(tmp_path, "fp32", device[0]), 1024)
    params = SamplingParams(temperature=0.0, repetition_penalty=50.0, penalize_prompt=True)
    unseen = set(range(100, 160))
    prompt = [i for i in range(VOCAB) if i not in unseen]
    first, second = Sequence(3, prompt, params), Sequence(1, prompt, params)
    driver.generate([first], 8)
    second.slots = first.slots[:400]
    driver.run([(second, len(prompt) - 400, 400)])
    driver.generate([second], 8)
    assert second.outputs == first.outputs
    assert set(first.outputs) <= unseen


@pytest.mark.parametrize("device", DEVICES, ids=["cpu", "cuda"])
def test_prefill_and_decode_share_a_step(tmp_path: Path, device: tuple[str, float]) -> None:
    make_checkpoint(tmp_path)
    driver = Driver(make_device(tmp_path, "fp32", device[0]), 1024)
    alone = Sequence(0, random_ids(20, VOCAB, 1))
    driver.generate([alone], 6)
    a, b = Sequence(1, random_ids(20, VOCAB, 1)), Sequence(2, random_ids(33, VOCAB, 2))
    driver.run([(a, 20, 0)])
    driver.run([(a, 1, 0), (b, 20, 0)])
    driver.run([(a, 1, 0), (b, 13, 0)])
    driver.generate([a, b], 4)
    assert a.outputs == alone.outputs


@pytest.mark.parametrize("device", DEVICES, ids=["cpu", "cuda"])
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_half_precision_is_close(tmp_path: Path, dtype: str, device: tuple[str, float]) -> None:
    reference = make_checkpoint(tmp_path, initializer_range=0.05)
    driver = Driver(make_device(tmp_path, dtype, device[0]), 256)
    params = SamplingParams(temperature=0.0, logprobs=0, prompt_logprobs=0)
    seq = Sequence(0, random_ids(60, VOCAB, 3), params)
    driver.generate([seq], 4)
    want = expected_logprobs(reference, seq.prompt + seq.outputs)
    torch.testing.assert_close(
        torch.tensor(seq.prompt_logprobs + seq.logprobs), want, atol=0.1, rtol=0.02
    )


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_a_launch_never_waits_for_the_device(tmp_path: Path) -> None:
    """Prefill, mixed and decode steps with every sampling feature, in sync debug mode "error"."""
    make_checkpoint(tmp_path)
    device = make_device(tmp_path, "bf16", "cuda")
    params = SamplingParams(
        temperature=0.8, top_p=0.9, top_k=20, min_p=0.01, logprobs=3, repetition_penalty=1.2,
        frequency_penalty=0.1, min_new_tokens=4, logit_bias=((3, 1.0),), prompt_logprobs=2,
    )  # fmt: skip
    for turn in range(2):  # the first compiles
        driver = Driver(device, 1024)
        a, b = (Sequence(lane, random_ids(40, VOCAB, lane), params) for lane in (0, 1))
        driver.run([(a, 40, 0)])
        torch.cuda.set_sync_debug_mode("error" if turn else "default")
        try:
            driver.run([(a, 1, 0), (b, 40, 0)])
            driver.run([(a, 1, 0), (b, 1, 0)])
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert len(a.outputs) == 3


@pytest.mark.parametrize("where", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("tied", [False, True])
def test_logits_are_never_rounded_to_the_weights_dtype(
    tmp_path: Path, dtype: str, where: str, tied: bool
) -> None:
    make_checkpoint(tmp_path, tie_word_embeddings=tied, vocab_size=9001)
    device = torch.device(where)
    spec = ModelSpec.from_dir(tmp_path)
    model = build_model(tmp_path, spec, SingleRank(), dtype=dtype, device=device, max_len=64)
    assert isinstance(model, Decoder)
    head = model.embedding.head
    matrix = head.to_dense() if head.is_mkldnn else head
    for rows in (1, 5):
        hidden = torch.randn(rows, 96, device=device).to(model.site.dtype)
        with torch.inference_mode():
            got = model.logits(hidden)
        assert got.dtype == torch.float32
        want = hidden.double() @ matrix.double().t()
        close = 1e-2 if dtype == "fp32" and where == "cuda" else 3e-5  # tf32
        torch.testing.assert_close(got.double(), want, atol=close, rtol=close)
