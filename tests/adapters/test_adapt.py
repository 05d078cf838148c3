"""`lskip adapt`: it learns, its model stays, a stopped training goes on, and what it refuses."""

import errno
import json
import math
import os
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import lskip.adapters.adapt as adapt_module
from lskip.adapters.adapt import CHECKPOINT, adapt, save_atomically
from lskip.adapters.answers import read_answers
from lskip.adapters.module import AdapterModule
from lskip.adapters.options import AdapterData, AdapterTraining
from lskip.adapters.states import StateCache, collate
from lskip.adapters.unroll import draft_metrics
from lskip.cli import commands
from lskip.models.exit_adapter import AdapterShape, ExitAdapter, load_adapter
from lskip.utils.output_files import only_writer


@pytest.fixture
def frozen(monkeypatch, tiny_model, tiny_tokenizer):
    """The model that `adapt` loads."""
    model = tiny_model()
    monkeypatch.setattr(adapt_module, "load_model", lambda source: (model, tiny_tokenizer))
    return model


@pytest.fixture
def run(tmp_path, frozen, answers_file):
    """Function (name of output, **more) -> its folder, after `adapt`."""

    def call(name: str, resume=False, vocabulary=100, start: Path | None = None, num_blocks=1, **training):
        settings = {"max_steps": 24, "batch_size": 8, "warmup_steps": 4, "val_every": 7, "checkpoint_every": 5}
        more = {
            "exit_layer": 2,
            "num_blocks": num_blocks,
            "start": start and str(start),
            "resume": resume,
            "device": "cpu",
        }
        data = AdapterData(answers=[str(answers_file)], block_size=40, cache_dir=str(tmp_path / "cache"))
        options = AdapterTraining(**{**settings, **training})
        adapt(str(tmp_path / name), data, options, vocabulary=vocabulary, **more)
        return tmp_path / name

    return call


def test_an_adapter_learns_and_its_model_stays(run, frozen, capsys, answers_file, tiny_tokenizer):
    before = {name: part.clone() for name, part in frozen.state_dict().items()}
    folder = run("out", vocabulary=None, max_steps=80, lr=1e-2, val_every=60)
    assert all(torch.equal(part, before[name]) for name, part in frozen.state_dict().items())
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["steps"] == 80 and metrics["tokens_seen"] > 80 * 8 * 10
    assert 1 < metrics["tokens_per_round"]["2"] <= 3
    assert f"draft_agreement {metrics['draft_agreement']:.3f}" in capsys.readouterr().out
    # What is saved is what was measured.
    module = AdapterModule(load_adapter(folder, frozen))
    assert len(module.adapter.token_ids) == 300
    rows = read_answers([answers_file], frozen, tiny_tokenizer, 40)
    with StateCache(frozen, 2, folder.parent / "cache" / "adapter_states") as cache:
        batch = collate(list(cache.states(rows)[1]))
    with torch.no_grad():
        told = draft_metrics(module.hits(batch))
        at_first = draft_metrics(AdapterModule(ExitAdapter(frozen, AdapterShape(2)).eval()).hits(batch))
    assert told["draft_agreement"] == pytest.approx(metrics["draft_agreement"])
    likeliest = batch["choices"][batch["scored"]].unique(return_counts=True)[1].max() / batch["scored"].sum()
    assert told["draft_agreement"] > 0.15 + max(at_first["draft_agreement"], likeliest.item())
    assert not list(folder.glob(".*"))


def test_one_adapter_begins_where_another_ended(run, monkeypatch):
    first = run("first", vocabulary=60, max_steps=40, lr=1e-2, val_every=30)
    then = run("then", start=first, max_steps=1, lr=1e-9, ema=None)  # a step that changes nothing
    weights, kept = (load_file(folder / "adapter.safetensors") for folder in (first, then))
    words, more_words = weights.pop("token_ids"), kept.pop("token_ids")  # chosen anew
    assert (len(words), len(more_words)) == (60, 100) and set(words.tolist()) < set(more_words.tolist())
    assert all(torch.allclose(kept[name], part, atol=1e-6) for name, part in weights.items())
    monkeypatch.setattr(adapt_module, "read_answers", None)  # what does not fit is told before
    with pytest.raises(ValueError, match=r"exit_adapter: .*first' is of another shape \(.*num_blocks=1"):
        run("other", start=first, num_blocks=2)
    with pytest.raises(FileNotFoundError, match="start: there is no folder"):
        run("other", start=first / "none")


def test_a_training_that_ends_before_its_average_begins_is_kept(run):
    short, shorter = (run(f"{steps}", max_steps=steps, warmup_steps=50, val_every=99, ema=0.9) for steps in (6, 2))
    first, second = (load_file(folder / "adapter.safetensors")["join.weight"] for folder in (short, shorter))
    assert not torch.equal(first, second)


@pytest.mark.parametrize(("stop", "ema"), [("killed", 0.9), ("interrupted", None)])
def test_a_stopped_training_goes_on(run, monkeypatch, ema, stop):
    whole = run("whole", ema=ema)
    step = AdapterModule.training_step

    def stopping(module, batch, batch_idx):
        if module.global_step == 18:
            if stop == "killed":
                raise ZeroDivisionError
            os.kill(os.getpid(), signal.SIGINT)
        return step(module, batch, batch_idx)

    monkeypatch.setattr(AdapterModule, "training_step", stopping)
    with pytest.raises(ZeroDivisionError if stop == "killed" else KeyboardInterrupt):
        run("parts", ema=ema)
    monkeypatch.setattr(AdapterModule, "training_step", step)
    parts = whole.parent / "parts"
    load_file(parts / "adapter.safetensors")  # of the validation after step 14
    reached = torch.load(parts / CHECKPOINT, weights_only=True)["global_step"]
    assert reached == (15 if stop == "killed" else 19)
    run("parts", resume=True, ema=ema)
    for name in ("adapter.json", "adapter.safetensors"):
        assert (whole / name).read_bytes() == (parts / name).read_bytes()
    expected, told = (json.loads((folder / "metrics.json").read_text()) for folder in (whole, parts))
    assert {**told, "seconds": 0} == {**expected, "seconds": 0}


def test_the_recipe_is_understood(tmp_path, frozen, answers_file):
    """Through the command line's own parser, with a stand-in for the model and its prompts."""
    recipe = Path(__file__).parents[2] / "configs" / "recipes" / "adapter_smollm2.yaml"
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(json.loads(line)["prompt"] for line in answers_file.read_text().splitlines()))
    flags = {
        "prompts": prompts,
        "output": tmp_path / "out",
        "cache_dir": tmp_path / "cache",
        "block_size": 40,
        "max_new_tokens": 12,
    }
    flags |= {"max_steps": 2, "max_minutes": "null", "batch_size": 8, "device": "cpu"}
    commands.run_command(["adapt", "--config", str(recipe), *(f"--{name}={value}" for name, value in flags.items())])
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["steps"] == 2 and metrics["words"] == 300
    assert sum(metrics["answers"].values()) == 120 and sum(metrics["answer_tokens"].values()) > 120 * 6


def test_bad_input_in_one_sentence(run, tmp_path, monkeypatch):
    folder = run("out", max_steps=2)
    with pytest.raises(ValueError, match=r"output: .* go on with it by --resume true"):
        run("out")
    with pytest.raises(ValueError, match="resume: the checkpoint is of another adapter"):
        run("out", resume=True, vocabulary=90)
    with pytest.raises(FileNotFoundError, match="resume: there is no file"):
        run("other", resume=True)
    with pytest.raises(ValueError, match="batch_size: 500, but there are only"):
        run("other", batch_size=500)
    with pytest.raises(ValueError, match="unroll: 0 is not a whole number from 1 up"):
        run("other", unroll=0)
    with pytest.raises(ValueError, match=r"ema: 1\.0 is not a number between 0 and 1"):
        run("other", ema=1.0)
    none = str(tmp_path / "none.jsonl")
    for data in ({"answers": [none]}, {"prompts": none}):
        with pytest.raises(FileNotFoundError, match=f"{next(iter(data))}: there is no file"):
            adapt(str(tmp_path / "other"), AdapterData(**data), AdapterTraining())
    for data in ({}, {"prompts": "a.txt", "answers": ["b.jsonl"]}):
        with pytest.raises(ValueError, match="prompts: give either prompts or answers"):
            AdapterData(**data)
    (folder / CHECKPOINT).write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"resume: .* is not a readable checkpoint"):
        run("out", resume=True)


def test_the_states_are_those_of_a_model_loaded_in_that_type(run, frozen, monkeypatch):
    frequencies = frozen.model.rotary_emb.inv_freq.clone()

    def seen(cache, *_):
        model = cache.decoder.model
        assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
        assert torch.equal(model.model.rotary_emb.inv_freq, frequencies)
        raise InterruptedError

    monkeypatch.setattr(StateCache, "states", seen)
    with pytest.raises(InterruptedError):
        run("out", precision="bf16-mixed")


def test_training_ends_when_its_time_is_up(run):
    metrics = json.loads((run("out", max_steps=None, max_minutes=0.02) / "metrics.json").read_text())
    assert 1.2 <= metrics["seconds"] < 10 and metrics["steps"] > 1


TOLD = "B20 B40 told before anything is read"
WRONG = {
    "B40 lr 1e30": ({"lr": 1e30}, r"lr: 1e\+30 is not a number above 0, at most 1"),
    "B20 lr -1": ({"lr": -1}, "lr: -1 is not a number above 0"),
    "lr NaN": ({"lr": float("nan")}, "lr: nan is not a number above 0"),
    "decay 1e300": ({"decay": 1e300}, r"decay: 1e\+300 is not a number above 0, at most 1"),
    "decay infinity": ({"decay": float("inf")}, "decay: inf is not a number"),
    "unroll of a billion": ({"unroll": 10**9}, "unroll: 1000000000 is not below block_size, 40"),
    "unroll_every of a billion": ({"unroll_every": 10**9}, "unroll_every: 1000000000 is not below block_size, 40"),
    "warmup_steps": ({"warmup_steps": -1}, "warmup_steps: -1 is not a whole number from 0 up"),
    "max_minutes": ({"max_minutes": 1e300}, r"max_minutes: 1e\+300 is not a number above 0, at most a year"),
    "max_minutes NaN": ({"max_minutes": float("nan")}, "max_minutes: nan is not a number above 0"),
    "ema": ({"ema": float("nan")}, "ema: nan is not a number between 0 and 1"),
    "precision": ({"precision": "8"}, "precision: '8' is not one of 32-true, bf16-mixed"),
    "seed": ({"seed": 2**70}, r"seed: \d+ is not below 2\*\*63"),
    "val_answers": ({"val_answers": 0}, "val_answers: 0 is not a whole number from 1 up"),
    "vocabulary": ({"vocabulary": 3}, "vocabulary: 3 is not a whole number from 16 up"),
    "num_blocks": ({"num_blocks": 0}, "num_blocks: 0 is not a whole number from 1 up"),
    "more blocks than layers": ({"num_blocks": 5}, "num_blocks: 5 is more than the model's 4"),
}


@pytest.mark.kind(TOLD)
@pytest.mark.parametrize(("options", "said"), WRONG.values(), ids=WRONG)
def test_a_bad_option_is_told_before_anything_is_answered(run, tmp_path, monkeypatch, options, said):
    monkeypatch.setattr(adapt_module, "read_answers", None)
    with pytest.raises(ValueError, match=said):
        run("out", **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.kind(TOLD)
def test_too_few_prompts_are_told_before_they_are_answered(tmp_path, monkeypatch):
    monkeypatch.setattr(adapt_module, "load_model", None)
    (tmp_path / "few.txt").write_text("a\nb\n")
    with pytest.raises(ValueError, match="batch_size: 16, but there are only 2 answers to train on"):
        adapt(str(tmp_path / "out"), AdapterData(prompts=str(tmp_path / "few.txt")), AdapterTraining(), device="cpu")


@pytest.mark.kind("K8 what is not finite", "B1")
def test_an_adapter_that_is_not_finite_is_not_saved(tmp_path, frozen):
    adapter = ExitAdapter(frozen, AdapterShape(2))
    save_atomically(adapter, tmp_path)
    before = (tmp_path / "adapter.safetensors").read_bytes()
    for value in (float("nan"), float("inf"), 3.4e38):  # the last is infinite in bfloat16
        adapter.join.bias.data[3] = value
        with pytest.raises(ValueError, match=r"lr: training made weights NaN or infinite; '.*' keeps what was saved"):
            save_atomically(adapter, tmp_path)
    assert (tmp_path / "adapter.safetensors").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter.json", "adapter.safetensors"]


@pytest.mark.kind("B5 B13 two writers")
def test_two_that_train_into_one_folder_are_kept_apart(run, tmp_path, monkeypatch):
    monkeypatch.setattr(adapt_module, "load_model", None)
    refused = pytest.raises(ValueError, match=r"output: '.*out' is being written by another process")
    with only_writer(tmp_path / "out", "output"), refused:
        run("out")


@pytest.mark.kind("B11 B27 full disks, and places that cannot be written", "B11")
def test_a_place_that_cannot_be_written_is_told_before_the_model_is_loaded(run, tmp_path, monkeypatch):
    def refuse(**where):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr("lskip.utils.output_files.TemporaryFile", refuse)
    monkeypatch.setattr(adapt_module, "load_model", None)
    with pytest.raises(ValueError, match=r"output: cannot write '.*out' \(Read-only file system\)"):
        run("out")


@pytest.mark.kind("B11 B27 full disks, and places that cannot be written", "B24")
@pytest.mark.parametrize("kind", [KeyboardInterrupt, type("Terminated", (KeyboardInterrupt,), {})])
def test_who_interrupts_the_answering_is_told_how_to_go_on(run, tmp_path, monkeypatch, kind):
    def interrupt(*arguments):
        raise kind

    with monkeypatch.context() as patch, pytest.raises(kind, match="are kept: the same command goes on"):
        patch.setattr(StateCache, "states", interrupt)
        run("out")
    run("out", max_steps=1)


@pytest.mark.kind("K8 what is not finite", "B1")
def test_what_is_not_finite_is_not_kept(run, monkeypatch, tmp_path):
    """Neither as a checkpoint nor as the adapter, which a validation had saved before."""
    step = AdapterModule.training_step

    def spoilt(module, batch, batch_idx):
        return step(module, batch, batch_idx) * (math.nan if module.global_step == 12 else 1)

    monkeypatch.setattr(AdapterModule, "training_step", spoilt)
    with pytest.raises(ValueError, match=r"not_finite: in step 13 \(batch 13"):
        run("out")
    folder = tmp_path / "out"
    assert torch.load(folder / CHECKPOINT, weights_only=True)["global_step"] == 10
    assert all(part.isfinite().all() for part in load_file(folder / "adapter.safetensors").values())
