"""The two files of an exit adapter: what is damaged or of another model is told in a sentence that names the folder."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file

from lskip.adapters.unroll import draft_metrics
from lskip.models.exit_adapter import AdapterShape, ExitAdapter, load_adapter


@pytest.fixture
def saved(tiny_model, tmp_path):
    """(model, folder of its adapter)."""
    model = tiny_model()
    ExitAdapter(model, AdapterShape(2)).save(tmp_path / "mine")
    return model, tmp_path / "mine"


def say(**fields):
    def change(folder):
        description = json.loads((folder / "adapter.json").read_text()) | fields
        (folder / "adapter.json").write_text(json.dumps({k: v for k, v in description.items() if v is not None}))

    return change


def fill(value: float):
    def change(folder):
        weights = load_file(folder / "adapter.safetensors")
        weights["join.weight"][3, 5] = value
        save_file(weights, folder / "adapter.safetensors")

    return change


def write(name: str, content: bytes):
    return lambda folder: (folder / name).write_bytes(content)


def words(change):
    return weigh(lambda part: part, change)


def weigh(change, of_words=lambda ids: ids):
    def act(folder):
        weights = load_file(folder / "adapter.safetensors")
        ids = of_words(weights.pop("token_ids"))
        weights = {name: change(part).contiguous() for name, part in weights.items()}
        save_file({**weights, "token_ids": ids.contiguous()}, folder / "adapter.safetensors")

    return act


def drop(folder) -> None:
    weights = load_file(folder / "adapter.safetensors")
    del weights["token_ids"]
    save_file(weights, folder / "adapter.safetensors")


DAMAGE = {
    "B18 weights cut": lambda folder: write("adapter.safetensors", (folder / "adapter.safetensors").read_bytes()[:900])(
        folder
    ),
    "weights empty": write("adapter.safetensors", b""),
    "weights garbage": write("adapter.safetensors", b"\xff" * 500),
    "B1 NaN": fill(float("nan")),
    "infinity": fill(float("inf")),
    "no token_ids": drop,
    "token_ids in two dimensions": words(lambda ids: ids[None]),
    "token_ids beyond the vocabulary": words(lambda ids: ids + 10**6),
    "weights of eight bits": weigh(lambda part: (part.float() * math.nan).to(torch.float8_e4m3fn)),
    "shape cut": write("adapter.json", b'{"exit_layer": 2'),
    "shape a list": write("adapter.json", b"[]"),
    "shape a number": write("adapter.json", b"5"),
    "shape garbage": write("adapter.json", b"\x80\x02\xff"),
    "5000 digits": write("adapter.json", b'{"exit_layer": ' + b"9" * 5000 + b"}"),
    "another field": say(path="../../etc/passwd"),
    "no exit_layer": say(exit_layer=None),
    "an exit_layer in words": say(exit_layer="two"),
    "an exit_layer below 1": say(exit_layer=-1),
    "an exit_layer beyond the model": say(exit_layer=99),
    "more blocks than the model": say(num_blocks=10**9),
    "joins in words": say(joins_last_state="no"),
    "of another model": say(model={"num_layers": 4}),
}


@pytest.mark.kind("B18 damaged caches and files")
@pytest.mark.parametrize("change", DAMAGE.values(), ids=DAMAGE)
def test_damaged_files_are_named(saved, change):
    model, folder = saved
    change(folder)
    with pytest.raises(ValueError, match=r"^exit_adapter: .*mine'"):
        load_adapter(folder, model)


@pytest.mark.kind("K17 metrics")
def test_a_draft_step_that_no_answer_reaches_has_no_agreement():
    found = draft_metrics([torch.ones(2, 6, dtype=torch.bool)])
    assert found["agreement"] == [1.0, 1.0, None, None, None, None]
    assert json.loads(json.dumps(found, allow_nan=False))["draft_agreement"] == 1.0
