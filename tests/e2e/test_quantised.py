"""A server whose weights are in few bits: each type answers, and says what it has."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.process import Server

KINDS = {
    "fp8w8a8": ("fp8_channel", "in fp8 (a scale per output channel)"),
    "fp8w8a8-b128": ("fp8_block", "in fp8 (blocks of 128 x 128)"),
    "vllm-w8a8": ("int8_channel", "in int8 (a scale per output channel)"),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_server_answers(tiny_dir: Path, tmp_path: Path, kind: str) -> None:
    words = ("--device", "cpu", "--max_total_token_num", "500", "--quant_type", kind)
    with Server(tiny_dir, tmp_path / "log", *words) as server:
        assert len(server.tokens([5, 6, 7, 8], 6)) == 6
        name, line = KINDS[kind]
        layers = server.metric(f'asyncllm_linear_layers{{kind="{name}"}}')
        assert layers > 0
        assert f"linear layers: {layers:.0f} {line}" in server.text()
