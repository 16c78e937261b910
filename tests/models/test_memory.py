"""The memory plan against what is really allocated."""

from __future__ import annotations

import json
import weakref
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from asyncllm.core.request import SamplingParams
from asyncllm.core.windows import NO_SLOTS, PerSpace, Window
from asyncllm.engine.attention_cpu import TorchAttention
from asyncllm.engine.build import (
    CPU_KV_BYTES,
    MemoryPlan,
    Sizes,
    build_model,
    drop_idle_windows,
    make_model,
    model_on_paper,
    plan_memory,
    warm_up,
    work_bytes,
)
from asyncllm.engine.device import CpuDevice
from asyncllm.engine.engine import Engine, Outputs, PreparedStep
from asyncllm.engine.parallel import SingleRank
from asyncllm.errors import StartupError
from asyncllm.models import weights
from asyncllm.models.llama import Decoder
from asyncllm.models.quantization import AS_STORED, WeightTypes
from asyncllm.models.quantize import quantize_blocks
from asyncllm.models.spec import ExpertsSpec, ModelSpec
from asyncllm.models.tensors import Index, OpenFiles, TensorSource
from tests.conftest import TINY_EXPERTS
from tests.models.families import CASES, WINDOW, make
from tests.models.harness import Driver, Sequence, build, random_ids, read_spec
from tests.models.test_llama import VARIANTS, make_checkpoint, make_config

CPU = torch.device("cpu")


def sizes(**changes: Any) -> Sizes:
    given: dict[str, Any] = {
        "tp": 1, "ranks": 1, "dtype": "fp32", "max_len": 256, "num_lanes": 8,
        "batch_max_tokens": 512, "mem_fraction": 0.5, "max_total_token_num": 1000,
    }  # fmt: skip
    return Sizes(**{**given, **changes})


def num_bytes(tensors: Iterable[Tensor]) -> int:
    """Of the storages of ``tensors``, each once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


class Peak(TorchDispatchMode):
    """The most bytes that tensors made inside held at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.most = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        before = {_storage(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and _storage(leaf) not in before | self._known:
                self._take(leaf.untyped_storage())
        return out

    def _take(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        self._known.add(key)
        self.live += size
        self.most = max(self.most, self.live)
        weakref.finalize(storage, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def tensors_of(model: object) -> list[Tensor]:
    """Whatever the decoder and its blocks, or a part of them, hold."""
    found, seen, todo = [], set(), [model]
    while todo:
        thing = todo.pop()
        if id(thing) in seen:
            continue
        seen.add(id(thing))
        if isinstance(thing, Tensor):
            found.append(thing)
        elif isinstance(thing, dict | list | tuple):
            todo += thing.values() if isinstance(thing, dict) else thing
        elif type(thing).__module__.startswith("asyncllm.models."):
            slots = getattr(type(thing), "__slots__", ())
            todo += vars(thing).values() if hasattr(thing, "__dict__") else []
            todo += [getattr(thing, name) for name in slots]
    return found


class Ranked(SingleRank):
    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size


SHAPES = {**VARIANTS, "uneven": {"num_key_value_heads": 3, "vocab_size": 501}}


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("variant", SHAPES)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_planned_weights_and_kv_are_what_every_rank_allocates(
    variant: str, tp: int, dtype: str
) -> None:
    spec = ModelSpec.from_hf(make_config(**SHAPES[variant]).to_dict(), {})
    plan = plan_memory(spec, sizes(tp=tp, ranks=tp, dtype=dtype), CPU)
    for rank in range(tp):
        model = make_model(spec, Ranked(rank, tp), dtype=dtype, device=CPU, max_len=256, where=CPU)
        assert isinstance(model, Decoder)
        assert num_bytes(tensors_of(model)) == model.nbytes == plan.weights
        attention = model.site.attention
        assert isinstance(attention, TorchAttention)
        assert num_bytes(attention.angles.values()) == attention.nbytes
        kv = attention.layout.allocate(PerSpace(plan.num.full + 1, plan.num.sliding + 1), CPU)
        assert num_bytes(tensor for layer in kv for tensor in layer) == plan.kv
        targets = num_bytes(target.param for _, target in model.targets())
        assert targets == model.nbytes, "every parameter is loaded from somewhere"


@pytest.mark.parametrize("whole", [False, True])
def test_groups_that_share_experts_plan_their_part_of_these(whole: bool) -> None:
    """Everything else they hold whole, and steps need room for the tokens of both."""
    spec = ModelSpec.from_hf(TINY_EXPERTS, {})
    apart = plan_memory(spec, sizes(ranks=2), CPU)
    plan = plan_memory(spec, sizes(ranks=2, world=2, whole_experts=whole), CPU)
    for rank in range(2):
        model = make_model(
            spec, SingleRank(), world=Ranked(rank, 2), dtype="fp32", device=CPU, max_len=256, where=CPU,
            whole_experts=whole,
        )  # fmt: skip
        assert isinstance(model, Decoder)
        assert num_bytes(tensors_of(model)) == model.nbytes == plan.weights
    experts, hidden, inner = 2 * 6 * 3 + 2 * 3, 64, 40  # of two layers, the shared ones among them
    kept = 0.5 * experts * hidden * inner * 4
    assert apart.weights - plan.weights == kept
    meta = torch.device("meta")
    alone = make_model(spec, SingleRank(), dtype="fp32", device=CPU, max_len=256, where=meta)
    assert isinstance(alone, Decoder)
    assert model.blocks[1].mlp.width > alone.blocks[1].mlp.width
    assert plan.division == apart.division


@pytest.mark.parametrize("whole", [False, True], ids=["cut", "whole"])
@pytest.mark.parametrize("tp", [1, 2, 3, 8])
@pytest.mark.parametrize("kind", ["fp8w8a8", "fp8w8a8-b128"])
def test_planned_experts_in_8_bits_are_what_every_rank_allocates(
    tp: int, whole: bool, kind: str
) -> None:
    experts, asked = ExpertsSpec(num_experts=7, top_k=2, inner=300), WeightTypes(kind)
    spec = ModelSpec.from_hf(make_config().to_dict(), {})
    spec = replace(spec, mlps=(experts,) * len(spec.mlps))
    options: dict[str, Any] = {"dtype": "bf16", "whole_experts": whole, "asked": asked}
    plan = plan_memory(spec, sizes(tp=tp, ranks=tp, **options), CPU)
    for rank in range(tp):
        model = make_model(spec, Ranked(rank, tp), device=CPU, max_len=256, where=CPU, **options)
        assert model.nbytes == plan.weights
        for block in model.blocks:
            stacks = block.mlp._held.gate_up, block.mlp._held.down
            held = sum(tensor.nbytes for s in stacks for tensor in (s.data, s.scales))
            assert 0 <= block.mlp.nbytes - held <= 2 * 7 * spec.hidden_size, "the router"


@pytest.mark.parametrize("whole", [False, True], ids=["cut", "whole"])
@pytest.mark.parametrize("tp", [1, 2, 3, 8])
def test_planned_weights_of_experts_are_what_every_rank_allocates(tp: int, whole: bool) -> None:
    experts = ExpertsSpec(
        num_experts=7, top_k=2, inner=13, bias=True, shared_inner=9, shared_gate=True
    )
    spec = ModelSpec.from_hf(make_config().to_dict(), {})
    spec = replace(spec, mlps=(spec.mlps[0], *[experts] * (len(spec.mlps) - 1)))
    plan = plan_memory(spec, sizes(tp=tp, ranks=tp, dtype="bf16", whole_experts=whole), CPU)
    for rank in range(tp):
        model = make_model(
            spec, Ranked(rank, tp), dtype="bf16", device=CPU, max_len=256, where=CPU,
            whole_experts=whole,
        )  # fmt: skip
        targets = num_bytes(target.param for _, target in model.targets())
        assert num_bytes(tensors_of(model)) == targets == model.nbytes == plan.weights


def test_a_model_without_memory_has_none(tmp_path: Path) -> None:
    spec = ModelSpec.from_hf(make_config(vocab_size=1 << 22, hidden_size=6 << 18).to_dict(), {})
    model = make_model(
        spec, SingleRank(), dtype="bf16", device=CPU, max_len=64, where=torch.device("meta")
    )
    assert model.nbytes > 1 << 44


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=0.0),
        SamplingParams(temperature=0.8, top_p=0.9, logprobs=2),
        SamplingParams(temperature=0.8, repetition_penalty=1.2, logprobs=0),
    ],
    ids=["greedy", "truncates", "penalises"],
)
@pytest.mark.parametrize("changes", [{}, {"intermediate_size": 64}, {"vocab_size": 9001}], ids=str)
def test_a_full_step_takes_no_more_than_was_planned(
    tmp_path: Path, changes: dict[str, int], params: SamplingParams
) -> None:
    make_checkpoint(tmp_path, **changes)
    check_full_step(tmp_path, "fp32", params)


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])  # bf16 is packed in a form nobody can measure
@pytest.mark.parametrize(
    "family",
    [
        *["qwen3", "mistral", "ministral3", "gemma3", "phi3, long"],
        *["deepseek v2 lite", "deepseek v3"],
    ],
)
def test_a_full_step_of_every_family_takes_no_more_than_was_planned(
    tmp_path: Path, family: str, dtype: str
) -> None:
    make(CASES[family], tmp_path)
    check_full_step(tmp_path, dtype, SamplingParams(temperature=0.0))


def check_full_step(folder: Path, dtype: str, params: SamplingParams) -> None:
    """What a full step and one of decoding take, against the plan."""
    spec = ModelSpec.from_dir(folder)
    plan = plan_memory(spec, sizes(dtype=dtype), CPU)
    engine = Engine(
        build(folder, spec, dtype, CPU, 256),
        SingleRank(), num_slots=plan.num.full, num_lanes=8, max_len=256, eos_ids=(),
    )  # fmt: skip
    watch_a_full_step(engine, plan, params)


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
@pytest.mark.parametrize("kind", ["fp8w8a8", "fp8w8a8-b128", "w8a8"])
def test_a_full_step_in_8_bits_takes_no_more_than_was_planned(
    tmp_path: Path, kind: str, dtype: str
) -> None:
    """Rows in 8 bits and widened parts of weights included, which the plan without them lacks."""
    make_checkpoint(tmp_path)
    spec, asked = ModelSpec.from_dir(tmp_path), WeightTypes(kind)
    plan = plan_memory(spec, sizes(dtype=dtype, asked=asked), CPU)
    model = build_model(
        tmp_path, spec, SingleRank(), dtype=dtype, device=CPU, max_len=256, asked=asked
    )
    assert isinstance(model, Decoder)
    products = [part.product_bytes(512) for b in model.blocks for part in (b.attention, b.mlp)]
    engine = Engine(
        model, SingleRank(), num_slots=plan.num.full, num_lanes=8, max_len=256, eos_ids=()
    )
    watch_a_full_step(engine, plan, SamplingParams(temperature=0.0), max(products))


@pytest.mark.parametrize("kind", [None, "fp8w8a8", "fp8w8a8-b128", "w8a8"])
@pytest.mark.parametrize("changes", [{}, {"moe_intermediate_size": 256}], ids=str)
def test_a_full_step_of_experts_takes_no_more_than_was_planned(
    tmp_path: Path, changes: dict[str, int], kind: str | None
) -> None:
    make(replace(CASES["qwen2 moe"], changes={**CASES["qwen2 moe"].changes, **changes}), tmp_path)
    spec, asked = ModelSpec.from_dir(tmp_path), WeightTypes(kind)
    plan = plan_memory(spec, sizes(asked=asked), CPU)
    model = build_model(
        tmp_path, spec, SingleRank(), dtype="fp32", device=CPU, max_len=256, asked=asked
    )
    assert isinstance(model, Decoder)
    for block in model.blocks:
        for tensor in tensors_of(block.mlp):
            if len(tensor) == 7 and tensor.dim() == 2:
                tensor.zero_()  # the router's: then some experts get all tokens
    engine = Engine(
        model, SingleRank(), num_slots=plan.num.full, num_lanes=8, max_len=256, eos_ids=()
    )
    watch_a_full_step(engine, plan, SamplingParams(temperature=0.0))


def watch_a_full_step(
    engine: Engine, plan: MemoryPlan, params: SamplingParams, counted: int = 0
) -> None:
    """A step takes no more than was planned, and not much less; without the ``counted`` bytes the
    plan would have been too small."""
    device, peak = CpuDevice(engine, 1), Peak()
    held = num_bytes((engine.table, engine.history, engine.last_token))
    held += engine.model.site.attention.nbytes
    execute = engine.execute

    def watched(work: PreparedStep) -> Outputs:
        with peak:
            return execute(work)

    engine.execute = watched  # type: ignore[method-assign]
    seqs = [Sequence(lane, random_ids(64, 200, lane), params) for lane in range(8)]
    driver = Driver(device, plan.num.full)
    driver.run([(s, 64, 0) for s in seqs])
    assert plan.work / 4 < held + peak.most <= plan.work
    if counted:
        assert held + peak.most > plan.work - counted
    driver.run([(s, 1, 0) for s in seqs])
    assert held + peak.most <= plan.work
    device.close()


class Copied:
    """A tensor of a checkpoint, whose slices come as tensors of their own, as on a GPU."""

    def __init__(self, source: TensorSource) -> None:
        self._source, self.shape, self.kind = source, source.shape, source.kind

    def read(self, index: Index, device: torch.device) -> Tensor:
        with _disable_current_modes():
            found = self._source.read(index, device)
        return found.clone()


@pytest.mark.parametrize("asked", ["none", "fp8w8a8", "fp8w8a8-b128", "w8a8"])
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32, torch.float8_e4m3fn])
def test_reading_takes_no_more_than_is_planned(
    tmp_path: Path, stored: torch.dtype, asked: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside the weights, on the device, of each thread: while a tensor of several chunks is read,
    brought to float32 and quantised."""
    make_checkpoint(tmp_path, hidden_size=384, intermediate_size=1024, num_hidden_layers=1)
    found = load_file(tmp_path / "model.safetensors")
    for name in [name for name in found if name.endswith("_proj.weight")]:
        if stored == torch.float8_e4m3fn:
            found[name], found[f"{name}_scale_inv"] = quantize_blocks(found[name])
        else:
            found[name] = found[name].to(stored)
    save_file(found, tmp_path / "model.safetensors")
    if stored == torch.float8_e4m3fn:
        said = json.loads((tmp_path / "config.json").read_text())
        said["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
        (tmp_path / "config.json").write_text(json.dumps(said))
    chunk = 128 * 1024  # rows of a block
    monkeypatch.setattr(weights, "_CHUNK", chunk)
    tensor, copy, most = OpenFiles.tensor, weights._copy, [0]
    monkeypatch.setattr(OpenFiles, "tensor", lambda *args: Copied(tensor(*args)))

    def watched(*args: Any) -> None:
        with Peak() as peak:
            copy(*args)
        most.append(peak.most)

    monkeypatch.setattr(weights, "_copy", watched)
    build_model(
        tmp_path, read_spec(tmp_path), SingleRank(), dtype="bf16", device=CPU, max_len=64,
        asked=WeightTypes(asked),
    )  # fmt: skip
    assert chunk < max(most) <= weights._COPIES * chunk


def test_what_does_not_fit_is_told_with_the_flag(tmp_path: Path) -> None:
    spec = ModelSpec.from_hf(make_config().to_dict(), {})
    many = sizes(tp=1000, ranks=1000, mem_fraction=1e-6, max_total_token_num=None)
    with pytest.raises(
        StartupError, match=r"--max_total_token_num 1,000,000,000 needs .* GiB of KV"
    ):
        plan_memory(spec, sizes(max_total_token_num=10**9), CPU)
    with pytest.raises(
        StartupError,
        match=r"no memory is left for KV: weights take .* of 0.00 GiB \(--mem_fraction 1e-06\) \(lower --batch_max_tokens or --running_max_req_size\)$",
    ):
        plan_memory(spec, sizes(mem_fraction=1e-6, max_total_token_num=None), CPU)
    with pytest.raises(
        StartupError,
        match=r"of .* GiB \(--mem_fraction 1e-06, divided among 1,000 ranks \(--tp\)\) \(lower --tp, --batch_max_tokens or",
    ):
        plan_memory(spec, many, CPU)
    with pytest.raises(StartupError, match="--running_max_req_size 100,000 times"):
        plan_memory(spec, sizes(num_lanes=100_000, max_len=32768), CPU)


@pytest.mark.parametrize(("asked", "advised"), [(AS_STORED, True), (WeightTypes("fp8w8a8"), False)])
def test_8_bit_weights_are_advised_where_they_would_help(
    asked: WeightTypes, advised: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1 << 20, 1 << 20))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    spec = ModelSpec.from_hf(make_config().to_dict(), {})
    with pytest.raises(StartupError, match="a higher --tp") as told:
        plan_memory(
            spec,
            sizes(dtype="bf16", asked=asked, max_total_token_num=None),
            torch.device("cuda"),
        )
    assert ("--quant_type" in str(told.value)) == advised


@pytest.mark.parametrize("name", ["gemma3", "mistral"])
def test_both_spaces_are_what_the_engine_allocates(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("asyncllm.engine.build.memory_available", lambda: 64 << 20)
    make(CASES[name], tmp_path)
    spec = read_spec(tmp_path)
    plan = plan_memory(spec, sizes(max_total_token_num=None, mem_fraction=0.9), CPU)
    assert plan.window == Window(WINDOW)
    assert plan.num.full > 3 * plan.num.sliding
    model = build(tmp_path, drop_idle_windows(spec, 256), "fp32", CPU, 256)
    engine = Engine(
        model, SingleRank(), num_slots=plan.num.full, num_sliding=plan.num.sliding, num_lanes=8,
        max_len=256, eos_ids=(),
    )  # fmt: skip
    assert num_bytes(tensor for layer in engine.kv for tensor in layer) == plan.kv
    tables = [t for t in (engine.table, engine.history, engine.sliding_table) if t is not None]
    assert len(tables) == (3 if name == "gemma3" else 2)
    assert num_bytes(tables) < plan.work
    device = CpuDevice(engine, 1)
    warm_up(device, 64, max_len=256)
    device.close()


def test_activations_of_graphs_are_counted_beside_those_of_other_steps(tmp_path: Path) -> None:
    """CUDA graphs have memory of their own, which a step that is launched cannot use."""
    make_checkpoint(tmp_path)
    model = model_on_paper(read_spec(tmp_path), sizes(), CPU)
    none, some = (work_bytes(model, sizes(graph_tokens=n), cuda=True) for n in (0, 4096))
    assert some - none == model.work_bytes(4096) > 0


def test_a_window_that_is_never_full_is_none(tmp_path: Path) -> None:
    make(CASES["gemma3"], tmp_path)
    spec = read_spec(tmp_path)
    plan = plan_memory(spec, sizes(max_len=WINDOW), CPU)
    assert (plan.window, plan.num) == (None, (1000, 1000))
    assert not any(layer.window for layer in drop_idle_windows(spec, WINDOW).layers)
    assert any(layer.window for layer in drop_idle_windows(spec, WINDOW + 1).layers)


def test_gemma3_has_three_times_the_slots_of_one_space(monkeypatch: pytest.MonkeyPatch) -> None:
    """The shape of Gemma 3 12B for requests of 32k tokens."""
    monkeypatch.setattr("asyncllm.engine.build.memory_available", lambda: 40 << 30)
    config = transformers.Gemma3TextConfig(
        hidden_size=3840, intermediate_size=15360, num_hidden_layers=48, num_attention_heads=16,
        num_key_value_heads=8, head_dim=256, sliding_window=1024, vocab_size=262_208,
        architectures=["Gemma3ForCausalLM"],
    )  # fmt: skip
    spec = ModelSpec.from_hf(config.to_dict(), {})
    assert [layer.window for layer in spec.layers] == [*[1024] * 5, None] * 8
    given = sizes(
        dtype="bf16", max_len=32_768, mem_fraction=1.0, max_total_token_num=None, num_lanes=64
    )
    two = plan_memory(spec, given, CPU)
    layers = tuple(replace(layer, window=None) for layer in spec.layers)
    one = plan_memory(replace(spec, layers=layers), given, CPU)
    assert two.num.full > 3 * one.num.full
    assert two.kv <= CPU_KV_BYTES + two.division.nbytes(NO_SLOTS)
    assert "slots of 64.0 KiB and" in two.text(32_768)
    assert "for layers that see 1,024 tokens, 3." in two.text(32_768)
    assert "slots of 384.0 KiB; " in one.text(32_768)


def test_pages_for_k_and_v_in_transit_are_counted_and_named() -> None:
    spec = ModelSpec.from_hf(make_config().to_dict(), {})
    plain, moving = (plan_memory(spec, sizes(moving=tokens), CPU) for tokens in (0, 1 << 20))
    pages = (1 << 20) * plain.division.slot.full
    assert moving.work - plain.work == moving.moving == pages
    assert f"({pages / 2**30:.2f} of it for K/V in transit)" in moving.text(256)
    assert "transit" not in plain.text(256)
