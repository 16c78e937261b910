"""Made the checkpoints beside this file, with the published tools; nothing else runs it.

    pip install --no-deps --target TOOLS compressed-tensors==0.20.0 loguru psutil
    pip download --no-deps --no-binary :all: --no-build-isolation autoawq==0.2.9 auto-gptq==0.7.1
    PYTHONPATH=TOOLS python make.py AUTOAWQ_SOURCES AUTO_GPTQ_SOURCES

A folder has a checkpoint as users get it, and expected.safetensors: token ids, the logits in float32 of
the weights that the tool says it has stored (``plain``), and of compressed-tensors also with activations
quantised by it (``rounded``).
"""

import importlib.util
import json
import sys
import types
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

HERE = Path(__file__).parent
GROUP = 32


def model(dtype: torch.dtype) -> LlamaForCausalLM:
    torch.manual_seed(7)
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
        initializer_range=0.15, tie_word_embeddings=True, bos_token_id=None, eos_token_id=1,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval().to(dtype)


class Apart(torch.nn.ModuleList):
    """Experts of transformers as a linear layer for each matrix, which is what checkpoints have."""

    def __init__(self, stacked: torch.nn.Module) -> None:
        super().__init__()
        for gate_up, down in zip(stacked.gate_up_proj.data, stacked.down_proj.data, strict=True):
            expert = torch.nn.Module()
            gate, up = gate_up.chunk(2)
            for name, weight in (("gate_proj", gate), ("up_proj", up), ("down_proj", down)):
                linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
                linear.weight.data = weight.clone()
                expert.add_module(name, linear)
            self.append(expert)

    def forward(self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        out = torch.zeros_like(x)
        for number, expert in enumerate(self):
            token, place = (ids == number).nonzero(as_tuple=True)
            if len(token):
                rows = x[token][None]  # of two dimensions the tool keeps both
                inner = torch.nn.functional.silu(expert.gate_proj(rows)) * expert.up_proj(rows)
                made = expert.down_proj(inner)[0]
                out.index_add_(0, token, made * weights[token, place, None])
        return out


def mixture(dtype: torch.dtype) -> Qwen3MoeForCausalLM:
    torch.manual_seed(7)
    config = Qwen3MoeConfig(
        vocab_size=64, hidden_size=64, moe_intermediate_size=32, num_hidden_layers=1, head_dim=16,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256, num_experts=4,
        num_experts_per_tok=2, norm_topk_prob=True, decoder_sparse_step=1, mlp_only_layers=[],
        initializer_range=0.15, tie_word_embeddings=True, bos_token_id=None, eos_token_id=1,
    )  # fmt: skip
    made = Qwen3MoeForCausalLM(config).eval()
    for layer in made.model.layers:
        layer.mlp.experts = Apart(layer.mlp.experts)
    return made.to(dtype)


IDS = torch.randint(2, 64, (24,), generator=torch.Generator().manual_seed(3))


def logits(made: LlamaForCausalLM) -> torch.Tensor:
    with torch.no_grad():
        return made.float()(IDS[None]).logits[0].contiguous()


def save(name: str, made: LlamaForCausalLM, tensors: dict, said: dict, **expected) -> None:
    folder = HERE / name
    folder.mkdir(exist_ok=True)
    config = made.config.to_dict() | {
        "quantization_config": said,
        "dtype": str(made.config.dtype)[6:],
    }
    config["architectures"] = [type(made).__name__]
    (folder / "config.json").write_text(json.dumps(config, indent=1, default=str))
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "model.safetensors")
    save_file({"ids": IDS, **expected}, folder / "expected.safetensors")


# -- compressed-tensors


def compressed(
    name: str, weights: dict, inputs: dict | None, form: str, ignore: list[str], model=model
) -> None:
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
    from compressed_tensors.quantization.utils import calculate_qparams

    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    said = {"config_groups": {"group_0": group}, "ignore": ["lm_head", *ignore], "format": form}
    made = model(torch.float32)  # so that what the tool computes is exact
    apply_quantization_config(made, QuantizationConfig(**said))
    for module in made.modules():
        if (scheme := getattr(module, "quantization_scheme", None)) is None:
            continue
        args, weight = scheme.weights, module.weight.data.float()
        match args.strategy:
            case "tensor":
                lowest, highest = weight.min().reshape(1), weight.max().reshape(1)
            case "channel":
                lowest, highest = weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
            case _:
                parts = weight.unflatten(1, (-1, args.group_size))
                lowest, highest = parts.amin(2), parts.amax(2)
        scale, zero = calculate_qparams(lowest, highest, args)
        module.weight_scale.data.copy_(scale.reshape(module.weight_scale.shape))
        if hasattr(module, "weight_zero_point"):
            module.weight_zero_point.data.copy_(zero.reshape(module.weight_zero_point.shape))
    with torch.no_grad():
        both = {"rounded": made(IDS[None]).logits[0].float()} if inputs else {}
    compressor = ModelCompressor.from_pretrained_model(made, quantization_format=form)
    compressor.compress_model(made)
    tensors = {k: v for k, v in made.state_dict().items() if k != "lm_head.weight"}
    tensors = {k: v.clone() for k, v in tensors.items()}
    (HERE / name).mkdir(exist_ok=True)
    made.config.save_pretrained(HERE / name)
    compressor.update_config(HERE / name)
    written = json.loads((HERE / name / "config.json").read_text())["quantization_config"]
    compressor.decompress_model(made)
    state = {k: v for k, v in made.state_dict().items() if k in model(torch.float32).state_dict()}
    plain = model(torch.float32)
    plain.load_state_dict({k: v.float() for k, v in state.items()}, strict=False)
    save(name, made, tensors, written, plain=logits(plain), **both)


# -- AutoAWQ


def module_at(path: Path, name: str) -> types.ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    found = importlib.util.module_from_spec(spec)
    sys.modules[name] = found
    spec.loader.exec_module(found)
    return found


def awq(sources: Path) -> None:
    for name in ("awq", "awq.utils", "awq.quantize"):
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__path__ = [str(sources / name.replace(".", "/"))]
    sys.modules["awq.utils.utils"] = types.ModuleType("awq.utils.utils")  # which wants accelerate
    sys.modules["awq.utils.utils"].get_best_device = lambda: "cpu"
    gemm = module_at(sources / "awq/modules/linear/gemm.py", "awq_gemm")
    from awq.utils.packing_utils import dequantize_gemm

    made = model(torch.float16)
    plain, tensors = model(torch.float32), dict(made.state_dict())
    plain.load_state_dict({k: v.float() for k, v in tensors.items()})
    tensors.pop("lm_head.weight")
    for name, linear in made.named_modules():
        if not name.endswith("_proj") or name.endswith("k_proj"):
            continue
        weight = linear.weight.data.float().reshape(-1, GROUP)  # as pseudo_quantize_tensor does
        lowest, highest = weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
        scales = (highest - lowest).clamp(min=1e-5) / 15
        zeros = (-torch.round(lowest / scales)).clamp_(0, 15)
        rounded = (torch.clamp(torch.round(weight / scales) + zeros, 0, 15) - zeros) * scales
        linear.weight.data = rounded.reshape(linear.weight.shape)
        scales, zeros = (x.view(linear.out_features, -1).t().contiguous() for x in (scales, zeros))
        packed = gemm.WQLinear_GEMM.from_linear(linear, 4, GROUP, False, scales, zeros)
        del tensors[f"{name}.weight"]
        tensors |= {f"{name}.{key}": value for key, value in packed.state_dict().items()}
        wide = dequantize_gemm(packed.qweight, packed.qzeros, packed.scales.float(), 4, GROUP)
        plain.get_submodule(name).weight.data = wide.t().contiguous()
    said = {
        "quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm",
        "modules_to_not_convert": ["k_proj"],
    }  # fmt: skip
    save("awq", made, tensors, said, plain=logits(plain))


# -- AutoGPTQ


def gptq(sources: Path, name: str, *, ordered: bool, symmetric: bool) -> None:
    for each in ("auto_gptq", "auto_gptq.quantization"):
        sys.modules[each] = types.ModuleType(each)
        sys.modules[each].__path__ = [str(sources / each.replace(".", "/"))]
    torch.cuda.synchronize = lambda: None
    from auto_gptq.quantization.gptq import GPTQ

    kernel = module_at(sources / "auto_gptq/nn_modules/qlinear/qlinear_cuda.py", "qlinear")
    made = model(torch.float16).float()
    plain, tensors = model(torch.float32), dict(model(torch.float16).state_dict())
    plain.load_state_dict({k: v.float() for k, v in tensors.items()})
    tensors.pop("lm_head.weight")
    for path, linear in made.named_modules():
        if not path.endswith("_proj"):
            continue
        worker = GPTQ(linear)
        worker.quantizer.configure(4, perchannel=True, sym=symmetric, mse=False)
        torch.manual_seed(linear.in_features)
        spread = torch.rand(linear.in_features) * 3 + 0.1
        worker.add_batch(torch.randn(1, 256, linear.in_features) * spread, None)
        scale, zero, g_idx = worker.fasterquant(group_size=GROUP, actorder=ordered)
        packed = kernel.QuantLinear(
            4, GROUP, linear.in_features, linear.out_features, False, weight_dtype=torch.float32
        )
        if not symmetric:
            zero.clamp_(min=1)  # auto_gptq cannot store 0
        packed.pack(linear, scale.half().float(), zero, g_idx)
        wide = packed(torch.eye(linear.in_features))  # the weight that it computes with
        del tensors[f"{path}.weight"]
        packed.scales = packed.scales.half()
        tensors |= {f"{path}.{key}": value for key, value in packed.state_dict().items()}
        plain.get_submodule(path).weight.data = wide.t().contiguous()
    said = {
        "quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": ordered, "sym": symmetric,
        "checkpoint_format": "gptq", "damp_percent": 0.01, "true_sequential": True,
        "model_file_base_name": "model", "static_groups": False,
    }  # fmt: skip
    made.config.dtype = torch.float16
    save(name, made, tensors, said, plain=logits(plain))


def main(awq_sources: str, gptq_sources: str) -> None:
    fp8 = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": False}
    token = {
        "num_bits": 8,
        "type": "float",
        "symmetric": True,
        "dynamic": True,
        "strategy": "token",
    }
    int8 = {**fp8, "type": "int"}
    four = {
        "num_bits": 4,
        "type": "int",
        "strategy": "group",
        "group_size": GROUP,
        "dynamic": False,
    }
    left = ["model.layers.0.self_attn.k_proj"]
    compressed("ct-fp8-channel", fp8 | {"strategy": "channel"}, token, "float-quantized", left)
    compressed("ct-fp8-tensor", fp8 | {"strategy": "tensor"}, token, "float-quantized", [])
    token8 = token | {"type": "int"}
    compressed("ct-int8", int8 | {"strategy": "channel"}, token8, "int-quantized", left)
    routers = ["re:.*mlp.gate$", "model.layers.0.self_attn.q_proj"]
    fp8s = fp8 | {"strategy": "channel"}
    compressed("ct-moe-fp8", fp8s, token, "float-quantized", routers, mixture)
    compressed("ct-w4a16", four | {"symmetric": True}, None, "pack-quantized", left)
    compressed("ct-w4a16-zeros", four | {"symmetric": False}, None, "pack-quantized", [])
    awq(Path(awq_sources))
    gptq(Path(gptq_sources), "gptq", ordered=False, symmetric=True)
    gptq(Path(gptq_sources), "gptq-ordered", ordered=True, symmetric=False)


if __name__ == "__main__":
    main(*sys.argv[1:])
