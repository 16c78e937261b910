"""A model that says what it is told to: ``scripted_model.py FOLDER TOOL ARGUMENTS``

It has the embedded model's tokenizer and a long context. Its layers add nothing, and its output
matrix knows what follows each token: behind ``<|call|>`` comes a call of TOOL with ARGUMENTS (JSON),
behind ``<|answer|>`` the answer, behind either the end. The chat template ends prompts with one of
the two: the first until a tool has given something.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer

from asyncllm.demo import ensure_demo_model
from asyncllm.environment import cache_dir

ANSWER = "It is done as you asked."
SIZE, HIDDEN = 1 << 17, 64
TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n"
    "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function | tojson }}</tool_call>\n{% endfor %}"
    "{% endfor %}{% for t in tools or [] %}{{ t | tojson }}\n{% endfor %}"
    "{% if messages | selectattr('role', 'equalto', 'tool') | list %}<|answer|>"
    "{% else %}<|call|>{% endif %}"
)


def main() -> None:
    folder, tool, arguments = Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3])
    call = json.dumps({"name": tool, "arguments": arguments})
    folder.mkdir(parents=True, exist_ok=True)
    source = ensure_demo_model(cache_dir())
    shutil.copy(source / "tokenizer.json", folder)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    said = [f"<tool_call>\n{call}\n</tool_call>", ANSWER]
    marks = ["<|call|>", "<|answer|>", "<|end|>"]
    tokenizer.add_special_tokens([AddedToken(mark, special=True) for mark in marks])
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in said])
    tokenizer.save(str(folder / "tokenizer.json"))
    ids = {text: tokenizer.token_to_id(text) for text in (*marks, *said)}
    follows = dict(zip(marks[:2], said, strict=True)) | dict.fromkeys(said, "<|end|>")
    size = tokenizer.get_vocab_size()
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": size,
        "hidden_size": HIDDEN, "intermediate_size": HIDDEN, "num_hidden_layers": 1,
        "num_attention_heads": 1, "num_key_value_heads": 1, "max_position_embeddings": SIZE,
        "rms_norm_eps": 1e-5, "eos_token_id": ids["<|end|>"], "tie_word_embeddings": False,
        "dtype": "float32",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    settings = {"eos_token": "<|end|>", "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    embed = torch.randn(size, HIDDEN, generator=torch.Generator().manual_seed(0))
    head = torch.zeros(size, HIDDEN)
    for before, after in follows.items():
        head[ids[after]] += embed[ids[before]]
    square = torch.zeros(HIDDEN, HIDDEN)
    layer = "model.layers.0."
    weights = {
        f"{layer}{part}.weight": square.clone()
        for part in (
            *(f"self_attn.{name}_proj" for name in "qkvo"),
            *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
        )
    }
    norms = (f"{layer}input_layernorm", f"{layer}post_attention_layernorm", "model.norm")
    weights |= {f"{name}.weight": torch.ones(HIDDEN) for name in norms}
    weights |= {"model.embed_tokens.weight": embed, "lm_head.weight": head}
    save_file(weights, folder / "model.safetensors")


main()
