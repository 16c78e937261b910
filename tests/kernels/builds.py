"""Triton's front end over every build of the attention kernels, over K/V pairs and over latents, and
of those of experts in 8 bits, for an H100; needs no GPU.

The interpreter, which the other tests run, sees no types. Run as a program, since Triton decides
at its import whether it interprets. Says on its last line how many builds there were.
"""

import itertools
import sys
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from triton._C.libtriton import ir  # type: ignore[import-untyped]
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from asyncllm.kernels.attention.decode import decode_attention
from asyncllm.kernels.attention.kv_write import rope_kv
from asyncllm.kernels.attention.prefill import PrefillConfig, prefill_attention
from asyncllm.kernels.attention.shared_rows import MAX_GROUPS, SharedRows
from asyncllm.kernels.latent.attend import attend
from asyncllm.kernels.latent.plan import plan_attend, plan_chunks
from asyncllm.kernels.moe.eight_bits import CONFIGS
from asyncllm.kernels.moe.experts import experts
from asyncllm.kernels.moe.tiles import ExpertsConfig
from tests.kernels.harness import EIGHT_BITS, in_8_bits

TARGET = GPUTarget("cuda", 90, 32)
TYPES = {
    torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int32: "i32",
    torch.int16: "i16", torch.int8: "i8", torch.float8_e4m3fn: "fp8e4nv",
}  # fmt: skip
built: set[str] = set()


def build(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
    """Instead of a launch."""
    given = dict(zip(self.arg_names, args, strict=False))
    given |= {name: value for name, value in kwargs.items() if name in self.arg_names}
    if "ASM" in given:  # what a GPU has
        given["ASM"] = given["q_ptr" if "q_ptr" in given else "out_ptr"].element_size() == 2
    if "SETTLE" in given:
        given["SETTLE"] = True
    options = {name: value for name, value in kwargs.items() if name not in self.arg_names}
    kinds = {param.name: _type(given[param.name], param.is_constexpr) for param in self.params}
    constants = {
        (i,): given[name] for i, name in enumerate(self.arg_names) if kinds[name] == "constexpr"
    }
    what = f"{self.__name__} {kinds} {constants}"
    if what in built:
        return
    built.add(what)
    backend = make_backend(TARGET)
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    parsed = backend.parse_options(options)
    source = ASTSource(self, kinds, constants, {})
    make = backend.get_codegen_implementation(parsed)
    source.make_ir(TARGET, parsed, make, backend.get_module_map(), context)


def _type(value: Any, constant: bool) -> str:
    if constant or value is None:
        return "constexpr"
    if isinstance(value, TensorDescriptor):
        return f"tensordesc<{TYPES[value.base.dtype]}[{', '.join(map(str, value.block_shape))}]>"
    if isinstance(value, Tensor):
        return f"*{TYPES[value.dtype]}"
    return "fp32" if isinstance(value, float) else "i32"


def case(dim: int, q: int, kv: int, dtype: torch.dtype, bits: Any) -> dict[str, Tensor]:
    caches = {name: torch.randn(5, kv, dim).to(dtype) for name in ("k_cache", "v_cache")}
    table = torch.zeros(1, 4, dtype=torch.int32)
    found = {"q": torch.randn(2, q, dim).to(dtype), **caches, "table": table}
    found["lanes"] = table[0, :1]
    return in_8_bits(found, *bits) if bits else found


def no_groups(row: Tensor) -> SharedRows:
    return SharedRows(row.new_zeros(4, MAX_GROUPS), row * 0, row * 0, row * 0)


def latents() -> None:
    """Decode with and without shared prefixes, and chunks."""
    row, table = torch.ones(1, dtype=torch.int32), torch.zeros(1, 4, dtype=torch.int32)
    shapes = ((16, 64, torch.bfloat16), (70, 40, torch.float32), (20, 64, torch.float16))
    for bits, (heads, rank, dtype) in itertools.product((False, True), shapes):
        q, turned = torch.zeros(1, heads, rank).to(dtype), torch.zeros(1, heads, 16).to(dtype)
        kind, scales = (torch.float8_e4m3fn, torch.ones(5)) if bits else (dtype, None)
        cache = torch.zeros(5, rank + 16).to(kind)
        plans = [
            plan_attend(row, row, heads, cache, rank, shared=shared)
            for shared in (None, no_groups(row))
        ]
        cu = torch.tensor([0, 1], dtype=torch.int32)
        chunks = plan_chunks(row, row, cu, 1, heads, cache, rank, capacity=0, least=1)
        for plan in (*plans, chunks.attend):
            attend(q, turned, cache, table, 1.0, plan=plan, out=q.clone(), scales=scales)


def mixtures() -> None:
    """Experts in 8 bits: each class, with and without what the copy engine brings."""
    ids, weights = torch.zeros(2, 1, dtype=torch.int32), torch.ones(2, 1)
    for kind, blocked in (
        (torch.float8_e4m3fn, False),
        (torch.float8_e4m3fn, True),
        (torch.int8, False),
    ):
        x, gate_up, down = (torch.zeros(size) for size in ((2, 160), (1, 256, 160), (1, 160, 128)))
        shapes = ((1, 2, 2), (1, 2, 1)) if blocked else ((1, 256), (1, 160))
        stacks = gate_up.to(kind), down.to(kind)
        scales = tuple(torch.ones(shape) for shape in shapes)
        for size, dtype in itertools.product(CONFIGS, (torch.bfloat16, torch.float32)):
            for copy in (False, True):
                found = CONFIGS[size]
                up, low = (replace(tile, copy=copy) for tile in (found.up, found.down))
                config = ExpertsConfig(found.block_m, up, low)
                experts(x.to(dtype), *stacks, ids, weights, scales=scales, size=size, config=config)


def main() -> int:
    JITFunction.run = build
    shapes: list[tuple[int, int, int, torch.dtype, dict[str, Any]]] = [
        (16, 4, 2, torch.bfloat16, {}),
        (96, 6, 6, torch.float32, {}),
        (32, 4, 2, torch.float16, {"window": 3, "softcap": 2.0}),
        (64, 4, 2, torch.bfloat16, {"softcap": 2.0}),
    ]
    for bits, (dim, q, kv, dtype, limit) in itertools.product([None, *EIGHT_BITS], shapes):
        step = case(dim, q, kv, dtype, bits)
        row = {**step, "q": step["q"][:1], "lens": step["lanes"] + 1}
        for grouped, split in itertools.product((False, True), (False, True)):
            decode_attention(**row, **limit, scale=1.0, grouped=grouped, split=split)
        if "window" not in limit:
            decode_attention(**row, **limit, scale=1.0, shared=no_groups(row["lens"]))
        qkv = torch.zeros(2, (q + 2 * kv) * dim, dtype=dtype)
        starts, cu = step["lanes"] + 2, torch.tensor([0, 2], dtype=torch.int32)
        rows = {**step, "starts": starts, "cu_counts": cu, "max_count": 2, "scale": 1.0}
        for config in (PrefillConfig(16, 16, 4, 2, 2), PrefillConfig(64, 16, 4, 2, 2, False)):
            prefill_attention(**rows, **limit, config=config, kv=qkv)
        cos, at = torch.zeros(4, dim), step["table"][0, :2]
        rope_kv(qkv, cos, at, at, step["k_cache"], step["v_cache"], q, step.get("scales"))
    latents()
    mixtures()
    sys.stdout.write(f"{len(built)}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
