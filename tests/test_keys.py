"""API keys from files and the environment; what would leave the server open ends the start."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest

from asyncllm import rank
from asyncllm.config import Config
from asyncllm.environment import child_environment
from asyncllm.errors import StartupError
from asyncllm.server.keys import with_all_keys


def key_file(folder: Path, text: str, mode: int = 0o600) -> str:
    path = folder / "keys"
    path.write_text(text)
    path.chmod(mode)
    return str(path)


def test_all_sources_add_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ASYNCLLM_API_KEY", "sk-env sk-other")
    file = key_file(tmp_path, "# ours\nsk-one\n\n  sk-two  \r\n#sk-old\nsk-line\n")
    got = with_all_keys(Config(api_key=("sk-line",), api_key_file=file))
    assert got.api_key == ("sk-line", "sk-one", "sk-two", "sk-env", "sk-other")
    assert "ASYNCLLM_API_KEY" not in child_environment()
    assert with_all_keys(Config()).api_key == ()


@pytest.mark.parametrize("text", ["", "\n \n", "# only a comment\n"])
def test_an_empty_source_ends_the_start(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also beside keys from elsewhere: whoever named the source relies on it."""
    with pytest.raises(StartupError, match=r"--api_key_file .*keys has no key"):
        rank.serve(Config(api_key=("sk-line",), api_key_file=key_file(tmp_path, text)))
    monkeypatch.setenv("ASYNCLLM_API_KEY", text.replace("# only a comment", ""))
    with pytest.raises(StartupError, match="ASYNCLLM_API_KEY has no key"):
        rank.serve(Config())


def test_bad_files_and_keys_end_the_start_unseen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(StartupError, match=r"absent: No such file"):
        with_all_keys(Config(api_key_file=str(tmp_path / "absent")))
    file = key_file(tmp_path, "sk-good\nsk-secret two words\n")
    with pytest.raises(StartupError, match="a key must be printable ASCII") as caught:
        with_all_keys(Config(api_key_file=file))
    assert "secret" not in str(caught.value)
    monkeypatch.setenv("ASYNCLLM_API_KEY", "sk-s\u00e9cret")
    with pytest.raises(StartupError, match="ASYNCLLM_API_KEY: a key must be") as caught:
        with_all_keys(Config())
    assert "cret" not in str(caught.value).removeprefix("ASYNCLLM_API_KEY")


@pytest.mark.parametrize(("mode", "warns"), [(0o600, False), (0o400, False), (0o644, True)])
def test_a_file_that_others_may_read_is_warned_about(
    mode: int, warns: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        with_all_keys(Config(api_key_file=key_file(tmp_path, "sk-secret", mode)))
    assert bool(caplog.records) is warns
    assert "sk-" not in caplog.text


def test_keys_are_shown_by_no_process(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], demo_dir: Path
) -> None:
    """Children get them on their standard input; --check counts them."""
    config = Config(api_key_file=key_file(tmp_path, "sk-a\nsk-b\n"), check=True, port=1 << 15,
                    model_dir=str(demo_dir), device="cpu")  # fmt: skip
    assert rank.serve(config) == 0
    shown = capsys.readouterr().out
    assert "api_key = 2 given" in shown
    assert "sk-" not in shown + repr(with_all_keys(config)) + repr(os.environ)
    assert "sk-" not in Path("/proc/self/cmdline").read_text()
    assert Config.from_json(with_all_keys(config).to_json()).api_key == ("sk-a", "sk-b")
