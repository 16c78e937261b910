"""--model_dir: which folder is served, and what is said when there is none."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from asyncllm.errors import StartupError
from asyncllm.hub import check_model_dir, names_of, resolve_model_dir
from asyncllm.models.checkpoint import INDEX

COMMIT = "0123456789abcdef0123456789abcdef01234567"
NOBODY = "http://127.0.0.1:9"  # a port at which nobody listens
FILES = {
    "config.json": b'{"model_type": "llama"}',
    "model.safetensors": b"weights",
    "tokenizer.json": b"{}",
    "chat_template.jinja": b"{{ messages }}",
    "pytorch_model.bin": b"the same in another format",
    "consolidated.safetensors": b"the same under another name",
    "README.md": b"# a model",
}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"")
    return folder


def refusal(model_dir: str | None, tmp_path: Path) -> str:
    with pytest.raises(StartupError) as caught:
        resolve_model_dir(model_dir, tmp_path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_folder_is_served_as_it_is(model: Path, tmp_path: Path) -> None:
    assert resolve_model_dir(str(model), tmp_path) == model


@pytest.mark.parametrize(
    ("folder", "start", "names"),
    [
        ("models/m", "", ("m",)),
        ("models/m/", "", ("m",)),
        (".", "models/m", ("m",)),
        ("..", "models/m/part", ("m",)),
        (f"hub/models--org--m/snapshots/{COMMIT}", "", ("m", "org/m")),
        (".", f"hub/models--org--m/snapshots/{COMMIT}", ("m", "org/m")),
        ("hub/models--gpt2/snapshots/main", "", ("gpt2",)),
        (f"copies/m/{COMMIT}", "", ("m",)),
        ("/", "", ()),
    ],
)
def test_a_model_is_called_as_its_real_folder_or_its_repository(
    folder: str,
    start: str,
    names: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / start).mkdir(parents=True, exist_ok=True)
    monkeypatch.chdir(tmp_path / start)
    assert names_of(Path(folder)) == names


def test_a_folder_wins_over_a_hub_id(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org").mkdir()
    model.rename(tmp_path / "org" / "name")
    assert resolve_model_dir("org/name", tmp_path) == Path("org/name")


def test_no_model_dir_is_the_embedded_model(demo_dir: Path) -> None:
    assert resolve_model_dir(None, demo_dir.parents[1]) == demo_dir
    check_model_dir(demo_dir)


def test_a_folder_without_config_is_refused(model: Path, tmp_path: Path) -> None:
    (model / "config.json").unlink()
    assert "has no config.json: not a" in refusal(str(model), tmp_path)
    (model / "params.json").write_text("{}")
    assert "has no config.json but params.json, Mistral's own" in refusal(str(model), tmp_path)


def test_a_folder_without_safetensors_is_refused(model: Path, tmp_path: Path) -> None:
    (model / "model.safetensors").rename(model / "model.pth")
    assert "holds no *.safetensors" in refusal(str(model), tmp_path)


def test_missing_shards_are_named(model: Path, tmp_path: Path) -> None:
    names = {"a": "model.safetensors", "b": "part-2.safetensors", "c": "part-3.safetensors"}
    (model / INDEX).write_text(json.dumps({"weight_map": names}))
    assert "lacks part-2.safetensors and 1 more" in refusal(str(model), tmp_path)
    (model / "part-2.safetensors").write_bytes(b"")
    (model / "part-3.safetensors").write_bytes(b"")
    check_model_dir(model)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": []}'])
def test_a_broken_index_is_refused(model: Path, tmp_path: Path, text: str) -> None:
    (model / INDEX).write_text(text)
    assert "is not an index of weights" in refusal(str(model), tmp_path)


@pytest.mark.parametrize("name", ["nothing", "./no/where", "/no/where", "a/b/c", "org/"])
def test_what_is_no_folder_and_no_hub_id_is_refused(name: str, tmp_path: Path) -> None:
    assert f"--model_dir {name}: no such folder" in refusal(name, tmp_path)


def test_a_file_is_refused(model: Path, tmp_path: Path) -> None:
    assert "is a file" in refusal(str(model / "config.json"), tmp_path)


class Hub(BaseHTTPRequestHandler):
    """The few answers of a model hub that a download needs, for org/name only."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if not path.startswith(("/api/models/org/name/", "/org/name/")):
            self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        elif "/revision/" in path:
            siblings = [{"rfilename": name} for name in FILES]
            self.json({"id": "org/name", "sha": COMMIT, "siblings": siblings})
        elif "/tree/" in path:
            self.json(
                [
                    {"type": "file", "path": name, "size": len(data), "oid": oid(name)}
                    for name, data in FILES.items()
                ]
            )
        else:
            name = path.rpartition("/")[2]
            headers = {"ETag": f'"{oid(name)}"', "X-Repo-Commit": COMMIT}
            self.answer(200, FILES[name], headers)

    do_HEAD = do_GET

    def json(self, content: Any) -> None:
        self.answer(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


def oid(name: str) -> str:
    return name.encode().hex().ljust(40, "0")[:40]


@pytest.fixture
def hub() -> Iterator[str]:
    """The address of a `Hub`."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def ask_hub(name: str, tmp_path: Path, endpoint: str = NOBODY, **extra: str) -> str:
    """The folder or the refusal, from a process of its own: the client reads its settings once."""
    script = (
        "import sys\nfrom asyncllm.hub import *\n"
        "try: print(resolve_model_dir(sys.argv[1], Path()))\n"
        "except StartupError as error: print(error)"
    )
    offline = {"HF_HUB_OFFLINE": "0", "TRANSFORMERS_OFFLINE": "0", **extra}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script, name],
        env={**os.environ, **offline, "HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path)},
        cwd=Path(__file__).parents[1],
        stdout=subprocess.PIPE,
        text=True,
        timeout=120,
        check=True,
    )
    return done.stdout.removesuffix("\n")


def test_a_hub_id_is_downloaded_without_what_is_not_served(hub: str, tmp_path: Path) -> None:
    folder = Path(ask_hub("org/name", tmp_path, hub))
    unwanted = {"pytorch_model.bin", "consolidated.safetensors", "README.md"}
    assert {path.name for path in folder.iterdir()} == set(FILES) - unwanted
    assert (folder / "model.safetensors").read_bytes() == FILES["model.safetensors"]
    # the second start needs no hub
    assert ask_hub("org/name", tmp_path) == str(folder)


def test_an_unknown_hub_id_is_refused(hub: str, tmp_path: Path) -> None:
    text = ask_hub("org/other", tmp_path, hub)
    assert "--model_dir org/other" in text
    assert "there is no such model" in text
    assert "local folder" in text
    assert "\n" not in text


def test_without_network_the_refusal_names_the_model_and_the_way_out(tmp_path: Path) -> None:
    text = ask_hub("org/name", tmp_path)
    assert "--model_dir org/name" in text
    assert "no connection" in text
    assert "local folder" in text
    assert "\n" not in text


def test_offline_mode_is_named(tmp_path: Path) -> None:
    assert "HF_HUB_OFFLINE is set" in ask_hub("org/name", tmp_path, HF_HUB_OFFLINE="1")
