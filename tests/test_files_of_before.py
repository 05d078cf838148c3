"""Files of 0.1.0 go on: tests/fixtures/before_0_1, made at ab0060e by tests/fixtures/make_before.py."""

import json
import os
import re
import runpy
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lskip.data import TextData
from lskip.inference import CostAwareDraft, LearnedExit, load_generator
from lskip.module import LayerSkipModule

BEFORE = Path(__file__).parent / "fixtures" / "before_0_1"
EXPECTED = json.loads((BEFORE / "expected" / "expected.json").read_text())
STAMP = 1_700_000_000  # when the data was written: a part of its name in the cache
CHECKPOINT = Path("run", "checkpoints", "last.ckpt")
PREDICT = [
    "predict",
    "--prompts=prompts.txt",
    "--output=answers.jsonl",
    "--model=run",
    "--exit_layer=2",
    "--draft=layers",
]
PREDICT += ["--num_speculations=3", "--batch_size=1", "--temperature=0.7", "--max_new_tokens=48", "--device=cpu"]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A copy of the files, where the test runs: their paths are relative."""
    copy = Path(shutil.copytree(BEFORE, tmp_path / "before"))
    os.utime(copy / "data.jsonl", (STAMP, STAMP))
    monkeypatch.chdir(copy)
    return copy


@pytest.fixture
def lskip(monkeypatch):
    """Function (*arguments): `python -m lskip`, which must succeed."""

    def call(*arguments: str) -> None:
        monkeypatch.setattr(sys, "argv", ["lskip", *arguments])
        monkeypatch.setattr(sys, "path", ["", *sys.path])  # python -m puts the working directory in front
        with pytest.raises(SystemExit) as ended:
            runpy.run_module("lskip", run_name="__main__", alter_sys=True)
        assert not ended.value.code

    return call


def test_a_run_goes_on_with_the_same_weights(lskip):
    lskip("fit", "--config=run/config.yaml", "--ckpt_path=last", "--trainer.max_steps=22")
    resumed = torch.load(CHECKPOINT, weights_only=True)
    assert resumed["global_step"] == 22 and set(EXPECTED["checkpoint"]) <= set(resumed)
    weights, expected = resumed["state_dict"], load_file(BEFORE / "expected" / "resumed.safetensors")
    assert sorted(weights) == sorted(expected)
    started = torch.load(BEFORE / CHECKPOINT, weights_only=True)["state_dict"]
    for name, part in expected.items():
        assert not torch.equal(weights[name], started[name]), name
        torch.testing.assert_close(weights[name], part, rtol=1e-3, atol=1e-4)


def test_the_keys_of_a_checkpoint_are_those_of_a_module():
    saved = torch.load(CHECKPOINT, weights_only=True)["state_dict"]
    module = LayerSkipModule("run")
    assert sorted(module.state_dict()) == sorted(saved) == EXPECTED["state_dict"]
    assert any(name.startswith("exits.certainty.") for name in saved)
    assert all(torch.equal(part, saved[name]) for name, part in module.state_dict().items())


def test_layers_are_measured_as_before(lskip, capsys):
    lskip("validate", "--model=run")
    rows = re.compile(r"(\d+) │ +([\d.]+) │ +([\d.]+) │")
    found, expected = (rows.findall(text) for text in (capsys.readouterr().out, EXPECTED["validated"]))
    assert len(expected) == 3 and len(found) == 3
    for row, was in zip(found, expected, strict=True):
        assert [float(number) for number in row] == pytest.approx([float(number) for number in was], abs=0.011)


@pytest.mark.parametrize(
    ("way", "loading", "settings"),
    [
        ("autoregressive", {}, {}),
        ("layers", {}, {"exit_layer": 2, "num_speculations": 3}),
        ("exit", {}, {"exit_layer": 2}),
        ("learned", {}, {"exit_criterion": LearnedExit(0.4)}),
        ("adapter", {"exit_adapter": "adapter"}, {"num_speculations": 2}),
        (
            "costs",
            {"costs_file": "costs.json"},
            {"draft_policy": CostAwareDraft(), "exit_layer": 2, "num_speculations": 4},
        ),
    ],
)
def test_texts_are_those_of_before(folder, way, loading, settings):
    costs = json.loads(Path("costs.json").read_text())
    generator = load_generator("run", device="cpu", **loading)
    found = generator.generate("for x in", temperature=0.0, max_new_tokens=24, **settings)
    expected = EXPECTED["generated"][way]
    assert (found.text, len(found.token_ids), found.finish_reason) == (
        expected["text"], expected["tokens"], expected["finish_reason"],
    )  # fmt: skip
    assert bool(found.drafted) == ("num_speculations" in settings)
    kept = json.loads(Path("costs.json").read_text())
    assert (
        kept.pop("learnt", None) is None or way == "costs"
    )  # what the policy learnt is added, no cost is measured anew
    kept.pop("layouts", None)  # these files had none
    assert kept == costs


@pytest.mark.parametrize("task", ["task", "drafting"])
def test_a_tuned_task_is_gone_by(lskip, capsys, task):
    lskip(
        *("generate", "--model=run", "--prompt=for x in", "--json=true", "--temperature=0", "--max_new_tokens=24"),
        *("--device=cpu", f"--task={task}"),
    )
    found = json.loads(capsys.readouterr().out)
    expected = EXPECTED["generated"][task]
    assert {key: found[key] for key in expected} == expected
    assert (found["acceptance_rate"] is not None) == (task == "drafting")


def test_half_done_answers_go_on(lskip):
    begun = Path("answers.jsonl").read_text().splitlines()
    lskip(*PREDICT, "--resume=true")
    rows = Path("answers.jsonl").read_text().splitlines()
    assert 0 < len(begun) < len(rows) and set(begun) <= set(rows)  # not answered anew
    assert [json.loads(row)["text"] for row in rows] == EXPECTED["answers"]
    assert not Path(".answers.jsonl.settings.json").exists()


def test_cached_data_is_found_again():
    """Documents and the tokenizer, that is; rows that were cached ready-made stay as they are, unread."""

    def files() -> dict:
        return {path: path.stat().st_mtime_ns for path in Path("cache").rglob("*") if path.is_file()}

    before = files()
    arguments = {"vocab_size": 300, "block_size": 16, "batch_size": 4, "val_fraction": 0.2, "test_fraction": 0.1}
    data = TextData(source="data.jsonl", cache_dir="cache", max_val_blocks=8, **arguments)
    data.setup("fit")
    assert len(data.blocks("train")) > 20 and len(data.blocks("val")) == 8
    added = files().items() - before.items()
    assert before and before.items() <= files().items() and {path.parts[1] for path, _ in added} == {"tokens"}
