"""`validate` of a run: what it was trained on, unless something else is named."""

import json
import math
import time
from pathlib import Path

import pytest
import yaml

from lskip.cli import main
from tests.cli.test_main import scalars
from tests.conftest import make_config

FIT = [
    "--data.source=docs.jsonl",
    "--data.text_column=body",
    "--data.cache_dir=cache",
    "--data.block_size=16",
    "--data.batch_size=2",
    "--data.val_fraction=0.3",
    "--trainer.accelerator=cpu",
    "--trainer.max_steps=4",
    "--trainer.val_check_interval=4",
    "--trainer.enable_model_summary=false",
]
QUIET = ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with a run in it that was trained on docs.jsonl."""
    place = tmp_path_factory.mktemp("own")
    rows = (json.dumps({"body": f"def f{i}(x):\n    return x + {i}\n" * 4}) for i in range(60))
    (place / "docs.jsonl").write_text("\n".join(rows))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        assert main(["fit", f"--model={json.dumps(make_config())}", "--run_folder=run", *FIT]) == 0
    return place


@pytest.fixture
def run(place, monkeypatch):
    monkeypatch.chdir(place)
    yield Path("run")
    if Path("config.kept").exists():
        Path("config.kept").replace("run/config.yaml")


def perplexity(text: str) -> str:
    return next(line.split("│")[2].strip() for line in text.splitlines() if line.replace(" ", "").startswith("│4│"))


@pytest.mark.kind("H1 a run is measured on its own data")
@pytest.mark.parametrize(
    "model",
    [
        pytest.param("run", id="H1 folder"),
        pytest.param("run/checkpoints/last.ckpt", id="checkpoint"),
        pytest.param("./run/../run", id="another way there"),
    ],
)
def test_validate_has_the_numbers_of_the_fit(model, run, capsys):
    capsys.readouterr()
    assert main(["validate", f"--model={model}", *QUIET]) == 0
    output, errors = capsys.readouterr()
    assert "config.yaml (source docs.jsonl)" in errors
    logged = scalars(run)["val/ppl/layer_04"][-1]
    assert perplexity(output) == f"{logged:.4g}"
    measured = scalars(run / "validate")["val/ppl/layer_04"][-1]
    assert math.isclose(measured, logged, rel_tol=1e-5)


@pytest.mark.kind("H1 a run is measured on its own data")
def test_a_run_of_before_documents_were_apart_is_measured_as_it_was_trained(run, capsys, tmp_path):
    assert main(["fit", f"--model={json.dumps(make_config())}", f"--run_folder={tmp_path / 'joined'}", *FIT,
                 "--data.documents=joined"]) == 0  # fmt: skip
    path = tmp_path / "joined" / "config.yaml"
    config = yaml.safe_load(path.read_text())
    assert config["data"]["init_args"].pop("documents") == "joined"
    path.write_text(yaml.safe_dump(config))
    found = {}
    for name, more in {"as it was": [], "apart": ["--data.documents=separate"]}.items():
        assert main(["validate", f"--model={tmp_path / 'joined'}", *QUIET, *more]) == 0
        found[name] = perplexity(capsys.readouterr().out)
    assert found["as it was"] == f"{scalars(tmp_path / 'joined')['val/ppl/layer_04'][-1]:.4g}" != found["apart"]


@pytest.mark.kind("H1 a run is measured on its own data", "H1")
def test_compare_of_a_run_that_was_validated_alone_has_its_numbers(run, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    fit_events = list(run.glob("events*"))
    expected = f"{scalars(run)['val/ppl/layer_04'][-1]:.4g}"
    for path in fit_events:
        path.rename(path.parent / f"kept.{path.name}")
    for path in (run / "validate").glob("events*"):
        path.unlink()
    try:
        assert main(["compare", "run"]) == 2
        command = capsys.readouterr().err.partition("this makes them: ")[2].split()
        assert command == ["lskip", "validate", "--model", "run"]
        assert main([*command[1:], *QUIET]) == 0
        capsys.readouterr()
        assert main(["compare", "run"]) == 0
        shown = capsys.readouterr().out
        assert expected in shown and "docs.jsonl" in shown
        Path("others.jsonl").write_text("\n".join(json.dumps({"body": f"class C{i}: pass\n" * 9}) for i in range(60)))
        time.sleep(1.1)  # event files are ordered by the second and the process that began them
        assert main([*command[1:], "--data.source=others.jsonl", *QUIET]) == 0
        others = perplexity(capsys.readouterr().out)
        assert main(["compare", "run"]) == 0
        shown = capsys.readouterr().out
        assert others in shown and "others.jsonl" in shown and others != expected
        assert expected not in shown and "docs.jsonl" not in shown
    finally:
        for path in fit_events:
            (path.parent / f"kept.{path.name}").rename(path)


@pytest.mark.kind("H1 a run is measured on its own data")
@pytest.mark.parametrize(
    "flags",
    [
        pytest.param(["--data.source=elsewhere.txt"], id="another source"),
        pytest.param(["--data=TextData", "--data.source=elsewhere.txt"], id="another class"),
        pytest.param(["--config={data: {source: elsewhere.txt}}", "--data.source=elsewhere.txt"], id="in the value"),
        pytest.param(["--config=other.yaml"], id="another config"),
    ],
)
def test_what_is_named_wins(flags, run, capsys):
    Path("other.yaml").write_text("data: {source: elsewhere.txt}\n")
    assert main(["validate", "--model=run", *flags]) == 2
    assert "elsewhere.txt" in capsys.readouterr().err


STRANGE = {
    "no config": (None, "data: 'run' no config.yaml --data.source"),
    "B31 python": ("!!python/object/apply:os.system [touch MARK]", "config.yaml line 1"),
    "B31 list": ("[1]", "config.yaml list"),
    "B31 text": ("hello", "config.yaml"),
    "B31 broken": ("a: [", "config.yaml line"),
    "B31 binary": (b"\x00\xff", "config.yaml UTF-8"),
    "B31 class_path 5": ("data: {class_path: 5}", "data"),
    "B31 init_args list": ("data: {class_path: TextData, init_args: [1]}", "data"),
    "B2 a command": ("data: {class_path: os.system, init_args: {command: touch MARK}}", "data: 'os.system'"),
    "no data": ("model: x", "data: config.yaml --data.source"),
    "data that are none": ("data: 5", "data: config.yaml"),
    "a source that is gone": ("data: {class_path: TextData, init_args: {source: gone.txt}}", "source gone.txt"),
    "a class that is gone": ("data: {class_path: gone.Texts}", "data: 'gone.Texts' No module named 'gone'"),
}


@pytest.mark.kind("B31 run folders of strangers")
@pytest.mark.parametrize(("content", "words"), STRANGE.values(), ids=STRANGE)
def test_a_strange_config_of_a_run_is_one_sentence(content, words, run, capsys):
    Path("run/config.yaml").replace("config.kept")
    if content is not None:
        Path("run/config.yaml").write_bytes(content if isinstance(content, bytes) else content.encode())
    assert main(["validate", "--model=run"]) == 2
    sentence = capsys.readouterr().err.rstrip("\n").rpartition("\n")[2]
    assert all(word in sentence for word in words.split()), sentence
    assert main(["compare", "run", "--figure=x.png"]) in (0, 2)
    errors = capsys.readouterr().err
    assert errors.count("\n") <= 1 and not Path("MARK").exists()
    Path("run/config.yaml").unlink(missing_ok=True)


@pytest.mark.kind("M a new user's first hour", "M2")
def test_fit_ends_with_the_layers_the_folder_and_the_next_command(tmp_path, place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    folder = tmp_path / "a run"
    assert main(["fit", f"--model={json.dumps(make_config())}", f"--run_folder={folder}", *FIT]) == 0
    output, errors = capsys.readouterr()
    assert perplexity(output) == f"{scalars(folder)['val/ppl/layer_04'][-1]:.4g}"
    assert f"run: 4 steps, in '{folder}'\nnext: lskip generate --model '{folder}'" in output
    assert "4/4" in errors and "train/loss" in errors and "Epoch" not in errors  # the bar counts steps
    assert not yaml.safe_load((folder / "config.yaml").read_text())["ckpt_path"]


def test_fit_says_at_which_step_it_was_validated_and_no_logs_that_are_not_there(tmp_path, place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    command = ["fit", f"--model={json.dumps(make_config())}", f"--run_folder={tmp_path / 'run'}", *FIT]
    assert main([*command, "--trainer.max_steps=6", "--trainer.logger=false"]) == 0
    output = capsys.readouterr().out
    assert (
        "run: 6 steps, validated after step 4, in " in output
        and "lskip validate" in output
        and "tensorboard" not in output
    )


@pytest.mark.kind("M a new user's first hour", "M2")
def test_the_bar_of_a_run_that_goes_on_begins_where_it_was(tmp_path, place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    command = ["fit", f"--model={json.dumps(make_config())}", f"--run_folder={tmp_path / 'r'}", *FIT]
    assert main([*command, "--trainer.max_steps=2", "--trainer.limit_val_batches=0"]) == 0
    assert "Layers" not in capsys.readouterr().out  # nothing was validated
    assert main([*command, "--trainer.max_steps=5", "--ckpt_path=last"]) == 0
    errors = capsys.readouterr().err
    assert "2/5" in errors and "5/5" in errors
