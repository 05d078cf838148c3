"""A resumed run ends with the weights of an uninterrupted one, bit for bit in float32."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from lskip.callbacks.run_checkpoint import RunCheckpoint
from lskip.cli import main
from tests.models.reading.test_shards import into_shards

EPOCH = 12  # optimizer steps, each of two micro-batches of four rows of 16 tokens


GROWING = ("--early_exit_loss.curriculum=Gradual", "--layer_dropout.time=Exponential")
FALLING = (
    *("--layer_dropout.depth=Alternating", "--layer_dropout.time=Falling", "--layer_dropout.time.plateau=0.4"),
    *("--layer_dropout.time.decay=0.5", "--layer_dropout.scale_kept=true", "--exit_target=LK"),
    *("--early_exit_loss.shares.1=0.2", "--early_exit_loss.shares.3=0.2"),
)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    words = ["def", "return", "for", "in", "range", "if", "print", "x", "y", "1", "2", "(", ")", ":", "=", "+"]
    draw = random.Random(0)
    path = tmp_path_factory.mktemp("corpus") / "documents.jsonl"
    texts = (" ".join(draw.choices(words, k=20)) for _ in range(600))
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.fixture
def arguments(corpus, tiny_config):
    """Return a function (run folder, *more) that fits with everything that could differ after an interruption."""
    # attention_dropout draws from torch's own random stream, layer dropout from a stream of its own
    model = json.dumps(tiny_config(attention_dropout=0.2))

    def build(folder: Path, *more: str) -> list[str]:
        return [
            "fit",
            f"--model={model}",
            f"--run_folder={folder}",
            f"--data.source={corpus}",
            f"--data.cache_dir={corpus.parent / 'cache'}",
            "--data.block_size=16",
            "--data.batch_size=4",
            "--data.max_val_blocks=8",
            "--trainer.accelerator=cpu",
            "--trainer.accumulate_grad_batches=2",
            f"--trainer.limit_train_batches={2 * EPOCH}",
            "--trainer.enable_progress_bar=false",
            "--layer_dropout.p_max=0.5",
            "--layer_dropout.depth=Constant",
            "--early_exit_loss.curriculum=Rotational",
            "--early_exit_loss.curriculum.period=2",
            "--position_share=0.5",
            "--lr_scheduler.warmup_steps=3",
            *more,
        ]

    return build


def weights(folder: Path, step: int) -> dict[str, torch.Tensor]:
    checkpoint = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == step
    return checkpoint["state_dict"]


def assert_same(left: dict, right: dict) -> None:
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name


# Stops just before, at and after an epoch's end, and in its middle; checkpoints at steps of their own.
@pytest.mark.parametrize("stop", [1, 5, EPOCH - 1, EPOCH, EPOCH + 1, EPOCH + 5])
def test_a_stopped_run_goes_on(tmp_path, arguments, stop):
    steady = ("--lr_scheduler=null", "--trainer.max_epochs=-1")  # nothing that depends on the number of steps
    assert main(arguments(tmp_path / "whole", *steady, f"--trainer.max_steps={2 * EPOCH}")) == 0
    assert main(arguments(tmp_path / "parts", *steady, f"--trainer.max_steps={stop}")) == 0
    weights(tmp_path / "parts", stop)
    rest = ("--ckpt_path=last", f"--trainer.max_steps={2 * EPOCH}")
    assert main(arguments(tmp_path / "parts", *steady, *rest)) == 0
    assert_same(weights(tmp_path / "whole", 2 * EPOCH), weights(tmp_path / "parts", 2 * EPOCH))


def test_documents_stay_as_a_run_had_them(tmp_path, arguments, capsys):
    """Apart in a new run; joined in one of before they had a name."""

    def fit(name: str, steps: int, *more: str) -> int:
        steady = ("--lr_scheduler=null", "--trainer.max_epochs=-1", f"--trainer.max_steps={steps}")
        return main(arguments(tmp_path / name, *steady, *more))

    assert fit("whole", 8) == fit("apart", 8, "--data.documents=separate") == fit("parts", 4) == 0
    assert fit("joined", 8, "--data.documents=joined") == fit("earlier", 4, "--data.documents=joined") == 0
    path = tmp_path / "earlier" / "checkpoints" / "last.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    assert checkpoint["lskip"]["settings"].pop("data.documents") == "joined"
    torch.save(checkpoint, path)
    capsys.readouterr()
    assert fit("earlier", 6, "--data.documents=separate", "--ckpt_path=last") == 2
    assert "data.documents: 'separate', but this run has 'joined'" in capsys.readouterr().err
    assert fit("earlier", 8, "--ckpt_path=last") == fit("parts", 8, "--ckpt_path=last") == 0
    whole, apart, parts, joined, earlier = (
        weights(tmp_path / name, 8) for name in ("whole", "apart", "parts", "joined", "earlier")
    )
    assert_same(whole, apart)
    assert_same(whole, parts)
    assert_same(joined, earlier)
    assert any(not torch.equal(joined[name], whole[name]) for name in joined)


def test_a_run_goes_on_from_shards_and_is_measured(tmp_path, arguments, capsys):
    """What three devices saved is another form of what one has: the rest of the run, and its layers, are the same."""
    steady = ("--lr_scheduler=null", "--trainer.max_epochs=-1")
    assert main(arguments(tmp_path / "one", *steady, "--trainer.max_steps=5")) == 0
    shutil.copytree(tmp_path / "one", tmp_path / "three")
    path = tmp_path / "three" / "checkpoints" / "last.ckpt"
    whole = torch.load(path, weights_only=True)
    path.unlink()
    into_shards(whole, path, 3)
    measured = []
    for name in ("one", "three"):
        figure = f"--figure={tmp_path / name / 'figure.png'}"
        for command in (["validate", f"--model={tmp_path / name}"], ["compare", str(tmp_path / name), figure]):
            capsys.readouterr()
            assert main(command) == 0
            lines = capsys.readouterr().out.splitlines()
            measured.append([line for line in lines if line.startswith("│") and name not in line])
    assert measured[:2] == measured[2:] and all(measured)
    for name in ("one", "three"):
        rest = arguments(tmp_path / name, *steady, "--ckpt_path=last", "--trainer.max_steps=8")
        assert main(["validate", *rest[1:-1]]) == 0
        assert main(rest) == 0
    assert_same(weights(tmp_path / "one", 8), weights(tmp_path / "three", 8))
    assert {each.name for each in path.parent.iterdir()} == {"last.ckpt"}  # one file again, as not asked for shards


def test_checkpoints_are_only_made_after_a_whole_step(tmp_path, arguments, monkeypatch):
    """Half an accumulated gradient is in no checkpoint, so none may be saved with one: not even just resumed."""
    saved = []
    save = RunCheckpoint._save

    def spy(self, trainer):
        saved.append((trainer.global_step, trainer.fit_loop.epoch_loop.batch_progress.total.processed))
        save(self, trainer)

    often = ("--lr_scheduler=null", "--checkpoint.every_n_train_steps=4")
    assert main(arguments(tmp_path / "run", *often, "--trainer.max_steps=4")) == 0
    monkeypatch.setattr(RunCheckpoint, "_save", spy)
    assert main(arguments(tmp_path / "run", *often, "--trainer.max_steps=10", "--ckpt_path=last")) == 0
    assert saved == [(8, 16), (10, 20)]
    assert not list((tmp_path / "run" / "checkpoints").glob("*.partial"))


SLOW = """
import time
from lightning.pytorch import Callback


class Slow(Callback):
    def on_train_batch_start(self, *arguments):
        time.sleep(0.05)
"""


def start(arguments: list[str], folder: Path) -> subprocess.Popen:
    (folder / "slow_callback.py").write_text(SLOW)
    root = str(Path(__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{root}"}
    command = [sys.executable, "-m", "lskip", *arguments, "--trainer.callbacks+=slow_callback.Slow"]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for_step(process: subprocess.Popen, folder: Path, step: int) -> None:
    path = folder / "checkpoints" / "last.ckpt"
    for _ in range(1200):
        assert process.poll() is None, process.communicate()
        if path.exists() and torch.load(path, weights_only=True)["global_step"] >= step:
            return
        time.sleep(0.1)
    raise AssertionError("the run made no checkpoint")


@pytest.mark.kind("B24 signals", "B24", "M13")
@pytest.mark.parametrize(
    ("kind", "step", "recipe"), [(signal.SIGTERM, 4, FALLING), (signal.SIGKILL, EPOCH + 4, GROWING)]
)
def test_an_interrupted_run_goes_on(tmp_path, arguments, kind, step, recipe):
    twice = ("--trainer.max_epochs=2", "--checkpoint.every_n_train_steps=4")
    parts = arguments(tmp_path / "parts", *twice, *recipe)
    process = start(parts, tmp_path)
    wait_for_step(process, tmp_path / "parts", step)
    process.send_signal(kind)
    output, errors = process.communicate(timeout=60)
    stopped = torch.load(tmp_path / "parts" / "checkpoints" / "last.ckpt", weights_only=True)["global_step"]
    assert stopped < 2 * EPOCH
    if kind == signal.SIGTERM:  # Ctrl-C and other moments: test_run_folder
        assert process.returncode == 143
        assert "Traceback" not in output + errors
        assert errors.strip().endswith("--ckpt_path last") and f"after step {stopped}" in errors
    assert main([*parts, "--ckpt_path=last"]) == 0
    assert main(arguments(tmp_path / "whole", *twice, *recipe)) == 0
    assert_same(weights(tmp_path / "whole", 2 * EPOCH), weights(tmp_path / "parts", 2 * EPOCH))
