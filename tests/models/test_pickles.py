"""Weights that torch.save has written: *.bin and DeepSpeed's layers, read by another process."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from asyncllm.engine.build import build_model
from asyncllm.engine.parallel import SingleRank
from asyncllm.errors import StartupError
from asyncllm.hub import check_model_dir
from asyncllm.models.checkpoint import as_stored, read_checkpoint, weight_files
from asyncllm.models.deepspeed import layer_files, place
from asyncllm.models.llama import Decoder
from asyncllm.models.spec import ModelSpec
from asyncllm.models.tensors import Index, JoinedShards, StoredTensor
from asyncllm.models.unpickle import FoundTensors, Pickles
from tests.e2e.process import alive, wait_until
from tests.models.harness import build
from tests.models.test_llama import make_checkpoint
from tests.models.test_loading import FILE, check_loaded, make_tokenizer


@pytest.fixture(scope="module")
def pickles() -> Iterator[Pickles]:
    """One process for all tests that need no more."""
    made = Pickles()
    yield made
    made.close()


def take_apart(folder: Path) -> dict[str, Tensor]:
    """What the safetensors file of a checkpoint holds; it is removed."""
    found = load_file(folder / FILE)
    (folder / FILE).unlink()
    return found


# -- files of strangers --------------------------------------------------------------------------


class Runs:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> object:
        return os.system, (f"touch {self.path}",)


def deflated(path: Path, zeros: int) -> None:
    """A small file of torch's format whose pickle is ``zeros`` MiB."""
    torch.save({"a": torch.ones(3)}, path.with_suffix(".good"))
    with (
        zipfile.ZipFile(path.with_suffix(".good")) as good,
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as bad,
    ):
        for info in good.infolist():
            if not info.filename.endswith("data.pkl"):
                bad.writestr(info.filename, good.read(info.filename))
                continue
            with bad.open(info.filename, "w", force_zip64=True) as file:
                for _ in range(zeros):
                    file.write(bytes(1 << 20))


@pytest.mark.parametrize("zipped", [True, False, None])
@pytest.mark.parametrize("deep", [True, False])
def test_the_code_of_a_file_does_not_run(
    tmp_path: Path, pickles: Pickles, zipped: bool | None, deep: bool
) -> None:
    path, ran = tmp_path / "pytorch_model.bin", tmp_path / "ran"
    runs = Runs(ran)
    held = {"a": torch.ones(3), "b": {"c": runs}} if deep else runs
    if zipped is None:
        path.write_bytes(pickle.dumps(held))
    else:
        torch.save(held, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(StartupError, match=f"^{path} (is refused: it holds more|cannot)") as error:
        pickles.open(path)
    assert "\n" not in str(error.value)
    assert not ran.exists()
    if zipped is None:
        return
    assert str(error.value).endswith("it holds more than tensors (posix.system)")
    torch.load(path, weights_only=False)  # elsewhere it would have run
    assert ran.exists()


def test_what_wants_too_much_memory_is_refused(tmp_path: Path, pickles: Pickles) -> None:
    path = tmp_path / "a.bin"
    deflated(path, 400)
    assert path.stat().st_size < 4 << 20
    with pytest.raises(StartupError, match="wants more memory than twice its size and 256 MiB"):
        pickles.open(path)


@pytest.mark.parametrize(
    "content", [b"", b"junk" * 99, b"PK\x03\x04" + bytes(99), b"\x80\x02}q\x00."]
)
def test_what_is_no_file_of_torch_is_one_line(
    tmp_path: Path, pickles: Pickles, content: bytes
) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(content)
    with pytest.raises(StartupError, match=f"^{path} (cannot be read|holds no tensors)") as error:
        pickles.open(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("held", "message"),
    [
        ([torch.ones(2)], "holds no tensors by name"),
        ({"epoch": 3}, "holds no tensors by name"),
        ({"a": torch.ones(2).to_sparse()}, "is refused: 'a' is no plain tensor"),
        ({"a": torch.ones(1).expand(8, 10**12)}, "is refused: 'a' is no plain tensor"),
        ({"a": torch._neg_view(torch.ones(2))}, "is refused: 'a' is no plain tensor"),
        ({"a": torch.ones(2, dtype=torch.complex64)}, r"is refused: 'a' has type torch\.complex64"),
        (torch.nn.Linear(2, 2), r"more than tensors \(torch\.nn\.modules\.linear\.Linear\)"),
    ],
)
def test_what_holds_no_plain_tensors_is_refused(
    tmp_path: Path, pickles: Pickles, held: object, message: str
) -> None:
    torch.save(held, tmp_path / "a.bin")
    with pytest.raises(StartupError, match=message):
        pickles.open(tmp_path / "a.bin")


def test_the_process_knows_no_secrets_and_writes_no_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    torch.save({"a": torch.ones(3)}, tmp_path / "a.bin")
    own = Pickles()
    own.open(tmp_path / "a.bin")
    assert own._process is not None
    proc = Path(f"/proc/{own._process.pid}")
    limits = (proc / "limits").read_text()
    assert "HF_TOKEN" in os.environ
    assert b"HF_TOKEN" not in (proc / "environ").read_bytes()
    assert any(
        line.split()[3:5] == ["0", "0"] for line in limits.splitlines() if "file size" in line
    )
    own._process.kill()
    with pytest.raises(StartupError, match="cannot be read: the process that tried ended with -9"):
        own.open(tmp_path / "a.bin")
    assert not proc.exists()


def test_the_process_dies_with_its_parent(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(3)}, tmp_path / "a.bin")
    code = (
        "import os, sys; from pathlib import Path; from asyncllm.models.unpickle import Pickles\n"
        "p = Pickles(); p.open(Path(sys.argv[1])); print(p._process.pid, flush=True)\n"
        "os.kill(os.getpid(), 9)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "a.bin")]
    ran = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert ran.returncode == -9
    assert wait_until(lambda: not alive(int(ran.stdout)), 20)


# -- slices --------------------------------------------------------------------------------------


@pytest.mark.parametrize("zipped", [True, False])
def test_slices_are_those_of_the_tensor(tmp_path: Path, pickles: Pickles, zipped: bool) -> None:
    path, big = tmp_path / "a.bin", torch.randn(1000, 300)
    held = {
        "t": big.T.bfloat16(),  # not contiguous
        "shared": big,
        "part": torch.nn.Parameter(big[3:9, 1:]),
        "step": torch.tensor(3),
        "none": None,
    }
    if zipped:
        held["fp8"] = big.to(torch.float8_e4m3fn)
    torch.save({"module": held}, path, _use_new_zipfile_serialization=zipped)
    found = pickles.open(path)
    assert found == {
        "t": ("BF16", (300, 1000)),
        "shared": ("F32", (1000, 300)),
        "part": ("F32", (6, 299)),
        "step": ("I64", ()),
        **({"fp8": ("F8_E4M3", (1000, 300))} if zipped else {}),
    }
    for name in found.keys() - {"step"}:
        kind, (rows, columns) = found[name]
        for cuts in (slice(0, rows), slice(0, columns)), (slice(2, 5), slice(1, 200)), (slice(3, 3), slice(0, 1)):  # fmt: skip
            got, want = pickles.read(path, name, cuts, kind), held[name]
            assert isinstance(want, Tensor)
            assert torch.equal(got.float(), want.detach()[cuts].float())
    pickles.forget(path)


# -- *.bin ---------------------------------------------------------------------------------------


def save_bins(folder: Path, found: dict[str, Tensor]) -> None:
    names = [f"pytorch_model-0000{i}-of-00002.bin" for i in (1, 2)]
    placed = {tensor: names[i % 2] for i, tensor in enumerate(found)}
    for name in names:
        torch.save({t: found[t] for t in found if placed[t] == name}, folder / name)
    index = {"metadata": {}, "weight_map": placed}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


def test_shards_with_an_index_are_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And are read one at a time: a file that cannot be mapped is whole in memory."""
    now, most = set[Path](), 0
    opens, forgets = Pickles.open, Pickles.forget

    def open_one(self: Pickles, path: Path) -> FoundTensors:
        nonlocal most
        now.add(path)
        most = max(most, len(now))
        return opens(self, path)

    def forget(self: Pickles, path: Path) -> None:
        now.remove(path)
        forgets(self, path)

    monkeypatch.setattr(Pickles, "open", open_one)
    monkeypatch.setattr(Pickles, "forget", forget)
    make_checkpoint(tmp_path, tie_word_embeddings=True)
    want = take_apart(tmp_path)
    want["lm_head.weight"] = torch.randn(499, 96)
    save_bins(tmp_path, want)
    (tmp_path / "training_args.bin").write_bytes(b"never read")
    check_model_dir(tmp_path)
    spec = ModelSpec.from_dir(tmp_path)
    with read_checkpoint(tmp_path) as checkpoint:
        spec = as_stored(spec, checkpoint)
    model = build(tmp_path, spec, "fp32", torch.device("cpu"), 64)
    assert isinstance(model, Decoder)
    check_loaded(model, want)
    assert torch.equal(model.embedding.head, want["lm_head.weight"])
    assert (most, now) == (2, set())  # two to compare the output matrix with the embedding


def test_safetensors_are_preferred(tmp_path: Path) -> None:
    for name in ("training_args.bin", "pytorch_model.bin"):
        (tmp_path / name).write_bytes(b"")
    assert list(weight_files(tmp_path)) == [tmp_path / "pytorch_model.bin"]
    (tmp_path / "a.bin").write_bytes(b"")
    (tmp_path / "pytorch_model.bin").unlink()
    assert list(weight_files(tmp_path)) == [tmp_path / "a.bin"]
    (tmp_path / FILE).write_bytes(b"")
    assert list(weight_files(tmp_path)) == [tmp_path / FILE]


# -- DeepSpeed -----------------------------------------------------------------------------------

JOINED = {"q_proj": 0, "k_proj": 0, "v_proj": 0, "o_proj": 1, "gate_proj": 0, "up_proj": 0, "down_proj": 1}  # fmt: skip


def save_layers(folder: Path, num_shards: int) -> dict[str, Tensor]:
    """The checkpoint of ``folder`` as DeepSpeed writes it; what it held."""
    found = take_apart(folder)
    num_layers = ModelSpec.from_dir(folder).layers.__len__()
    single = {1: "model.embed_tokens", num_layers + 4: "model.norm", num_layers + 5: "lm_head"}
    for layer in (1, *range(3, num_layers + 3), num_layers + 4, num_layers + 5):
        prefix = single.get(layer, f"model.layers.{layer - 3}")
        ours = {n.removeprefix(f"{prefix}."): t for n, t in found.items() if n.startswith(prefix)}
        if layer in single:
            ours = {f"any.name.{layer}": ours["weight"]}
        for shard in range(num_shards):
            cut = {}
            for name, tensor in ours.items():
                dim = 0 if layer in (1, num_layers + 5) else JOINED.get(name.split(".")[-2])
                parts = (
                    (tensor,) * num_shards if dim is None else tensor.tensor_split(num_shards, dim)
                )
                cut[name] = parts[shard].clone()
            path = folder / f"layer_{layer:02}-model_{shard:02}-model_states.pt"
            torch.save({"module": cut} if layer == 3 else cut, path)
    return found


def test_layers_are_a_model(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "HF")
    make_checkpoint(tmp_path / "DS")
    save_layers(tmp_path / "DS", 3)
    check_model_dir(tmp_path / "DS", "DS")
    with pytest.raises(StartupError, match=r"a checkpoint of DeepSpeed \(layer_01-.*--load_way DS"):
        check_model_dir(tmp_path / "DS")
    told: dict[str, list[tuple[int, int]]] = {"DS": [], "HF": []}
    made, want = (
        build_model(
            tmp_path / way,
            ModelSpec.from_dir(tmp_path / way),
            SingleRank(),
            dtype="fp32",
            device=torch.device("cpu"),
            max_len=64,
            load_way=way,
            progress=lambda *done, way=way: told[way].append(done),
        )
        for way in ("DS", "HF")
    )
    params = {name: target.param for name, target in made.targets()}
    assert len(params) == 30
    assert all(torch.equal(params[name], target.param) for name, target in want.targets())
    total = sum(f.stat().st_size for f in weight_files(tmp_path / "DS", "DS"))
    assert told["DS"] == sorted(told["DS"])
    assert told["DS"][-1] == (total, total)


class Held:
    """A tensor that has been read."""

    kind = "F32"

    def __init__(self, tensor: Tensor) -> None:
        self.tensor, self.shape = tensor, tuple(tensor.shape)

    def read(self, index: Index, device: torch.device) -> Tensor:
        return self.tensor[index]


@pytest.mark.parametrize("dim", [0, 1])
def test_slices_of_shards_are_those_of_the_whole(dim: int) -> None:
    whole = torch.arange(60.0).reshape(6, 10)
    shards = [Held(part) for part in whole.split([1, 3, 2] if dim == 0 else [4, 1, 5], dim)]
    joined = JoinedShards(StoredTensor((Path("a"), Path("b"), Path("c")), "x", dim), shards)
    assert joined.shape == (6, 10)
    cuts = [slice(i, j) for i in range(6) for j in range(i + 1, 7)]
    for rows in cuts:
        for columns in cuts:
            got = joined.read((rows, columns), torch.device("cpu"))
            assert torch.equal(got, whole[rows, columns])


def test_shards_must_fit_each_other() -> None:
    shards = [Held(torch.ones(2, 3)), Held(torch.ones(2, 4))]
    with pytest.raises(
        StartupError, match=r"^b: x has type F32 and shape \[2, 4\], its other shard"
    ):
        JoinedShards(StoredTensor((Path("a"), Path("b")), "x", 0), shards)
    with pytest.raises(StartupError, match=r"^a: x has shape \[3\]: its shards cannot be joined"):
        JoinedShards(StoredTensor((Path("a"), Path("b")), "x", 1), [Held(torch.ones(3))] * 2)


def test_no_shard_has_more_tensors_than_the_first(tmp_path: Path) -> None:
    make_checkpoint(tmp_path)
    for shard, held in enumerate(({"w": torch.ones(2)}, {"w": torch.ones(2), "b": torch.ones(2)})):
        torch.save(held, tmp_path / f"layer_03-model_{shard:02}-model_states.pt")
    with pytest.raises(StartupError, match=r"model_01-\S+ holds b, and layer_03-model_00-\S+ does"):
        read_checkpoint(tmp_path, "DS", ModelSpec.from_dir(tmp_path))


def test_a_start_with_code_in_a_layer_is_refused(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, num_hidden_layers=1)
    make_tokenizer(tmp_path)
    save_layers(tmp_path, 1)
    bad = tmp_path / "layer_03-model_00-model_states.pt"
    torch.save({"a": Runs(tmp_path / "ran")}, bad)
    command = [sys.executable, "-m", "asyncllm", "--check", "--device", "cpu", "--load_way", "DS"]
    command += ["--model_dir", str(tmp_path)]
    ran = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert ran.returncode == 2
    assert ran.stderr.endswith(f"{bad} is refused: it holds more than tensors (posix.system)\n")
    assert "Traceback" not in ran.stderr
    assert not (tmp_path / "ran").exists()


def test_other_families_are_not_in_layers(tmp_path: Path) -> None:
    make_checkpoint(tmp_path)
    spec = replace(ModelSpec.from_dir(tmp_path), architecture="Qwen2ForCausalLM")
    with pytest.raises(StartupError, match="DS reads LlamaForCausalLM, and this is Qwen2ForCausal"):
        read_checkpoint(tmp_path, "DS", spec)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "holds no layer_XX-model_YY-model_states.pt, which --load_way DS reads"),
        (["1-model_00", "1-model_01", "3-model_00"], "lacks shard 1 of layer 3: there are 2 of"),
        (["1-model_00", "1-model_02"], "lacks shard 1 of layer 1"),
        (["1-model_00", "01-model_00"], "are both the same shard of a layer"),
    ],
)
def test_layers_must_be_whole(tmp_path: Path, names: list[str], message: str) -> None:
    for name in names:
        (tmp_path / f"layer_{name}-model_states.pt").write_bytes(b"")
    with pytest.raises(StartupError, match=message):
        layer_files(tmp_path)


def test_names_of_layer_files(tmp_path: Path) -> None:
    names = ["layer_01-model_00-model_states.pt", "layer_3-model_states.pt", "layer_04-model_00.pt"]
    for name in (*names, "layer_x-model_states.pt", "mp_rank_00_model_states.pt"):
        (tmp_path / name).write_bytes(b"")
    found = layer_files(tmp_path)
    assert found == {i: (tmp_path / name,) for i, name in zip((1, 3, 4), names, strict=True)}


def test_tensors_of_unexpected_layers_keep_their_layer() -> None:
    assert place(2, 5, frozenset({"a"})) == {"layer_2.a": ("a", None)}
    assert place(3, 5, frozenset({"self_attn.o_proj.bias"})) == {
        "model.layers.0.self_attn.o_proj.bias": ("self_attn.o_proj.bias", None)
    }
    with pytest.raises(StartupError, match=r"layer 9 \(model\.norm\.weight\) holds 2 tensors, 1"):
        place(9, 5, frozenset({"a", "b"}))
