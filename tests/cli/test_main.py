"""The commands as a user types them: everything swaps by a flag, and what was trained is of use afterwards."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import lskip
from lskip.cli import main
from lskip.inference import TextGenerator
from lskip.models.pretrained import load_model

CURRICULA = ["Rotational", "Gradual", "AllExits", "LastExit"]
SCHEDULES = ["Exponential", "Linear", "Constant"]
SWAPS = [
    *[f"--early_exit_loss.curriculum={name}" for name in CURRICULA],
    *[f"--layer_dropout.depth={name}" for name in SCHEDULES],
    *[f"--layer_dropout.time={name}" for name in SCHEDULES],
]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "documents.jsonl"
    path.write_text("\n".join(json.dumps({"text": f"def f{i}(x):\n    return x + {i}\n" * 4}) for i in range(60)))
    return path


@pytest.fixture
def fit(corpus, tiny_config):
    """Function run folder, *more -> exit code of a three-step `fit` of a tiny model."""

    def run(folder: Path, *more: str) -> int:
        return main(
            [
                "fit",
                f"--model={json.dumps(tiny_config())}",
                f"--run_folder={folder}",
                f"--data.source={corpus}",
                f"--data.cache_dir={corpus.parent / 'cache'}",
                "--data.block_size=16",
                "--data.batch_size=2",
                "--data.max_val_blocks=4",
                "--trainer.accelerator=cpu",
                "--trainer.max_steps=3",
                "--trainer.val_check_interval=3",
                "--trainer.log_every_n_steps=1",
                "--trainer.enable_progress_bar=false",
                "--trainer.enable_model_summary=false",
                *more,
            ]
        )

    return run


def scalars(folder: Path) -> dict[str, list[float]]:
    events = EventAccumulator(str(folder)).Reload()
    return {tag: [event.value for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


# What each curriculum trains of four layers (block indices from 0) at steps 0, 1, 2 of 3; the last is always on,
# and the first weighs e(0) = 0. Rotational: the default period of 8.
ON = {
    "Rotational": [{3}, {1, 3}, {2, 3}],
    "Gradual": [{3}, {1, 2, 3}, {1, 2, 3}],  # exit l from t >= (3 - l) 3/8: 2 from 1 on, 1 from 1 on
    "AllExits": [{1, 2, 3}] * 3,
    "LastExit": [{3}] * 3,
}


@pytest.mark.parametrize("name", CURRICULA)
def test_a_curriculum_by_flag_alone(tmp_path, fit, name):
    assert fit(tmp_path / "run", f"--early_exit_loss.curriculum={name}") == 0
    logged = scalars(tmp_path / "run")
    for step, expected in enumerate(ON[name]):
        weights = [logged[f"train/exit_weight/layer_{layer:02d}"][step] for layer in (1, 2, 3, 4)]
        assert {block for block, weight in enumerate(weights) if weight > 0} == expected
        assert sum(weights) == pytest.approx(1)


# S(t) and D(l) at 0, 1/2 and 1 of the way, by hand: exp(x ln 2) - 1 at 1/2 is sqrt(2) - 1.
HALF = {"Exponential": [0, 2**0.5 - 1, 1], "Linear": [0, 0.5, 1], "Constant": [1, 1, 1]}


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_time_schedule_by_flag_alone(tmp_path, fit, name):
    assert fit(tmp_path / "run", f"--layer_dropout.time={name}", "--layer_dropout.p_max=0.4") == 0
    rates = scalars(tmp_path / "run")["train/drop_rate/layer_04"]
    assert rates == pytest.approx([0.4 * value for value in HALF[name]], abs=1e-6)


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_depth_schedule_by_flag_alone(tmp_path, fit, name, tiny_config):
    model = json.dumps(tiny_config(num_hidden_layers=3))
    assert fit(tmp_path / "run", f"--model={model}", f"--layer_dropout.depth={name}") == 0
    logged = scalars(tmp_path / "run")
    rates = [logged[f"train/drop_rate/layer_{layer:02d}"][0] for layer in (1, 2, 3)]
    assert rates == pytest.approx([0.1 * value for value in HALF[name]], abs=1e-6)


def test_without_methods_it_is_plain_training(tmp_path, fit):
    assert fit(tmp_path / "run") == 0
    logged = scalars(tmp_path / "run")
    for layer in (1, 2, 3, 4):
        assert set(logged[f"train/drop_rate/layer_{layer:02d}"]) == {0.0}
        assert set(logged[f"train/exit_weight/layer_{layer:02d}"]) == {1.0 if layer == 4 else 0.0}


def printed_config(capsys, *arguments: str) -> dict:
    with pytest.raises(SystemExit) as left:
        main(["fit", *arguments, "--print_config"])
    assert left.value.code == 0
    return yaml.safe_load(capsys.readouterr().out)


@pytest.mark.parametrize("flag", SWAPS)
def test_print_config_shows_the_swap(capsys, flag):
    config = printed_config(capsys, "--model=smollm2", flag)
    name, value = flag.removeprefix("--").split("=")
    method, argument = name.split(".")
    module = "curricula" if argument == "curriculum" else "schedules"
    assert config[method]["init_args"][argument]["class_path"] == f"lskip.{module}.{value}"
    # what it prints, it reads
    assert config["optimizer"] == {"class_path": "torch.optim.AdamW", "init_args": config["optimizer"]["init_args"]}


def test_nested_flags_and_null(tmp_path, capsys):
    flags = ("--early_exit_loss.curriculum=Rotational", "--early_exit_loss.curriculum.period=6")
    config = printed_config(capsys, "--model=smollm2", *flags)
    assert config["early_exit_loss"]["init_args"]["curriculum"]["init_args"] == {"period": 6}
    base = tmp_path / "base.yaml"
    base.write_text("model: smollm2\nlayer_dropout: {p_max: 0.3}\nearly_exit_loss: {e_scale: 0.7}\n")
    config = printed_config(capsys, f"--config={base}", "--layer_dropout=null", "--optimizer.lr=0.5")
    assert config["layer_dropout"] is None
    assert config["early_exit_loss"]["init_args"]["e_scale"] == 0.7
    assert config["optimizer"]["init_args"]["lr"] == 0.5


def test_a_printed_config_trains(tmp_path, capsys, corpus, tiny_config):
    model = json.dumps(tiny_config())
    config = printed_config(
        capsys,
        f"--model={model}",
        f"--data.source={corpus}",
        "--data.block_size=16",
        "--early_exit_loss.curriculum=Gradual",
    )
    (tmp_path / "printed.yaml").write_text(yaml.safe_dump(config))
    own = [f"--run_folder={tmp_path / 'run'}", f"--data.cache_dir={tmp_path}", "--trainer.max_steps=1"]
    assert main(["fit", f"--config={tmp_path / 'printed.yaml'}", *own, "--trainer.enable_progress_bar=false"]) == 0


OWN_DATA = """
import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader


class OwnData(LightningDataModule):
    def __init__(self, rows: int = 4):
        super().__init__()
        self.rows = rows

    def train_dataloader(self):
        ids = torch.arange(8 * self.rows).reshape(self.rows, 8)
        return DataLoader([{"input_ids": row} for row in ids], batch_size=2)

    val_dataloader = train_dataloader
"""


def test_a_datamodule_of_your_own(tmp_path, monkeypatch, tiny_config):
    (tmp_path / "own_data.py").write_text(OWN_DATA)
    monkeypatch.syspath_prepend(tmp_path)
    code = main(
        [
            "fit",
            f"--model={json.dumps(tiny_config())}",
            f"--run_folder={tmp_path / 'run'}",
            "--data=own_data.OwnData",
            "--data.rows=6",
            "--trainer.accelerator=cpu",
            "--trainer.max_steps=2",
            "--trainer.enable_progress_bar=false",
        ]
    )
    assert code == 0 and (tmp_path / "run" / "checkpoints" / "last.ckpt").is_file()


def test_a_run_folder_has_all_of_it_and_serves_every_command(tmp_path, fit, capsys, corpus):
    run = tmp_path / "run"
    assert fit(run, "--early_exit_loss.curriculum=AllExits", "--layer_dropout.p_max=0.2") == 0
    logged = scalars(run)
    for layer in (1, 2, 3, 4):
        assert logged[f"val/ppl/layer_{layer:02d}"][0] > 1
        assert 0 <= logged[f"val/agreement/layer_{layer:02d}"][0] <= 1
    assert 1 <= logged["val/layers_needed"][0] <= 4
    assert {"train/loss", "train/tokens_per_second"} <= logged.keys()
    assert EventAccumulator(str(run)).Reload().Tags()["images"] == ["val/perplexity_by_depth"]

    capsys.readouterr()
    config = ["--config", str(run / "config.yaml"), "--trainer.enable_progress_bar=false"]
    assert main(["validate", *config, "--ckpt_path=last"]) == 0
    by_checkpoint = capsys.readouterr().out
    assert main(["validate", *config, f"--model={run}"]) == 0
    assert capsys.readouterr().out == by_checkpoint
    assert f"{logged['val/ppl/layer_04'][-1]:.1f}" in by_checkpoint
    assert main(["test", *config, f"--model={run}"]) == 0
    assert yaml.safe_load((run / "config.yaml").read_text())["trainer"]["max_steps"] == 3  # still the fit's

    assert main(["export", f"--model={run}", f"--output={tmp_path / 'plain'}"]) == 0
    for model in (run, run / "checkpoints" / "last.ckpt", tmp_path / "plain"):
        capsys.readouterr()
        assert main(["generate", "--prompt=def f", f"--model={model}", "--max_new_tokens=8"]) == 0
        text, counts = capsys.readouterr()
        assert "8 tokens" in counts or "eos" in counts
        generator = TextGenerator(*load_model(str(run)))
        assert text == generator.generate("def f", max_new_tokens=8).text + "\n"


def run_python(*arguments: str, folder: Path) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(Path(lskip.__file__).parent.parent)}
    command = [sys.executable, "-m", "lskip", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)


def test_a_warning_is_one_line(corpus, tiny_config, tmp_path):
    run = run_python(
        *("fit", f"--model={json.dumps(tiny_config())}", f"--data.source={corpus}", "--data.block_size=16"),
        *("--data.cache_dir=cache", "--data.val_fraction=0", "--trainer.max_steps=2", "--trainer.accelerator=cpu"),
        folder=tmp_path,
    )
    assert run.returncode == 0, run.stderr
    assert "warning: lr_scheduler.warmup_steps: 100, but the run ends at step 2: " in run.stderr
    assert "UserWarning" not in run.stderr and ".py:" not in run.stderr


def test_help_and_errors_of_the_real_process(tmp_path):
    helped = run_python("--help", folder=tmp_path)
    assert helped.returncode == 0
    assert all(name in helped.stdout for name in ("fit", "validate", "test", "predict", "generate", "export"))
    failed = run_python("generate", "--prompt=x", "--model=missing.ckpt", folder=tmp_path)
    assert failed.returncode == 2
    assert failed.stderr == "lskip generate: error: model: there is no file or folder 'missing.ckpt'\n"


LOCAL = ["--task=LocalTask", "--task.path={}/task.jsonl"]
# command -> its options, and what takes its time there
LONG = {
    "generate": (["--prompt=def"], "lskip.inference.options.load_generator", ""),
    "export": (["--output={}/e"], "lskip.export.to_hf.load_model", ""),
    "inspect": (["--output={}/i", "--block_size=16"], "lskip.evaluation.layers.inspect.load_model", "begins anew"),
    "sweep": (
        [*LOCAL, "--output={}/s"],
        "lskip.evaluation.sweep.sweep.measure_cell",
        "0 of 8 cells are done; go on with",
    ),
    "tune": (LOCAL, "lskip.evaluation.sweep.search.forecast", "begins anew"),
    "compare": (["{}"], "lskip.evaluation.runs.compare.read_run", ""),
}


@pytest.mark.kind("B24 signals")
@pytest.mark.parametrize("command", LONG)
@pytest.mark.parametrize(("sent", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)], ids=["SIGTERM", "SIGINT"])
def test_every_command_ends_by_sigterm_as_by_ctrl_c(
    tmp_path, monkeypatch, capsys, tiny_model, tiny_tokenizer, command, sent, code
):
    options, slow, said = LONG[command]
    tiny_model().save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "task.jsonl").write_text('{"prompt": "def f", "reference": "(x)"}\n')
    before = {path.name for path in (*tmp_path.iterdir(), *(tmp_path / "model").iterdir())}
    handlers = [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)]
    monkeypatch.setattr(slow, lambda *arguments, **more: os.kill(os.getpid(), sent))
    model = [] if command == "compare" else [f"--model={tmp_path}/model"]
    assert main([command, *(option.format(tmp_path) for option in options), *model]) == code
    sentence = capsys.readouterr().err.splitlines()[-1]
    assert sentence.startswith(f"lskip {command}: interrupted") and said in sentence
    assert {path.name for path in (*tmp_path.iterdir(), *(tmp_path / "model").iterdir())} == before
    assert [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)] == handlers
