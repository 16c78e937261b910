"""The secret of a cluster: its file, and the keys that come of it."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from asyncllm import cli
from asyncllm.config import Config
from asyncllm.errors import StartupError
from asyncllm.server.secret import cluster_keys, derive


def with_file(path: Path, **more: object) -> Config:
    return Config(nnodes=2, tp=2, cluster_key_file=str(path), **more)  # type: ignore[arg-type]


def test_a_made_file_is_its_owners_and_gives_one_pair(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, other = tmp_path / "key", tmp_path / "other"
    assert cli.main(["--make_cluster_key", str(path)]) == 0
    assert cli.main(["--make_cluster_key", str(other)]) == 0
    assert f"--cluster_key_file {path}" in capsys.readouterr().out
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    (pair,) = cluster_keys(with_file(path, nccl_host="203.0.113.1"))
    assert (pair,) == cluster_keys(with_file(path))
    assert pair not in cluster_keys(with_file(other))
    assert path.read_text().strip() not in (pair.public, pair.secret)
    before = path.read_text()
    assert cli.main(["--make_cluster_key", str(path)]) == 2  # nothing is written over
    assert "File exists" in capsys.readouterr().err
    assert path.read_text() == before


def test_two_secrets_count_in_their_order_and_0400_will_do(tmp_path: Path) -> None:
    path = tmp_path / "key"
    path.write_text(f"# old\n{'ab' * 32}\n\n{'01' * 32}\n")
    path.chmod(0o400)
    assert cluster_keys(with_file(path)) == (derive(b"\xab" * 32), derive(b"\x01" * 32))


@pytest.mark.parametrize(
    ("text", "mode", "said"),
    [
        ("", 0o600, "has 0 secrets"),
        (f"{'ab' * 32}\n" * 3, 0o600, "has 3 secrets"),
        ("ab" * 31, 0o600, "64 digits"),
        ("AB" * 32, 0o600, "64 digits"),
        ("ab" * 32, 0o640, "mode 640"),
        ("ab" * 32, 0o604, "mode 604"),
        (None, 0o600, "No such file"),
    ],
)
def test_other_files_are_refused_unseen(
    text: str | None, mode: int, said: str, tmp_path: Path
) -> None:
    path = tmp_path / "key"
    if text is not None:
        path.write_text(text)
        path.chmod(mode)
    with pytest.raises(StartupError, match=said) as caught:
        cluster_keys(with_file(path))
    assert str(path) in str(caught.value)
    assert "abab" not in str(caught.value).lower()


@pytest.mark.skipif(os.geteuid() != 0, reason="gives a file away")
def test_a_file_of_another_user_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "key"
    path.write_text("ab" * 32)
    path.chmod(0o600)
    os.chown(path, 12345, 12345)
    with pytest.raises(StartupError, match=r"another user \(uid 12345\)"):
        cluster_keys(with_file(path))


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "::1", "localhost"])
def test_the_loopback_interface_needs_no_secret(host: str) -> None:
    assert len(cluster_keys(Config(nnodes=2, tp=2, nccl_host=host))) == 1


@pytest.mark.parametrize("host", ["203.0.113.1", "0.0.0.0", "::", "2001:db8::1"])
@pytest.mark.parametrize("name", ["nccl_host", "advertise_host"])
def test_elsewhere_the_line_says_how_to_make_one(name: str, host: str) -> None:
    with pytest.raises(StartupError, match=rf"^--{name} {host} .*--make_cluster_key FILE"):
        cluster_keys(Config(nnodes=2, tp=2, **{name: host}))  # type: ignore[arg-type]
