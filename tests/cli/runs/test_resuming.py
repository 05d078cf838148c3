"""A run that goes on with other settings: what may change holds from then on, what may not is told, before any data."""

import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch
import yaml

from lskip.cli import main
from lskip.cli.runs.resuming import changed_settings, settings_of

KIND = "K6 resume, and what the command line says"
BATCH, BLOCK = 4, 16


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with a corpus, another one, and a run of four steps."""
    folder = tmp_path_factory.mktemp("resuming")
    texts = [json.dumps({"text": f"def f{i}(x):\n    return x + {i}\n" * 4}) for i in range(60)]
    (folder / "corpus.jsonl").write_text("\n".join(texts))
    (folder / "other.jsonl").write_text("\n".join(texts[1:]))
    assert fit(folder, "run", "--trainer.max_steps=4") == 0
    return folder


def fit(place: Path, name: str, *more: str) -> int:
    from tests.conftest import make_config

    arguments = {
        "model": json.dumps(make_config()),
        "run_folder": place / name,
        "data.source": place / "corpus.jsonl",
        "data.cache_dir": place / "cache",
        "data.block_size": BLOCK,
        "data.batch_size": BATCH,
        "optimizer.lr": 1e-3,
        "trainer.accelerator": "cpu",
        "trainer.enable_progress_bar": "false",
        "trainer.enable_model_summary": "false",
        "trainer.max_steps": 6,
    }
    return main(["fit", *(f"--{key}={value}" for key, value in arguments.items()), *more])


@pytest.fixture
def go_on(place, tmp_path, capsys):
    """Function *more -> (exit code, what was said, checkpoint, config.yaml) of the run, gone on with to step 6."""
    shutil.copytree(place / "run", tmp_path / "run")

    def call(*more: str):
        (tmp_path / "cache").symlink_to(place / "cache")
        capsys.readouterr()
        code = fit(place, "run", f"--run_folder={tmp_path / 'run'}", "--ckpt_path=last", *more)
        checkpoint = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
        said = capsys.readouterr()
        return code, said.out + said.err, checkpoint, yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())

    return call


def rates(checkpoint: dict) -> list[float]:
    return [group["lr"] for group in checkpoint["optimizer_states"][0]["param_groups"]]


SCHEDULE = "--lr_scheduler=torch.optim.lr_scheduler"
# arguments -> the rate after step 6 (the default schedule warms up over 100 steps), and what was said
TAKES_EFFECT = {
    "F18 lr": (["--optimizer.lr=1e-5"], 1e-5 * 7 / 101, "optimizer.lr 1e-05 (was 0.001)"),
    "B35 schedule": (
        [f"{SCHEDULE}.StepLR", "--lr_scheduler.step_size=2"],
        1e-6,
        "lr_scheduler torch.optim.lr_scheduler.StepLR (was",
    ),
    "no schedule": (["--lr_scheduler=null"], 1e-3, "lr_scheduler None (was"),
    "warm-up": (["--lr_scheduler.warmup_steps=1"], 1e-4, "lr_scheduler.warmup_steps 1 (was 100)"),
    "a schedule by recursion": ([f"{SCHEDULE}.ExponentialLR", "--lr_scheduler.gamma=0.5"], 1e-3 / 64, "ExponentialLR"),
    "max_steps": (["--trainer.max_steps=5"], 1e-3 * 6 / 101, "trainer.max_steps 5 (was 4)"),
    "B35 precision": (["--trainer.precision=bf16-mixed"], 1e-3 * 7 / 101, "trainer.precision bf16-mixed (was None)"),
    "B35 accumulation": (["--trainer.accumulate_grad_batches=2"], 1e-3 * 7 / 101, "accumulate_grad_batches 2 (was 1)"),
    "B35 seed": (["--seed_everything=5"], 1e-3 * 7 / 101, "seed_everything 5 (was 0)"),
    "target": (["--exit_target=SelfDistillation"], 1e-3 * 7 / 101, "exit_target lskip.targets.SelfDistillation (was"),
    "method": (
        ["--layer_dropout=LayerDropout"],
        1e-3 * 7 / 101,
        "layer_dropout lskip.callbacks.LayerDropout (was None)",
    ),
}


@pytest.mark.kind(KIND)
@pytest.mark.parametrize(("more", "rate", "said"), TAKES_EFFECT.values(), ids=TAKES_EFFECT)
def test_what_may_change_takes_effect_and_is_said(go_on, more, rate, said):
    code, output, checkpoint, config = go_on(*more)
    assert code == 0 and "goes on after step 4 with " in output and said in output
    assert checkpoint["global_step"] == config["trainer"]["max_steps"]
    assert rates(checkpoint) == pytest.approx([rate, rate])


@pytest.mark.kind(KIND, "F18")
def test_the_optimizer_goes_by_the_command_line_and_config_yaml_says_so(go_on, place):
    before = torch.load(place / "run" / "checkpoints" / "last.ckpt", weights_only=True)["optimizer_states"][0]
    code, _, checkpoint, config = go_on(
        "--optimizer.lr=1e-5", "--optimizer.weight_decay=0.5", "--optimizer.betas=[0.5,0.9]"
    )
    state, options = checkpoint["optimizer_states"][0], config["optimizer"]["init_args"]
    assert code == 0 and (options["lr"], options["weight_decay"], options["betas"]) == (1e-5, 0.5, [0.5, 0.9])
    assert [(group["weight_decay"], group["betas"]) for group in state["param_groups"]] == [
        (0.5, (0.5, 0.9)),
        (0.0, (0.5, 0.9)),  # norms do not decay
    ]
    assert checkpoint["lr_schedulers"][0]["base_lrs"] == [1e-5, 1e-5]
    # The state went on: six steps of AdamW, its average of squares not begun anew.
    assert state["state"][0]["step"] == before["state"][0]["step"] + 2 == 6


@pytest.mark.parametrize(("before", "now"), [(None, {3: 0.3}), ({3: 0.3}, None), ({3: 0.3}, {3: 0.3, 2: 0.2})])
def test_shares_that_come_go_or_change_are_said(before, now):
    settings = [
        settings_of({"early_exit_loss": {"class_path": "callbacks.EarlyExitLoss", "init_args": {"shares": shares}}})
        for shares in (before, now)
    ]
    (change,) = changed_settings(*settings, {"lskip": {}})
    assert change.startswith("early_exit_loss.shares ") and "(was " in change


def test_another_seed_is_another_order_of_the_text(place, go_on):
    """Red where seed_everything leaves the data's seed alone: fine-tunes of several seeds are then one and the same."""
    config = {}
    for name, more in {"5": ["--seed_everything=5"], "5 and 2": ["--seed_everything=5", "--data.seed=2"]}.items():
        assert fit(place, name, "--trainer.max_steps=1", *more) == 0
        config[name] = yaml.safe_load((place / name / "config.yaml").read_text())["data"]["init_args"]["seed"]
    assert config == {"5": 5, "5 and 2": 2}
    assert go_on("--seed_everything=5")[3]["data"]["init_args"]["seed"] == 0  # a run keeps its order


ALTERED = {
    "F20 SGD": (["--optimizer=torch.optim.SGD", "--optimizer.lr=0.1"], "optimizer: 'torch.optim.SGD', but"),
    "B35 Adagrad": (["--optimizer=torch.optim.Adagrad"], "optimizer: 'torch.optim.Adagrad', but"),
    "Adam": (["--optimizer=torch.optim.Adam"], "optimizer: 'torch.optim.Adam', but"),
    "B35 source": (["--data.source={place}/other.jsonl"], "data.source: "),
    "B35 tokenizer": (["--data.tokenizer={place}/none"], "data.tokenizer: "),
    "split": (["--data.val_fraction=0.2"], "data.val_fraction: 0.2, but this run has 0.05"),
    "B35 data.seed": (["--data.seed=7"], "data.seed: 7, but this run has 0"),
    "B35 streaming": (["--data.streaming=true"], "data.streaming: True, but"),
    "B35 rms_norm_eps": (["--model.rms_norm_eps=0.1"], "model.rms_norm_eps: 0.1, but this run has 1e-06"),
    "rope": (["--model.rope_theta=77"], "model.rope_"),
    "shape": (["--model.hidden_size=16", "--model.head_dim=4"], "is of another model"),
    "low_rank": (["--low_rank=LowRank", "--low_rank.exit_layer=2"], "low_rank: "),
    "classifier": (["--learned_exit=true"], "learned_exit: True, but"),
}


@pytest.mark.kind(KIND)
@pytest.mark.parametrize(("more", "said"), ALTERED.values(), ids=ALTERED)
def test_what_may_not_is_told_and_nothing_is_touched(go_on, place, more, said):
    before = (place / "run" / "config.yaml").read_text()
    code, output, checkpoint, config = go_on(*(part.format(place=place) for part in more))
    assert code == 2 and output.count("error: ") == 1 and said in output
    assert checkpoint["global_step"] == 4
    assert config["optimizer"] == yaml.safe_load(before)["optimizer"] and config["trainer"]["max_steps"] == 4
    assert "Traceback" not in output


# optimizer, what it is told from step 4 on -> what is said, where it cannot go on
OTHER_STATE = {
    "amsgrad": ("AdamW", ["amsgrad=true"], "optimizer: AdamW so set goes by max_exp_avg_sq, which this run has"),
    "centered": ("RMSprop", ["centered=true"], "optimizer: RMSprop so set goes by grad_avg, which"),
    "momentum": ("RMSprop", ["momentum=0.9"], "optimizer: RMSprop so set goes by momentum_buffer, which"),
    "on a GPU alone": ("AdamW", ["capturable=true"], "optimizer: AdamW cannot make a step (If capturable=True"),
    "differentiable": ("AdamW", ["differentiable=true"], "optimizer.differentiable: true is"),
    "momentum that begins": ("SGD", ["momentum=0.9", "nesterov=true"], None),
    "another decay": ("Adagrad", ["lr_decay=0.1"], None),
    "fused": ("Adam", ["fused=true"], None),
}  # fmt: skip


@pytest.mark.kind(KIND)
@pytest.mark.parametrize(("kind", "flags", "said"), OTHER_STATE.values(), ids=list(OTHER_STATE))
def test_settings_by_which_an_optimizer_keeps_more_of_each_weight(place, tmp_path, capsys, kind, flags, said):
    optimizer = (f"--optimizer=torch.optim.{kind}", "--optimizer.lr=1e-3", f"--run_folder={tmp_path / 'run'}")
    assert fit(place, "run", *optimizer, "--trainer.max_steps=4", "--trainer.limit_val_batches=0") == 0
    capsys.readouterr()
    code = fit(place, "run", *optimizer, "--ckpt_path=last", *(f"--optimizer.{flag}" for flag in flags))
    checkpoint = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    assert (code, checkpoint["global_step"]) == ((0, 6) if said is None else (2, 4))
    assert said is None or said in capsys.readouterr().err


@pytest.mark.kind(KIND, "B35")
@pytest.mark.parametrize(
    ("more", "done"),
    [
        (["--data.batch_size=8"], 2),  # 4 batches of 4 rows were read: 2 of 8
        (["--data.batch_size=3"], 5),  # 16 rows: 5 of 3, and the sixteenth once more
        (["--data.block_size=8"], 8),
        (["--data.batch_size=2", "--data.block_size=32"], 4),
    ],
    ids=["larger batches", "batches that do not divide", "shorter rows", "both"],
)
def test_the_data_go_on_where_they_were(go_on, monkeypatch, more, done):
    from lskip.module import LayerSkipModule

    numbers = []
    original = LayerSkipModule.early_exit_loss
    monkeypatch.setattr(LayerSkipModule, "early_exit_loss", lambda *args: numbers.append(args[2]) or original(*args))
    code, _, checkpoint, _ = go_on(*more)
    progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    assert code == 0 and numbers == [done, done + 1] and checkpoint["global_step"] == 6
    assert progress["total"]["processed"] == progress["current"]["processed"] == done + 2


@pytest.mark.kind(KIND)
@pytest.mark.parametrize("known", ["by the checkpoint", "by config.yaml", "by neither"])
def test_what_the_run_was_is_known_without_the_other(place, tmp_path, capsys, known):
    """An older checkpoint says less, and one in another folder has no config.yaml: both still go on."""
    path = tmp_path / "old" / "checkpoints" / "last.ckpt"
    path.parent.mkdir(parents=True)
    checkpoint = torch.load(place / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    if known != "by the checkpoint":
        for entry in ("settings", "rows", "total_steps"):
            del checkpoint["lskip"][entry]
    torch.save(checkpoint, path)
    if known == "by config.yaml":
        shutil.copy(place / "run" / "config.yaml", tmp_path / "old")
    resume = [f"--run_folder={tmp_path / 'new'}", f"--ckpt_path={path}"]
    assert fit(place, "run", *resume, "--optimizer=torch.optim.SGD", "--optimizer.lr=0.1") == 2
    assert "error: optimizer: " in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
    if known == "by config.yaml":
        assert fit(place, "run", *resume, "--data.batch_size=2") == 2
        assert "data.batch_size: 2, but the checkpoint is of a run with 4" in capsys.readouterr().err
    assert fit(place, "run", *resume, "--optimizer.lr=1e-5") == 0
    new = torch.load(tmp_path / "new" / "checkpoints" / "last.ckpt", weights_only=True)
    assert rates(new) == pytest.approx([1e-5 * 7 / 101] * 2) and new["global_step"] == 6


@pytest.mark.kind(KIND)
def test_a_run_that_is_done_says_so(go_on):
    code, output, checkpoint, config = go_on("--trainer.max_steps=3")
    assert code == 0 and "is at step 4 already, of trainer.max_steps 3" in output
    assert checkpoint["global_step"] == config["trainer"]["max_steps"] == 4


@pytest.mark.kind(KIND)
def test_weights_alone_are_no_run(place, tmp_path, capsys):
    checkpoint = torch.load(place / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    del checkpoint["optimizer_states"]
    torch.save(checkpoint, tmp_path / "weights.ckpt")
    assert fit(place, "run", f"--run_folder={tmp_path / 'new'}", f"--ckpt_path={tmp_path / 'weights.ckpt'}") == 2
    assert "holds weights alone; begin with them by --model" in capsys.readouterr().err


@pytest.mark.kind(KIND)
def test_data_whose_tokenizer_comes_out_otherwise_are_told(place, go_on, capsys):
    """The same name, other content: a tokenizer trained on it is another one."""
    path = place / "corpus.jsonl"
    text = path.read_text()
    try:
        path.write_text(text.replace("return", "yield"))
        code, output, checkpoint, _ = go_on()
    finally:
        path.write_text(text)
    assert code == 2 and "data.tokenizer: " in output and "is not the model's" in output
    assert checkpoint["global_step"] == 4


def words(text: str):
    """A tokenizer of as many entries as every other of these, with merges of its own."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    more = {"special_tokens": ["<|endoftext|>"], "initial_alphabet": alphabet, "show_progress": False}
    bpe.train_from_iterator([text] * 4, trainers.BpeTrainer(vocab_size=265, **more))
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|endoftext|>")


@pytest.fixture
def own_model(place, tmp_path, tiny_model):
    """Function (more, **arguments) -> exit code of a fit of a model with a tokenizer; (tmp_path / run, / model)."""
    tiny_model().save_pretrained(tmp_path / "model")
    words("def f(x): return x").save_pretrained(tmp_path / "model")

    def run(*more: str, model="model", steps=4) -> int:
        fixed = (f"--model={tmp_path / model}", f"--run_folder={tmp_path / 'run'}", "--trainer.limit_val_batches=0")
        return fit(place, "run", *fixed, f"--trainer.max_steps={steps}", *more)

    return run


@pytest.mark.kind(KIND)
@pytest.mark.parametrize("name", ["model", "other"], ids=["its folder has another", "another model's"])
def test_another_tokenizer_of_the_same_size_is_told(own_model, tmp_path, capsys, name):
    """Its tokens mean something else than those that the run has learned."""
    assert own_model() == 0
    if name != "model":
        shutil.copytree(tmp_path / "model", tmp_path / name)
    words("while (yes) { no++; }").save_pretrained(tmp_path / name)
    assert own_model("--ckpt_path=last", model=name, steps=6) == 2
    assert f"model: the tokenizer in '{tmp_path / name}' is not this run's (entry " in capsys.readouterr().err


@pytest.mark.kind(KIND)
def test_data_that_were_changed_meanwhile_are_told(own_model, place, tmp_path):
    """The run goes on: a corpus may have grown."""
    source = tmp_path / "data.jsonl"
    shutil.copy(place / "corpus.jsonl", source)
    assert own_model(f"--data.source={source}") == 0
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="data.source")
        assert own_model(f"--data.source={source}", "--ckpt_path=last", steps=5) == 0
    source.write_text("\n".join(source.read_text().splitlines()[:40]))
    with pytest.warns(UserWarning, match=r"data\.source: its training documents are not those .* up to step 5"):
        assert own_model(f"--data.source={source}", "--ckpt_path=last", steps=6) == 0


@pytest.mark.kind(KIND, "B35")
@pytest.mark.parametrize(
    ("more", "done"), [(["--data.block_size=64"], 4), (["--data.batch_size=2"], 8)], ids=["longer", "fewer"]
)
def test_pairs_go_on_where_they_were_however_long_a_row_may_be(own_model, tmp_path, monkeypatch, more, done):
    """A row is an example: of another block_size there are as many."""
    from lskip.module import LayerSkipModule

    rows = [json.dumps({"prompt": f"def f{i}(x):", "completion": f"x + {i}"}) for i in range(80)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(rows))
    data = (f"--data.source={tmp_path / 'pairs.jsonl'}", "--data.block_size=32")
    assert own_model(*data) == 0
    numbers = []
    original = LayerSkipModule.early_exit_loss
    monkeypatch.setattr(LayerSkipModule, "early_exit_loss", lambda *args: numbers.append(args[2]) or original(*args))
    assert own_model(*data, *more, "--ckpt_path=last", steps=6) == 0
    assert numbers == [done, done + 1]
