"""A run's folder: one writer, nothing left of what never began, nothing begun that cannot be saved."""

import copy
import errno
import json
import os
import shutil
import signal
from collections import namedtuple
from contextlib import nullcontext

import pytest
import torch
import yaml
from lightning.pytorch.cli import LightningArgumentParser

from lskip.cli import main
from lskip.cli.runs.run_folder import check_room, run_place
from lskip.data import TextData
from lskip.module import LayerSkipModule
from lskip.utils.interrupts import Terminated
from lskip.utils.output_files import only_writer
from tests.conftest import make_config, make_model
from tests.models.reading.test_shards import into_shards


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_tokenizer):
    folder = tmp_path_factory.mktemp("place")
    texts = [json.dumps({"text": f"def f{i}(x):\n    return x + {i}\n" * 4}) for i in range(60)]
    (folder / "corpus.jsonl").write_text("\n".join(texts))
    make_model().save_pretrained(folder / "model")
    tiny_tokenizer.save_pretrained(folder / "model")
    three_more = copy.deepcopy(tiny_tokenizer)
    three_more.add_special_tokens({"additional_special_tokens": ["<a>", "<b>", "<c>"]})
    three_more.save_pretrained(folder / "three_more")
    return folder


@pytest.fixture
def run(place, tmp_path, capsys):
    """Function (command, *more) -> (exit code, last line of what was said), with run folder tmp_path/run."""

    def call(command: str, *more: str):
        arguments = {
            "model": json.dumps(make_config()),
            "run_folder": tmp_path / "run",
            "data.source": place / "corpus.jsonl",
            "data.cache_dir": place / "cache",
            "data.block_size": 16,
            "data.batch_size": 4,
            "data.max_val_blocks": 8,
            "trainer.accelerator": "cpu",
            "trainer.enable_progress_bar": "false",
            "trainer.enable_model_summary": "false",
        }
        code = main([command, *(f"--{key}={value}" for key, value in arguments.items()), *more])
        return code, capsys.readouterr().err.rstrip("\n").rpartition("\n")[2]

    return call


def saved_step(folder) -> int:
    return torch.load(folder / "run" / "checkpoints" / "last.ckpt", weights_only=True)["global_step"]


REFUSED = {
    "B48 fit": ("fit", ["--model=/nope"], "model: "),
    "B48 validate": ("validate", ["--model=/nope"], "model: "),
    "test": ("test", ["--model=/nope"], "model: "),
    "data": ("fit", ["--data.source=/nope.jsonl"], "/nope.jsonl"),
    "too few rows": ("fit", ["--data.batch_size=10000"], "batch_size: 10000"),
    "optimizer": ("fit", ["--optimizer.lr=-1"], "optimizer.lr: -1.0 is not"),
    "deeper": ("fit", ["--model=/nope", "--run_folder={tmp}/run/a/b/c"], "model: "),
}


@pytest.mark.kind("B48 what is refused leaves nothing")
@pytest.mark.parametrize(("command", "more", "said"), REFUSED.values(), ids=REFUSED)
def test_a_refused_command_leaves_no_folder(run, tmp_path, command, more, said):
    code, sentence = run(command, *(part.format(tmp=tmp_path) for part in more))
    assert code == 2 and said in sentence
    assert not list(tmp_path.iterdir())


@pytest.mark.kind("B48 what is refused leaves nothing")
def test_what_was_there_before_stays(run, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    assert run("fit", "--model=/nope")[0] == 2
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["notes.txt"]


GROWING = ("--layer_dropout=LayerDropout", "--layer_dropout.time=Exponential", "--early_exit_loss.curriculum=Gradual")


@pytest.mark.kind("M a new user's first hour")
@pytest.mark.parametrize(
    "more",
    [
        ["--trainer.fast_dev_run=true"],
        ["--trainer.fast_dev_run=2"],
        ["--trainer.fast_dev_run=1", "--lr_scheduler=null"],
    ],
    ids=["M9 true", "two", "no schedule"],
)
def test_fast_dev_run_works_and_writes_nothing(run, tmp_path, more):
    assert run("fit", *GROWING, *more)[0] == 0
    assert not list(tmp_path.iterdir())


@pytest.mark.kind("M a new user's first hour")
def test_a_run_of_one_step_is_a_run(run, tmp_path):
    assert run("fit", *GROWING, "--trainer.max_steps=1")[0] == 0
    assert saved_step(tmp_path) == 1


@pytest.mark.kind("B48 what is refused leaves nothing", "F65")
def test_a_run_without_checkpoints_keeps_none(run, tmp_path):
    assert run("fit", "--trainer.enable_checkpointing=false", "--trainer.max_steps=1")[0] == 0
    assert not (tmp_path / "run" / "checkpoints").exists() and (tmp_path / "run" / "config.yaml").exists()


@pytest.mark.kind("B5 B13 two writers")
@pytest.mark.parametrize(
    ("command", "locked"),
    [("fit", "run/checkpoints"), ("validate", "run/validate"), ("test", "run/test")],
    ids=["B13 fit", "validate", "test"],
)
def test_a_second_one_at_the_same_folder_is_refused(run, tmp_path, command, locked):
    (tmp_path / "run").mkdir()
    with only_writer(tmp_path / locked, "run_folder"):
        code, sentence = run(command, "--trainer.max_steps=1")
    assert code == 2 and f"run_folder: '{tmp_path / locked}' is being written by another process" in sentence
    assert not (tmp_path / locked).exists()


@pytest.mark.kind("B5 B13 two writers")
def test_it_is_free_again_after_an_end_of_any_kind(tmp_path):
    for error in (ValueError, KeyboardInterrupt, Terminated, KeyError):
        with pytest.raises(error), run_place(tmp_path / "run", tmp_path / "run" / "checkpoints"):
            assert (tmp_path / "run").is_dir()
            raise error
        assert not (tmp_path / "run").exists()


@pytest.mark.kind("B5 B13 two writers")
def test_reading_goes_on_while_a_run_writes(run, tmp_path, place):
    with run_place(tmp_path / "run", tmp_path / "run" / "checkpoints"):
        assert run("validate", f"--model={place / 'model'}")[0] == 0


FULL = "B11 B27 full disks, and places that cannot be written"


@pytest.mark.kind(FULL, "B27")
def test_a_disk_that_is_full_in_the_middle_of_a_run(run, tmp_path, monkeypatch):
    written, save = [], torch.save

    def full(*arguments, **more):
        written.append(1)
        if len(written) == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save(*arguments, **more)

    monkeypatch.setattr(torch, "save", full)
    code, sentence = run("fit", "--trainer.max_steps=8", "--checkpoint.every_n_train_steps=2")
    folder = tmp_path / "run" / "checkpoints"
    assert code == 2 and f"checkpoint: cannot write '{folder / 'last.ckpt'}' (No space left on device)" in sentence
    assert saved_step(tmp_path) == 4 and os.listdir(folder) == ["last.ckpt"]


@pytest.mark.kind(FULL)
@pytest.mark.parametrize("when", ["written", "moved to its place"])
def test_a_disk_that_is_full_when_the_run_begins(run, tmp_path, monkeypatch, when):
    """Where config.yaml cannot be written: it is named, and nothing half is left."""

    def full(*arguments, **more):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    kind, name = (LightningArgumentParser, "save") if when == "written" else (os, "replace")
    monkeypatch.setattr(kind, name, full)
    code, sentence = run("fit", "--trainer.max_steps=1", "--trainer.limit_val_batches=0", "--trainer.logger=false")
    place = tmp_path / "run" / "config.yaml"
    assert code == 2 and f"run_folder: cannot write '{place}' (No space left on device)" in sentence
    assert not list(tmp_path.iterdir())


@pytest.mark.kind(FULL)
@pytest.mark.parametrize("free", [0, 100_000], ids=["none free", "less than the weights"])
def test_a_disk_that_never_had_room(run, tmp_path, monkeypatch, free):
    usage = namedtuple("Usage", "total used free")(1, 1, free)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    monkeypatch.setattr(TextData, "setup", None)  # before any data
    code, sentence = run("fit", "--trainer.max_steps=1")
    assert code == 2 and f"run_folder: '{tmp_path / 'run'}' has no room for a checkpoint" in sentence
    assert not list(tmp_path.iterdir())


@pytest.mark.kind(FULL)
def test_room_for_a_sharded_checkpoint_is_room_for_its_shards(tmp_path, monkeypatch):
    path = tmp_path / "last.ckpt"
    weights = {"model.a": torch.zeros(100, 100)}
    into_shards({"state_dict": weights, "lskip": {"config": {}}, "global_step": 1}, path)
    for free in (45_000, 30_000):
        usage = namedtuple("Usage", "total used free")(1, 1, free)
        monkeypatch.setattr(shutil, "disk_usage", lambda path, usage=usage: usage)
        refused = pytest.raises(ValueError, match=r"no room for a checkpoint, which takes 0\.0 MiB")
        with refused if free < 40_000 else nullcontext():
            check_room(tmp_path, torch.nn.Linear(2, 2), str(path))


OTHER = "K4 the data's tokenizer is not the model's"


@pytest.mark.kind(OTHER)
@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({}, "is not the model's"),
        ({"more": 70}, "is not the model's"),
        ({"eos": "<b>"}, "is not the model's"),
        ({"no model's": True, "more": 70}, "vocab_size: the model has 300"),
    ],
    ids=["F12 three more", "F14 more than the model knows", "another end", "the model has none of its own"],
)
def test_another_tokenizer_is_refused_before_the_text_is_tokenized(run, place, tmp_path, monkeypatch, change, said):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(place / "three_more")
    tokenizer.add_tokens([f"<more {n}>" for n in range(change.get("more", 0))])
    tokenizer.eos_token = change.get("eos", tokenizer.eos_token)
    tokenizer.save_pretrained(tmp_path / "other")
    shutil.copy(place / "model" / "config.json", tmp_path / "other")
    monkeypatch.setattr(TextData, "blocks", None)
    model = [] if "no model's" in change else [f"--model={place / 'model'}"]
    code, sentence = run("fit", *model, f"--data.tokenizer={tmp_path / 'other'}", "--trainer.max_steps=1")
    assert code == 2 and said in sentence and (model == [] or "data.tokenizer: " in sentence)


@pytest.mark.kind(OTHER)
def test_a_copy_of_the_models_is_the_models(run, place, tmp_path, tiny_tokenizer):
    shutil.copytree(place / "model", tmp_path / "copy")
    more = (f"--model={place / 'model'}", f"--data.tokenizer={tmp_path / 'copy'}", "--trainer.max_steps=1")
    assert run("fit", *more)[0] == 0


SIGNALS = "B24 signals"


@pytest.fixture
def raised(monkeypatch):
    """Function (class, method, n, *signals): this process gets them at the n-th call of the method."""

    def arrange(kind: type, method: str, when: int, *signals: int) -> None:
        original, calls = getattr(kind, method), []

        def call(*arguments, **more):
            calls.append(1)
            if len(calls) == when:
                for each in signals:
                    os.kill(os.getpid(), each)
            return original(*arguments, **more)

        monkeypatch.setattr(kind, method, call)

    return arrange


TERM, INT = signal.SIGTERM, signal.SIGINT
# where, which -> exit code, step that is saved (None: none), what is said
STOPS = {
    "B24 training": ((LayerSkipModule, "training_step", 7, TERM), 143, 3, "after step 3, which is saved; go on with"),
    "M13 first step": ((LayerSkipModule, "training_step", 1, TERM), 143, 1, "after step 1, which is saved"),
    "validation": ((LayerSkipModule, "validation_step", 1, TERM), 143, 1, "after step 1, which is saved"),
    "Ctrl-C in validation": ((LayerSkipModule, "validation_step", 1, INT), 130, 1, "after step 1, which is saved"),
    "twice": ((LayerSkipModule, "training_step", 7, TERM, TERM), 143, None, "after step 2; nothing was saved yet"),
    "Ctrl-C, then SIGTERM": ((LayerSkipModule, "training_step", 7, INT, TERM), 143, None, "nothing was saved yet"),
    "data": ((TextData, "setup", 1, TERM), 143, None, "before the first step; nothing was saved yet"),
    "model": ((LayerSkipModule, "check_training", 1, TERM), 143, None, "by SIGTERM before it began; nothing is lost"),
}


@pytest.mark.kind(SIGNALS)
@pytest.mark.parametrize(("stop", "code", "step", "said"), STOPS.values(), ids=STOPS)
def test_a_signal_ends_a_run_and_the_message_is_true(run, raised, tmp_path, stop, code, step, said):
    raised(*stop)
    before = [signal.getsignal(each) for each in (INT, TERM)]
    # Validation comes in the middle of the second step of three micro-batches.
    rhythm = ("--trainer.val_check_interval=5", "--trainer.check_val_every_n_epoch=null", "--trainer.max_steps=6")
    got, sentence = run("fit", "--trainer.accumulate_grad_batches=3", "--trainer.num_sanity_val_steps=0", *rhythm)
    assert got == code and "lskip fit: interrupted " in sentence and said in sentence
    assert (tmp_path / "run" / "checkpoints" / "last.ckpt").exists() == (step is not None)
    assert step is None or saved_step(tmp_path) == step
    assert [signal.getsignal(each) for each in (INT, TERM)] == before


@pytest.mark.kind(SIGNALS)
@pytest.mark.parametrize(("command", "signum", "code"), [("validate", INT, 130), ("test", TERM, 143)])
def test_a_signal_ends_a_measurement_with_a_word(run, raised, command, signum, code):
    step = {"validate": "validation_step", "test": "test_step"}[command]
    raised(LayerSkipModule, step, 1, signum)
    before = signal.getsignal(INT)
    got, sentence = run(command)
    assert got == code and sentence.startswith(f"lskip {command}: interrupted before all is measured")
    assert signal.getsignal(INT) == before


@pytest.mark.kind(SIGNALS)
def test_what_is_saved_within_a_validation_goes_on_as_if_nothing_had_been(run, raised, tmp_path, monkeypatch):
    """Also in the middle of an accumulated step, with dropout in the model: its micro-batches are drawn once more."""
    settings = (
        *("--model.attention_dropout=0.2", "--trainer.accumulate_grad_batches=3", "--trainer.max_steps=3"),
        *("--trainer.val_check_interval=5", "--trainer.check_val_every_n_epoch=null", "--lr_scheduler.warmup_steps=2"),
        "--trainer.num_sanity_val_steps=0",
    )
    whole = f"--run_folder={tmp_path / 'whole'}"
    assert run("fit", *settings, whole)[0] == 0
    with monkeypatch.context() as patch:
        original = LayerSkipModule.validation_step

        def stop(*arguments):
            os.kill(os.getpid(), signal.SIGTERM)
            return original(*arguments)

        patch.setattr(LayerSkipModule, "validation_step", stop)
        assert run("fit", *settings)[0] == 143
    assert saved_step(tmp_path) == 1
    assert run("fit", *settings, "--ckpt_path=last")[0] == 0
    first, second = (
        torch.load(tmp_path / name / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        for name in ("whole", "run")
    )
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_config_of_a_callback_whose_default_is_an_enumeration(run, tmp_path):
    timer = {"class_path": "Timer", "init_args": {"duration": "00:01:00:00"}}
    assert run("fit", "--trainer.max_steps=2", f"--trainer.callbacks={json.dumps([timer])}")[0] == 0
    config = tmp_path / "run" / "config.yaml"
    (saved,) = yaml.safe_load(config.read_text())["trainer"]["callbacks"]
    assert saved["init_args"] == {**timer["init_args"], "interval": "step", "verbose": True}
    assert main(["fit", f"--config={config}", f"--run_folder={tmp_path / 'again'}"]) == 0
    (again,) = yaml.safe_load((tmp_path / "again" / "config.yaml").read_text())["trainer"]["callbacks"]
    assert again == saved
