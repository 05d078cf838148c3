"""Sharded checkpoints: read as one in one file, and refused in a sentence where a file is broken or lies."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from lskip.cli import main
from lskip.export.to_hf import export
from lskip.inference import load_generator
from lskip.models.checkpoint import read_checkpoint
from lskip.models.pretrained import load_model, load_tokenizer
from lskip.models.reading import shards
from lskip.models.reading.shards import SavedTensor, files_of, read_all, shard_file, shards_of
from lskip.models.reading.sources import digest_of
from lskip.training.checkpoint_file import WholeFiles
from lskip.training.sharded_checkpoint import write_safetensors
from tests.export.test_to_hf import save

KIND = "B36 damaged and foreign checkpoints"
FOLDER = "last.ckpt.shards-7"


def into_shards(whole: dict, path: Path, ranks: int = 2) -> Path:
    """Write a checkpoint sharded, as its description says that so many ranks do; return its index's path."""
    folder = path.with_name(f"{path.name}.shards-7")
    folder.mkdir(parents=True)
    tensors, files = {}, {(kind, rank): {} for kind in ("weights", "optimizer") for rank in range(ranks)}

    def mark(key: str, value):
        if not isinstance(value, torch.Tensor) or not value.dim():
            return value
        kind, _, name = key.partition("/")
        entry = {"dtype": {4: "F32", 2: "BF16"}[value.element_size()], "shape": list(value.shape), "pieces": []}
        tensors[key], first = entry, 0
        for rank, rows in enumerate(value.chunk(ranks)):
            files[kind, rank][name] = rows
            entry["pieces"].append([rank, first, first + len(rows)])
            first += len(rows)
        return {"shard": key}

    rest = {**whole, "shards": folder.name}
    rest["state_dict"] = {name: mark(f"weights/{name}", value) for name, value in whole["state_dict"].items()}
    if "optimizer_states" in whole:
        names = list(whole["state_dict"])
        (state,) = whole["optimizer_states"]
        parts = {
            names[number]: {key: mark(f"optimizer/0/{names[number]}/{key}", value) for key, value in each.items()}
            for number, each in state["state"].items()
        }
        groups = [{**group, "params": [names[number] for number in group["params"]]} for group in state["param_groups"]]
        rest["optimizer_states"] = [{"state": parts, "param_groups": groups}]
    for (kind, rank), held in files.items():
        sums = write_safetensors(shard_file(folder, kind, rank), held) if held else {}
        for name, crc32 in sums.items():
            next(piece for piece in tensors[f"{kind}/{name}"]["pieces"] if piece[0] == rank).append(crc32)
    (folder / "index.json").write_text(json.dumps({"version": 1, "tensors": tensors}))
    torch.save(rest, path)
    return folder / "index.json"


def small() -> dict:
    """A checkpoint of three weights, one of a single row, and of AdamW's states."""
    draw = torch.Generator().manual_seed(0)
    weights = {
        "model.a": torch.randn(5, 3, generator=draw),
        "model.b": torch.randn(1, 4, generator=draw),
        "model.c": torch.randn(7, generator=draw).bfloat16(),
    }
    states = {n: {"step": torch.tensor(7.0), "exp_avg": part.float() + 1} for n, part in enumerate(weights.values())}
    optimizer = {"state": states, "param_groups": [{"params": [0, 2], "lr": 0.1}, {"params": [1], "lr": 0.1}]}
    return {"state_dict": weights, "optimizer_states": [optimizer], "lskip": {"config": {}}, "global_step": 7}


@pytest.fixture
def path(tmp_path):
    into_shards(small(), tmp_path / "last.ckpt")
    return tmp_path / "last.ckpt"


def assert_equal(found, expected, place="") -> None:
    """Assert that two nested containers hold the same, tensors bit for bit."""
    assert type(found) is type(expected), place
    if isinstance(expected, torch.Tensor):
        assert found.dtype == expected.dtype and torch.equal(found, expected), place
    elif isinstance(expected, dict):
        assert list(found) == list(expected), place
        for key, value in expected.items():
            assert_equal(found[key], value, f"{place}.{key}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), place
        for number, value in enumerate(expected):
            assert_equal(found[number], value, f"{place}.{number}")
    else:
        assert found == expected, place


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_it_comes_back_whole(tmp_path, ranks):
    into_shards(small(), tmp_path / "last.ckpt", ranks)
    found = WholeFiles().load_checkpoint(tmp_path / "last.ckpt", weights_only=True)
    assert found.pop("shards") == FOLDER
    # Numbers follow the groups: the second weight is in the second one.
    expected = small()
    state = expected["optimizer_states"][0]["state"]
    expected["optimizer_states"][0] = {
        "state": {0: state[0], 2: state[1], 1: state[2]},
        "param_groups": [{"params": [0, 1], "lr": 0.1}, {"params": [2], "lr": 0.1}],
    }
    assert {**found, "state_dict": 0, "optimizer_states": 0} == {**expected, "state_dict": 0, "optimizer_states": 0}
    assert_equal(found["state_dict"], expected["state_dict"])
    assert_equal(found["optimizer_states"], expected["optimizer_states"])


def test_rows_are_read_from_the_files_that_hold_them(path):
    saved = read_checkpoint(path, whole=True)
    assert all(isinstance(part, SavedTensor) for part in saved["state_dict"].values())
    shard_file(path.parent / FOLDER, "weights", 0).unlink()
    expected = small()["state_dict"]
    assert torch.equal(saved["state_dict"]["model.a"].read(3, 5), expected["model.a"][3:])
    assert torch.equal(saved["state_dict"]["model.c"].read(5, 6), expected["model.c"][5:6])
    assert saved["state_dict"]["model.a"].read(3, 3).shape == (0, 3)
    with pytest.raises(ValueError, match=r"model: '.*weights-00000.safetensors' is missing"):
        saved["state_dict"]["model.a"].read(2, 4)


def test_without_the_optimizer_its_files_are_not_needed(path):
    for file in (path.parent / FOLDER).glob("optimizer-*"):
        file.unlink()
    assert "optimizer_states" not in read_checkpoint(path)
    with pytest.raises(ValueError, match=r"ckpt_path: '.*optimizer-00000.safetensors' is missing"):
        read_checkpoint(path, "ckpt_path", whole=True)


def test_its_files_are_found_for_sizes_and_digests(path):
    names = {file.name for file in files_of(path)}
    assert names == {
        *("last.ckpt", "index.json", "weights-00000.safetensors", "weights-00001.safetensors"),
        *("optimizer-00000.safetensors", "optimizer-00001.safetensors"),
    }
    before = digest_of(str(path))
    for kind, changes in (("optimizer", False), ("weights", True)):
        file = shard_file(path.parent / FOLDER, kind, 1)
        file.write_bytes(file.read_bytes()[:-1] + b"\x55")
        assert (digest_of(str(path)) != before) == changes


# Models.


@pytest.fixture
def pair(tmp_path, tiny_model, tiny_tokenizer) -> tuple[Path, Path]:
    """A run with one file and a run with shards, of the same model."""
    one, other = tmp_path / "one", tmp_path / "other"
    torch.manual_seed(3)
    path = save(one / "checkpoints" / "last.ckpt", tiny_model(), tiny_tokenizer)
    into_shards(torch.load(path, weights_only=True), other / "checkpoints" / "last.ckpt", 3)
    return one, other


def test_a_model_is_that_of_one_file(pair, tmp_path):
    one, other = pair
    models = [load_model(str(run))[0].state_dict() for run in pair]
    assert_equal(dict(models[1]), dict(models[0]))
    assert load_tokenizer(str(other)).get_vocab() == load_tokenizer(str(one)).get_vocab()
    settings = {"temperature": 0.7, "seed": 1, "max_new_tokens": 12}
    texts = [load_generator(str(run), device="cpu").generate("def f", **settings).text for run in pair]
    for number, run in enumerate(pair):
        export(str(run), str(tmp_path / f"out{number}"))
    files = [(tmp_path / f"out{number}" / "model.safetensors").read_bytes() for number in (0, 1)]
    texts.append(load_generator(str(tmp_path / "out1"), device="cpu").generate("def f", **settings).text)
    assert files[0] == files[1] and len(set(texts)) == 1 and texts[0]
    assert main(["generate", f"--model={other}", "--device=cpu", "--prompt=x", "--max_new_tokens=2"]) == 0


# Broken and hostile files.


def changed(change):
    def act(path: Path) -> None:
        place = path.parent / FOLDER / "index.json"
        index = json.loads(place.read_text())
        change(index["tensors"]["weights/model.a"], index)
        place.write_text(json.dumps(index))

    return act


def written(text: str):
    return lambda path: (path.parent / FOLDER / "index.json").write_text(text)


def pointing(**entries):
    def act(path: Path) -> None:
        torch.save({**torch.load(path, weights_only=True), **entries}, path)

    return act


def on_file(change, name: str = "weights-00001.safetensors"):
    return lambda path: change(path.parent / FOLDER / name)


def other_weights(path: Path) -> None:
    write_safetensors(path, {"model.a": torch.zeros(2, 4), "model.b": torch.zeros(1, 4)})


def piped(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def grown(entry: dict, index: dict) -> None:
    entry["shape"] = [5, 2**47]


BROKEN = {
    "truncated shard": (
        on_file(lambda path: os.truncate(path, path.stat().st_size - 8)),
        "00001.safetensors' is damag",
    ),
    "empty shard": (on_file(lambda path: os.truncate(path, 0)), "00001.safetensors' is damaged"),
    "shard of zeros": (on_file(lambda path: path.write_bytes(bytes(500))), "00001.safetensors' is damaged"),
    "huge header": (
        on_file(lambda path: path.write_bytes((2**62).to_bytes(8, "little") + b"{}")),
        "00001.safetensors' is damaged",
    ),
    "missing shard": (on_file(Path.unlink), "00001.safetensors' is missing"),
    "a folder as shard": (on_file(lambda path: (path.unlink(), path.mkdir())), "00001.safetensors' is missing"),
    "a pipe as shard": (on_file(piped), "00001.safetensors' is missing"),
    "a shard of other shapes": (on_file(other_weights), "00001.safetensors' holds 'model.a' as F32 (2, 4)"),
    "a shard that lacks one": (
        on_file(lambda path: write_safetensors(path, {"x": torch.zeros(1)})),
        "00001.safetensors' lacks 'model.a'",
    ),
    "missing index": (on_file(Path.unlink, "index.json"), "index.json' is missing"),
    "missing folder": (lambda path: shutil.rmtree(path.parent / FOLDER), "the folder '.*shards-7' is missing"),
    "rows twice": (
        changed(lambda entry, _: entry["pieces"][1].__setitem__(1, 2)),
        "index.json': .*a': rows 2 to 5 are",
    ),
    "rows not at all": (changed(lambda entry, _: entry["pieces"].pop(0)), "rows 0 to 3 are in no file"),
    "rows missing at the end": (changed(lambda entry, _: entry["pieces"].pop()), "5 rows, but the files hold 3"),
    "a file twice": (changed(lambda entry, _: entry["pieces"][1].__setitem__(0, 0)), "a file is named twice"),
    "rows backwards": (changed(lambda entry, _: entry["pieces"][1].__setitem__(2, 1)), "rows 3 to 1 are"),
    "another shape": (changed(lambda entry, _: entry.update(shape=[5, 4])), "is not what index.json says"),
    "another dtype": (changed(lambda entry, _: entry.update(dtype="F16")), "is not what index.json says"),
    "no dtype": (changed(lambda entry, _: entry.update(dtype="../x")), "index.json': .* of dtype '../x', which is not"),
    "a huge shape": (changed(grown), "is not what index.json says"),
    "an absurd shape": (changed(lambda entry, _: entry.update(shape=[10**30])), "no shape that a tensor has"),
    "a shape of a fraction": (changed(lambda entry, _: entry.update(shape=[5.0, 3])), "no shape that a tensor has"),
    "a negative shape": (changed(lambda entry, _: entry.update(shape=[-5, 3])), "no shape that a tensor has"),
    "no dimension": (changed(lambda entry, _: entry.update(shape=[])), "no shape that a tensor has"),
    "many dimensions": (changed(lambda entry, _: entry.update(shape=[1] * 10**5)), "no shape that a tensor has"),
    "a path as rank": (changed(lambda entry, _: entry["pieces"][1].__setitem__(0, "../x")), "is made of no pieces"),
    "an absurd rank": (changed(lambda entry, _: entry["pieces"][1].__setitem__(0, 10**6)), "is made of no pieces"),
    "true as rank": (changed(lambda entry, _: entry["pieces"][1].__setitem__(0, True)), "is made of no pieces"),
    "a short piece": (changed(lambda entry, _: entry["pieces"][1].pop()), "is made of no pieces"),
    "pieces of text": (changed(lambda entry, _: entry.update(pieces="0 0 5")), "is made of no pieces"),
    "an entry of text": (changed(lambda _, index: index["tensors"].update({"weights/model.a": "x"})), "is no tensor"),
    "a weight left out": (changed(lambda _, index: index["tensors"].pop("weights/model.a")), "does not name 'weights/"),
    "another version": (changed(lambda _, index: index.update(version=2)), "index.json' is of version 2, not 1"),
    "no tensors": (changed(lambda _, index: index.update(tensors=[])), "index.json' is no index of shards"),
    "an empty index": (written(""), "index.json' is not JSON"),
    "a deep index": (written("[" * 10**5), "index.json' is not JSON that is read .too deeply"),
    "an index of a long number": (written("1" * 10**5), "index.json' is not JSON that is read"),
    "no text": (lambda path: (path.parent / FOLDER / "index.json").write_bytes(b"\xff\xfe\x00"), "index.json' is not"),
    "a folder above": (pointing(shards="../other.shards-7"), "last.ckpt' .*names no folder of shards"),
    "a folder at the top": (pointing(shards="/tmp/x.shards-7"), "last.ckpt' .*names no folder of shards"),
    "a number as folder": (pointing(shards=7), "last.ckpt' .*names no folder of shards"),
    "an unknown key": (pointing(state_dict={"model.a": {"shard": "../x"}}), "index.json' does not name '../x'"),
    "a key of no kind": (pointing(state_dict={"model.a": {"shard": ["x"]}}), "last.ckpt' .*its parts are not those"),
    "a state of a list": (pointing(optimizer_states=[[1]]), "last.ckpt' .*its parts are not those of a sharded one"),
    "states of a number": (pointing(optimizer_states=7), "last.ckpt' .*its parts are not those of a sharded one"),
    "groups of others": (
        pointing(optimizer_states=[{"state": {"x": {}}, "param_groups": []}]),
        "last.ckpt' .*its parts are not those of a sharded one",
    ),
}


@pytest.mark.kind(KIND)
@pytest.mark.parametrize(("act", "said"), BROKEN.values(), ids=list(BROKEN))
def test_what_is_broken_is_said_in_a_sentence(path, monkeypatch, act, said):
    act(path)
    monkeypatch.setattr(shards.SavedTensor, "read", lambda *_: pytest.fail("it was read before it was checked"))
    with pytest.raises(ValueError, match=said.replace("(", r"\(").replace(")", r"\)")) as raised:
        read_checkpoint(path, "ckpt_path", whole=True)
    assert str(raised.value).startswith("ckpt_path: ") and "\n" not in str(raised.value)
    assert len(str(raised.value)) < 400


@pytest.mark.kind(KIND)
@pytest.mark.parametrize("kind", ["weights", "optimizer"])
def test_a_changed_byte_is_found_when_it_is_read(path, kind):
    file = shard_file(path.parent / FOLDER, kind, 0)
    data = file.read_bytes()
    file.write_bytes(data[:-5] + bytes([data[-5] ^ 1]) + data[-4:])
    saved = read_checkpoint(path, "ckpt_path", whole=True)
    with pytest.raises(ValueError, match=rf"^ckpt_path: '.*{kind}-00000.safetensors' is damaged \("):
        read_all(saved)


@pytest.mark.kind(KIND)
def test_a_model_from_a_broken_one_is_refused(pair):
    file = shard_file(shards_of(pair[1] / "checkpoints" / "last.ckpt"), "weights", 2)
    os.truncate(file, file.stat().st_size // 2)
    with pytest.raises(ValueError, match=r"^model: '.*weights-00002.safetensors' is damaged"):
        load_model(str(pair[1]))
