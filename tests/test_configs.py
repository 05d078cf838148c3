"""Every YAML that ships is parsed by the real parser and trains a tiny stand-in for its model."""

import json
from pathlib import Path

import pytest
import yaml

from lskip.cli import main

ROOT = Path(__file__).parent.parent / "configs"
FILES = sorted(ROOT.rglob("*.yaml"))
OVERLAYS = [path for path in FILES if path.parent.name == "curriculum"]
MEMORY = [path for path in FILES if path.parent.name == "memory"]  # overlays: tests/training/test_memory.py has them
# adapter_*.yaml are for `lskip adapt`: tests/adapters/test_adapt.py has them.
RUNNABLE = [path for path in FILES if path not in [*OVERLAYS, *MEMORY] and not path.stem.startswith("adapter_")]

SMALL = ("small", "small_falling")

# What the paper (and figures) say of each recipe: p_max, e_scale, curriculum, learning rate (None: not stated).
RECIPES = {
    "continual_llama2_7b": (0.1, 0.2, 8, 3e-5),
    "continual_llama2_13b": (0.1, 0.1, 39, 2e-5),
    "continual_llama3.2_1b": (0.1, 0.1, 8, None),
    "scratch_1.5b": (0.1, 0.2, 23, 8e-4),
    "scratch_7b": (0.2, 0.2, 31, None),
    "code_llama_7b": (0.1, 1.0, 16, 1e-4),
    "topv2_1.5b": (0.2, 1.0, "Gradual", 1e-4),
}


@pytest.fixture
def stand_in(tmp_path, tiny_config):
    """Return a function folder -> flags that replace the model, the data and the sizes, and nothing else."""
    corpus = tmp_path / "documents.jsonl"
    texts = (json.dumps({"text": f"def f{i}(x):\n    return x + {i}\n" * 4}) for i in range(60))
    corpus.write_text("\n".join(texts))

    def flags(folder: Path) -> list[str]:
        return [
            f"--model={json.dumps(tiny_config())}",
            f"--run_folder={folder}",
            f"--data.source={corpus}",
            f"--data.cache_dir={tmp_path / 'cache'}",
            "--data.tokenizer=null",
            "--data.text_column=null",
            "--data.streaming=false",
            "--data.block_size=16",
            "--data.batch_size=2",
            "--data.max_val_blocks=4",
            "--trainer.accelerator=cpu",
            "--trainer.devices=1",
            "--trainer.strategy=auto",
            "--trainer.max_steps=2",
            "--trainer.accumulate_grad_batches=1",
            "--trainer.val_check_interval=2",
            "--trainer.enable_progress_bar=false",
            "--trainer.enable_model_summary=false",
        ]

    return flags


@pytest.mark.parametrize("path", RUNNABLE, ids=lambda path: path.stem)
def test_a_config_trains_a_stand_in(path, tmp_path, stand_in):
    run = tmp_path / "run"
    # The stand-in is not deep enough for the exits that a recipe names.
    text = path.read_text()
    exits = ["--early_exit_loss.curriculum.exit_layers=[2]"] if "ChosenExits" in text else []
    exits += ["--early_exit_loss.shares={2: 0.5}"] if "shares:" in text else []
    assert main(["fit", "--config", str(path), *stand_in(run), *exits]) == 0
    assert (run / "checkpoints" / "last.ckpt").is_file()


@pytest.mark.parametrize("path", OVERLAYS, ids=lambda path: path.stem)
def test_an_overlay_changes_the_curriculum_and_nothing_else(path, tmp_path, stand_in, capsys):
    def configuration(*overlay: str) -> dict:
        with pytest.raises(SystemExit) as left:
            main(["fit", "--config", str(ROOT / "quickstart.yaml"), *overlay, "--print_config"])
        assert left.value.code == 0
        return yaml.safe_load(capsys.readouterr().out)

    base, changed = configuration(), configuration("--config", str(path))
    expected = {"rotational": "Rotational", "gradual": "Gradual", "all": "AllExits", "last": "LastExit"}
    curriculum = changed["early_exit_loss"]["init_args"].pop("curriculum")
    assert curriculum["class_path"] == f"lskip.curricula.{expected[path.stem]}"
    del base["early_exit_loss"]["init_args"]["curriculum"]
    assert base == changed


def test_the_plain_control_of_the_retrofit_sees_the_same_tokens_at_the_same_rates():
    retrofit, plain = (
        yaml.safe_load((ROOT / "recipes" / f"{name}.yaml").read_text())
        for name in ("retrofit_smollm2", "retrofit_smollm2_plain")
    )
    methods = {"layer_dropout", "early_exit_loss", "exit_target", "position_share", "run_folder"}
    assert {name: value for name, value in retrofit.items() if name not in methods} == {
        name: value for name, value in plain.items() if name not in methods
    }


def test_the_falling_recipe_differs_from_the_small_one_by_its_dropout_alone():
    small, falling = (yaml.safe_load((ROOT / "recipes" / f"{name}.yaml").read_text()) for name in SMALL)
    differing = {name for name in small.keys() | falling.keys() if small.get(name) != falling.get(name)}
    assert differing == {"layer_dropout", "run_folder"}


def test_every_recipe_says_what_the_paper_says():
    files = {path.stem: yaml.safe_load(path.read_text()) for path in RUNNABLE if path.parent.name == "recipes"}
    # For figures, or for what the paper has no recipe; the others are the paper's.
    others = "small small_falling code home_assistant home_assistant_plain retrofit_smollm2 retrofit_smollm2_plain"
    others += " deebert berxit"
    for ours in others.split():
        files.pop(ours)
    assert files.keys() == RECIPES.keys()
    for name, (p_max, e_scale, curriculum, rate) in RECIPES.items():
        recipe = files[name]
        found = recipe["early_exit_loss"]["curriculum"]
        if isinstance(found, dict):
            assert found["class_path"] == "Rotational"
            found = found["init_args"]["period"]
        assert (recipe["layer_dropout"]["p_max"], recipe["early_exit_loss"]["e_scale"], found) == (
            p_max,
            e_scale,
            curriculum,
        )
        # YAML reads 3e-5 as a text, jsonargparse as a number
        assert rate is None or float(recipe["optimizer"]["init_args"]["lr"]) == rate
        # S(t): the exponential is the paper's for pretraining from scratch, none for trained models
        assert recipe["layer_dropout"]["time"] == ("Exponential" if "scratch" in name else "Constant")
