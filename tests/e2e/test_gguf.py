"""A server of a GGUF file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from asyncllm.tekken import byte_characters
from tests.e2e.process import Server
from tests.models.families import CASES, make
from tests.models.gguf_files import convert

SPECIAL = ["<|im_start|>", "<|im_end|>"]
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }} {{ message.content }}<|im_end|>"
    "{% endfor %}<|im_start|>assistant "
)


@pytest.mark.parametrize("where", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_file_answers_chats_and_a_damaged_one_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    monkeypatch.setenv("ASYNCLLM_CACHE", str(tmp_path / "cache"))
    shape = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "vocab_size": 260,
        "num_attention_heads": 4,
    }
    case = replace(CASES["llama"], changes=CASES["llama"].changes | shape)
    make(case, tmp_path / "hf", spread=0.5)
    said = {
        "tokenizer.ggml.tokens": [*byte_characters().values(), "hi", "ho", *SPECIAL],
        "tokenizer.ggml.token_type": [*[1] * 258, 3, 3],
        "tokenizer.ggml.merges": ["h i", "h o"],
        "tokenizer.ggml.eos_token_id": 259,
        "tokenizer.chat_template": TEMPLATE,
    }
    file = tmp_path / "tiny-chat.gguf"
    convert(tmp_path / "hf", "llama", file, lambda name: "Q4_0", **said)
    options = "--device", where, "--max_total_token_num", "512", "--max_req_total_len", "256"
    with Server(file, tmp_path / "log", *options) as server:
        body = {
            "model": "tiny-chat", "messages": [{"role": "user", "content": "Größe"}],
            "max_tokens": 5, "temperature": 0,
        }  # fmt: skip
        reply = server.post("/v1/chat/completions", body)
        assert reply["usage"]["completion_tokens"] in range(1, 6)
        assert reply["usage"]["prompt_tokens"] == 1 + len("user Größe".encode()) + 2 + 10
        assert ("bits of the GGUF file" in server.text()) == (where == "cpu")  # else widened
    file.write_bytes(file.read_bytes()[:-2000])
    server = Server(file, tmp_path / "log")
    with server.failing():
        assert server.process.wait(120) == 2
    assert "would be at bytes" in server.text().strip().splitlines()[-1]
