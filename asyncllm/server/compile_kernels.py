"""The helper process that compiles the kernels needed at start; see ``server/compile_helper.py``.

Reads its job from standard input. It builds the model without allocating memory and runs the same
warm-up as rank 0 will, so it compiles what the warm-up launches; it never touches the GPU.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import sys
from dataclasses import asdict, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch

from asyncllm import log
from asyncllm.config import FLAGS
from asyncllm.config.options import OF_ONE_NODE
from asyncllm.engine.build import division_of, model_on_paper
from asyncllm.engine.kernel_recording import DryDevice, KernelVariant, compile_noted, noted
from asyncllm.engine.parallel import SingleRank
from asyncllm.environment import cpu_count
from asyncllm.kernels import autotune
from asyncllm.kernels.autotune import DeviceFacts
from asyncllm.models.checkpoint import as_stored, read_checkpoint
from asyncllm.models.spec import ModelSpec
from asyncllm.server import nodes as nodes  # registers rank 0's messages: a ``Boot`` has their hash
from asyncllm.server.launch import Boot
from asyncllm.server.loading import engine_of, sizes_of, warm
from asyncllm.server.signals import die_with_parent

# imported at their first use in steps, those of torch by operators on tensors without memory
USED_IN_STEPS = (
    "asyncllm.engine.attention_cuda",
    "asyncllm.engine.latent_cuda",
    "asyncllm.engine.ops_cuda",
    "asyncllm.engine.sampling_cuda",
    "torch._dynamo",
    "torch._refs",
    "torch.fx.experimental.symbolic_shapes",
)
KV_BYTES = 64 << 30  # kernels are the same for any number of slots


def job(boot: Boot, facts: DeviceFacts) -> str:
    """The job as text for the helper's standard input."""
    return json.dumps({"boot": boot.to_json(), "facts": asdict(facts)})


def job_name(boot: Boot, spec: ModelSpec, facts: DeviceFacts) -> str:
    """Another one for each model, set of options, kind of GPU and version of what compiles."""
    options = [
        (name, getattr(boot.config, name))
        for name, flag in FLAGS.items()
        if name not in OF_ONE_NODE and not flag.secret
    ]
    kernels = Path(autotune.__file__).parent
    sources = [
        (path.name, (at := path.stat()).st_mtime_ns, at.st_size)
        for path in sorted(kernels.rglob("*"))
        if path.suffix in {".py", ".json"}
    ]
    versions = sys.version, torch.__version__, version("triton")
    resolved = replace(boot.resolved, notes=(), warnings=(), served_names=(), model_name="")
    shapes = asdict(resolved), asdict(spec), asdict(facts)
    text = json.dumps((options, shapes, versions, sources), default=_in_order)
    return hashlib.sha256(text.encode()).hexdigest()


def _in_order(value: object) -> object:
    """For what JSON has no form of: sets have another order in each process."""
    return sorted(value) if isinstance(value, frozenset) else repr(value)


def variants(boot: Boot, spec: ModelSpec, facts: DeviceFacts) -> list[KernelVariant]:
    """The kernels that a rank's warm-up launches, with the types and values they are specialised
    for. Modifies Triton permanently, see :func:`noted`."""
    spec, sizes = distinct(spec), sizes_of(boot)
    with noted(facts) as found:
        model = model_on_paper(spec, sizes, torch.device("cuda"))
        model.pack()  # which prepares products
        num = division_of(spec, sizes.max_len, model).fit(KV_BYTES, None)
        warm(boot, DryDevice(engine_of(boot, model, SingleRank(), num)))
    return found


def distinct(spec: ModelSpec) -> ModelSpec:
    """``spec`` cut to the first layers that include every kind of layer."""
    kinds = list(zip(spec.layers, spec.mlps, strict=True))
    num = max(kinds.index(kind) for kind in kinds) + 1
    return replace(spec, layers=spec.layers[:num], mlps=spec.mlps[:num])


def import_rest() -> None:
    """Import what steps will, while rank 0 still imports what it needs itself."""
    for name in USED_IN_STEPS:
        importlib.import_module(name)


def main() -> int:
    """Do the helper's work and return its exit code."""
    if not (text := sys.stdin.read()):
        return 0
    given = json.loads(text)
    boot = Boot.from_json(given["boot"])
    log.setup(boot.config.log_level, boot.config.log_json, "compiler")
    model_dir = Path(boot.model_dir)
    spec = ModelSpec.from_dir(model_dir)
    with read_checkpoint(model_dir, boot.config.load_way, spec) as checkpoint:
        spec = as_stored(spec, checkpoint)
    with log.phase("find the kernels needed"):
        found = variants(boot, spec, DeviceFacts(**given["facts"]))
    with log.phase(f"compile {len(found)} kernels not cached yet"):
        compile_noted(found, cpu_count(), partial(die_with_parent, os.getpid()))
    return 0
