"""Which files count, and checkpoints that do not hold what config.json says: one clear line."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from torch import Tensor

from asyncllm.engine.build import build_model
from asyncllm.engine.parallel import SingleRank
from asyncllm.errors import StartupError
from asyncllm.hub import check_model_dir
from asyncllm.models import tensors
from asyncllm.models.checkpoint import INDEX, as_stored, read_checkpoint
from asyncllm.models.llama import Decoder
from asyncllm.models.spec import ModelSpec
from tests.models.harness import build
from tests.models.test_llama import make_checkpoint

FILE = "model.safetensors"
NORM = "model.layers.1.input_layernorm.weight"


def load(model_dir: Path) -> Decoder:
    spec = as_stored(ModelSpec.from_dir(model_dir), read_checkpoint(model_dir))
    model = build(model_dir, spec, "fp32", torch.device("cpu"), 64)
    assert isinstance(model, Decoder)
    return model


def split(model_dir: Path, *names: str, index: bool = True) -> dict[str, Tensor]:
    """Spread the tensors over files of these names, instead of one; what they were."""
    found = load_file(model_dir / FILE)
    (model_dir / FILE).unlink()
    placed = {tensor: names[i % len(names)] for i, tensor in enumerate(sorted(found))}
    for name in names:
        save_file({t: found[t] for t in found if placed[t] == name}, model_dir / name)
    if index:
        (model_dir / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": placed}))
    return found


def zeros(model_dir: Path, name: str, **more: Tensor) -> None:
    """A file with every tensor of the model, all zero."""
    like = make_checkpoint(model_dir / "like").state_dict()
    save_file({t: torch.zeros_like(v) for t, v in like.items()} | more, model_dir / name)
    shutil.rmtree(model_dir / "like")


def check_loaded(model: Decoder, want: dict[str, Tensor]) -> None:
    for name, target in model.targets():
        for start, into, length in target.spans:
            ours = target.param.narrow(target.dim, into, length)
            assert torch.equal(ours, want[name].narrow(target.dim, start, length)), name


def test_two_buffers_are_taken_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """With host memory in the place of pinned memory and of a GPU's: results lie in the buffers."""
    waited: list[int] = []

    class Event:
        made = 0

        def __init__(self) -> None:
            Event.made += 1
            self.number = Event.made

        def synchronize(self) -> None:
            waited.append(self.number)

    empty = torch.empty
    monkeypatch.setattr(tensors, "_marked", Event)
    monkeypatch.setattr(torch.cuda, "device", contextlib.nullcontext)
    monkeypatch.setattr(torch, "empty", lambda *size, pin_memory=False, **kw: empty(*size, **kw))
    matrix = torch.arange(60.0).view(6, 10)
    parts = [
        matrix[:2], matrix[:, 3:5].bfloat16(), matrix.t()[2:4], torch.tensor(7),
        matrix[4:].to(torch.float8_e4m3fn), empty(0, 3),
    ]  # fmt: skip
    buffers, cpu = tensors.PinnedBuffers(), torch.device("cpu")
    buffers.wait()
    assert not waited, "nothing has been copied"
    before = parts[0], buffers.to(cpu, parts[0])
    for part in parts[1:]:
        found = buffers.to(cpu, part)
        for want, copied in (before, (part, found)):
            assert copied.dtype == want.dtype
            assert torch.equal(copied.float(), want.float())
        before = part, found
    assert waited == [1, 2, 3, 4], "each copy waits for the one before last"
    buffers.wait()
    assert waited[-1] == 7, "for all that is queued by now"


@pytest.mark.gpu
def test_slices_of_many_sizes_reach_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through two pinned buffers that are used in turn and grow."""
    want = make_checkpoint(tmp_path).state_dict()
    split(tmp_path, "a.safetensors", "b.safetensors")
    for chunk in (1 << 22, 100):
        monkeypatch.setattr("asyncllm.models.weights._CHUNK", chunk)
        spec = as_stored(ModelSpec.from_dir(tmp_path), read_checkpoint(tmp_path))
        model = build(tmp_path, spec, "fp32", torch.device("cuda"), 64)
        assert isinstance(model, Decoder)
        check_loaded(model, {name: tensor.cuda() for name, tensor in want.items()})


def change(model_dir: Path, **tensors: Tensor | None) -> None:
    """Set or drop tensors of the checkpoint; "__" in a name stands for a dot."""
    found = load_file(model_dir / FILE)
    for name, tensor in tensors.items():
        name = name.replace("__", ".")
        if tensor is None:
            del found[name]
        else:
            found[name] = tensor
    save_file(found, model_dir / FILE)


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    make_checkpoint(tmp_path)
    change(tmp_path, model__layers__1__input_layernorm__weight=None, model__norm__weight=None)
    with pytest.raises(StartupError) as error:
        load(tmp_path)
    assert str(error.value) == f"{tmp_path} lacks 2 tensors, the first: {NORM}"


def test_an_unknown_tensor_is_named_with_its_file(tmp_path: Path) -> None:
    make_checkpoint(tmp_path)
    change(tmp_path, model__layers__0__self_attn__q_norm__weight=torch.ones(16))
    with pytest.raises(StartupError) as error:
        load(tmp_path)
    assert str(error.value) == (
        f"{tmp_path / FILE} holds 1 unknown tensors, the first: "
        "model.layers.0.self_attn.q_norm.weight"
    )


def test_the_name_of_an_unknown_tensor_is_fit_for_a_terminal(tmp_path: Path) -> None:
    make_checkpoint(tmp_path)
    change(tmp_path, **{"\x1b[2J\n" + "x" * 10**5: torch.ones(16)})
    with pytest.raises(StartupError, match=r"the first: '\\x1b\[2J\\nx{100,200}$"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("name", "shape", "wanted"),
    [
        (NORM, [95], [96]),
        ("model.layers.0.self_attn.q_proj.weight", [96, 95], [96, 96]),
        ("model.layers.0.self_attn.k_proj.weight", [16, 96], [32, 96]),
        ("model.layers.2.mlp.down_proj.weight", [96, 161], [96, 160]),
        ("model.embed_tokens.weight", [500, 96], [499, 96]),
        ("lm_head.weight", [499], [499, 96]),
    ],
)
def test_a_tensor_of_another_shape_is_named(
    tmp_path: Path, name: str, shape: list[int], wanted: list[int]
) -> None:
    make_checkpoint(tmp_path)
    change(tmp_path, **{name.replace(".", "__"): torch.zeros(shape)})
    with pytest.raises(StartupError) as error:
        load(tmp_path)
    assert str(error.value) == (
        f"{tmp_path / FILE}: {name} has shape {shape}, config.json wants {wanted}"
    )


@pytest.mark.parametrize("damage", ["cut", "header", "empty"])
def test_a_damaged_file_is_named(tmp_path: Path, damage: str) -> None:
    make_checkpoint(tmp_path)
    raw = (tmp_path / FILE).read_bytes()
    broken = {"cut": raw[:-100], "header": b"\xff" * 8 + raw[8:], "empty": b""}
    (tmp_path / FILE).write_bytes(broken[damage])
    with pytest.raises(StartupError, match=rf"^{tmp_path / FILE} cannot be read: .+") as error:
        load(tmp_path)
    assert "\n" not in str(error.value)


SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
STRAYS = ("z.safetensors", "consolidated.safetensors", "adapter_model.safetensors", "a.safetensors")


@pytest.mark.parametrize("stray", [*STRAYS, FILE])
def test_with_an_index_only_what_it_names_counts(tmp_path: Path, stray: str) -> None:
    make_checkpoint(tmp_path)
    want = split(tmp_path, *SHARDS)
    zeros(tmp_path, stray, unknown=torch.zeros(1))
    check_loaded(load(tmp_path), want)


@pytest.mark.parametrize("order", [SHARDS, SHARDS[::-1]])
def test_each_tensor_comes_from_the_file_that_the_index_names(
    tmp_path: Path, order: tuple[str, str]
) -> None:
    make_checkpoint(tmp_path)
    want = split(tmp_path, *order)
    other = {t: torch.zeros_like(v) for t, v in want.items()} | {"unknown": torch.zeros(1)}
    for name in order:  # every shard has every tensor, and one that nobody knows
        save_file(other | load_file(tmp_path / name), tmp_path / name)
    check_loaded(load(tmp_path), want)


@pytest.mark.parametrize("stray", [*STRAYS, *SHARDS])
def test_without_an_index_it_is_the_usual_file(tmp_path: Path, stray: str) -> None:
    make_checkpoint(tmp_path)
    want = load_file(tmp_path / FILE)
    zeros(tmp_path, stray)
    check_loaded(load(tmp_path), want)


@pytest.mark.parametrize("left", [0, 1])
def test_an_old_index_beside_a_whole_file(tmp_path: Path, left: int) -> None:
    make_checkpoint(tmp_path)
    whole = (tmp_path / FILE).read_bytes()
    want = split(tmp_path, *SHARDS)
    (tmp_path / FILE).write_bytes(whole)
    for name in SHARDS[left:]:
        (tmp_path / name).unlink()
    check_loaded(load(tmp_path), want)


@pytest.mark.parametrize("names", [SHARDS, ("weights.safetensors",), ("a.safetensors", "b.safetensors")])  # fmt: skip
def test_other_names_without_an_index(tmp_path: Path, names: tuple[str, ...]) -> None:
    make_checkpoint(tmp_path)
    want = split(tmp_path, *names, index=False)
    for stray in ("consolidated.safetensors", "adapter_model.safetensors", "._a.safetensors"):
        zeros(tmp_path, stray)
    check_loaded(load(tmp_path), want)


def test_without_an_index_two_files_may_not_hold_the_same(tmp_path: Path) -> None:
    make_checkpoint(tmp_path)
    split(tmp_path, "b.safetensors", index=False)
    save_file({NORM: torch.zeros(96)}, tmp_path / "a.safetensors")
    with pytest.raises(StartupError) as error:
        load(tmp_path)
    assert str(error.value) == (
        f"{tmp_path / 'a.safetensors'} and {tmp_path / 'b.safetensors'} both hold {NORM}, and there "
        f"is no {INDEX} to tell which counts; remove one of the files"
    )


@pytest.mark.parametrize("index", [True, False])
def test_a_missing_shard_is_named(tmp_path: Path, index: bool) -> None:
    make_checkpoint(tmp_path)
    split(tmp_path, *SHARDS, index=index)
    (tmp_path / SHARDS[1]).unlink()
    with pytest.raises(StartupError, match=rf"^{tmp_path} lacks {SHARDS[1]}"):
        load(tmp_path)


@pytest.mark.parametrize("place", ["/nowhere/", "../", "sub/../../"])
def test_an_index_names_files_of_its_folder(tmp_path: Path, place: str) -> None:
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {NORM: f"{place}{FILE}"}}))
    with pytest.raises(StartupError, match=f"^{tmp_path / INDEX} names .*outside the folder$"):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["", "a\0b", "x" * 5000, FILE])
def test_an_index_may_name_what_no_file_can_be_called(tmp_path: Path, name: str) -> None:
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {NORM: name}}))
    with pytest.raises(StartupError, match=f"^{tmp_path} lacks .{{0,210}}, named in"):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "[" * 100_000, '{"weight_map": {"a": null}}'])
def test_an_index_that_is_none_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / INDEX).write_text(text)
    with pytest.raises(StartupError, match=f"^{tmp_path / INDEX} is not an index of weights: "):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize("kind", [torch.int8, torch.uint8, torch.bool])
def test_weights_that_are_no_fractions_are_refused(tmp_path: Path, kind: torch.dtype) -> None:
    make_checkpoint(tmp_path)
    change(tmp_path, model__norm__weight=torch.ones(96, dtype=kind))
    with pytest.raises(StartupError, match=r"norm\.weight has type [A-Z0-9]+: weights of"):
        load(tmp_path)


def test_a_shard_without_what_the_index_places_there_is_named(tmp_path: Path) -> None:
    make_checkpoint(tmp_path)
    split(tmp_path, *SHARDS)
    for name in SHARDS:
        found = load_file(tmp_path / name)
        if NORM in found:
            where = name
            del found[NORM]
            save_file(found, tmp_path / name)
    with pytest.raises(StartupError) as error:
        load(tmp_path)
    assert str(error.value) == f"{tmp_path / where} lacks 1 tensors, the first: {NORM}"


def test_a_tensor_that_the_index_does_not_name_is_missing(tmp_path: Path) -> None:
    make_checkpoint(tmp_path)
    split(tmp_path, *SHARDS)
    index = json.loads((tmp_path / INDEX).read_text())
    del index["weight_map"][NORM]
    (tmp_path / INDEX).write_text(json.dumps(index))
    with pytest.raises(StartupError) as error:
        load(tmp_path)
    assert str(error.value) == f"{tmp_path} lacks 1 tensors, the first: {NORM}"


@pytest.mark.parametrize(
    "damage", [lambda raw: raw[:-100], lambda raw: b"", lambda raw: b"junk" * 9]
)
def test_a_damaged_shard_is_named(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    make_checkpoint(tmp_path)
    split(tmp_path, *SHARDS)
    path = tmp_path / SHARDS[1]
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(StartupError, match=rf"^{path} cannot be read: .+"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("left", "message"),
    [
        ((), "holds no *.safetensors and no *.bin; weights in other formats"),
        (("adapter_model.safetensors",), "holds an adapter (adapter_model.safetensors), not a"),
        (("consolidated.safetensors",), "under the usual names, only consolidated.safetensors"),
    ],
)
def test_a_directory_without_a_model_is_refused(
    tmp_path: Path, left: tuple[str, ...], message: str
) -> None:
    make_checkpoint(tmp_path)
    (tmp_path / FILE).unlink()
    for name in left:
        zeros(tmp_path, name)
    with pytest.raises(StartupError) as error:
        check_model_dir(tmp_path)
    assert str(error.value).startswith(f"{tmp_path} holds ")
    assert message in str(error.value)


@pytest.mark.parametrize("shards", [False, True])
def test_a_tied_model_with_another_output_matrix_uses_it(tmp_path: Path, shards: bool) -> None:
    make_checkpoint(tmp_path, tie_word_embeddings=True)
    head = torch.randn(499, 96)
    change(tmp_path, lm_head__weight=head)
    if shards:
        split(tmp_path, *SHARDS)
    model = load(tmp_path)
    assert torch.equal(model.embedding.head, head)
    assert not model.spec.tie_embeddings


def test_a_tied_model_may_hold_its_embedding_twice(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, tie_word_embeddings=True)
    embed = load_file(tmp_path / FILE)["model.embed_tokens.weight"]
    change(tmp_path, lm_head__weight=embed.clone())
    model = load(tmp_path)
    assert model.spec.tie_embeddings
    assert model.embedding.head.data_ptr() == model.embedding.table.data_ptr()


def test_another_output_matrix_is_told_once(tmp_path: Path) -> None:
    """By --check, which tells the larger model, too."""
    make_checkpoint(tmp_path, tie_word_embeddings=True)
    make_tokenizer(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"temperature": 0.6, "top_k": 20}')
    told = []
    for head in (
        load_file(tmp_path / FILE)["model.embed_tokens.weight"].clone(),
        torch.ones(499, 96),
    ):
        change(tmp_path, lm_head__weight=head)
        command = [sys.executable, "-m", "asyncllm", "--check", "--device", "cpu", "--model_dir"]
        ran = subprocess.run(
            [*command, str(tmp_path)], capture_output=True, text=True, check=True, timeout=120
        )
        told.append((ran.stderr.count("lm_head.weight is a different matrix"), ran.stdout))
    assert [count for count, _ in told] == [0, 1]
    assert "by default: temperature 0.6, top_k 20 (generation_config.json)" in told[0][1]
    weights = [int(t.split(" weights")[0].split()[-1].replace(",", "")) for _, t in told]
    assert weights[1] - weights[0] == 499 * 96


def make_tokenizer(folder: Path) -> None:
    Tokenizer(models.BPE({"a": 0}, [])).save(str(folder / "tokenizer.json"))


def test_what_progress_raises_ends_the_reading_of_all_files(tmp_path: Path) -> None:
    """This is how the rest of a start ends it."""
    make_checkpoint(tmp_path)
    names = [f"model-{i:05d}-of-00006.safetensors" for i in range(1, 7)]
    split(tmp_path, *names)
    told: list[int] = []

    def progress(done: int, total: int) -> None:
        told.append(done)
        raise KeyError("enough")

    spec = as_stored(ModelSpec.from_dir(tmp_path), read_checkpoint(tmp_path))
    with pytest.raises(KeyError, match="enough"):
        build_model(
            tmp_path, spec, SingleRank(), dtype="fp32", device=torch.device("cpu"), max_len=64,
            progress=progress,
        )  # fmt: skip
    assert 1 <= len(told) <= len(names)


def test_progress_counts_every_tensor_and_reaches_the_end(tmp_path: Path) -> None:
    make_checkpoint(tmp_path)
    names = ["a.safetensors", "b.safetensors"]
    num = len(split(tmp_path, *names))
    told: list[tuple[int, int]] = []
    spec = as_stored(ModelSpec.from_dir(tmp_path), read_checkpoint(tmp_path))
    build_model(
        tmp_path, spec, SingleRank(), dtype="fp32", device=torch.device("cpu"), max_len=64,
        progress=lambda done, total: told.append((done, total)),
    )  # fmt: skip
    total = sum((tmp_path / name).stat().st_size for name in names)
    assert told[-1] == (total, total)
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    assert len(told) == num + len(names)
