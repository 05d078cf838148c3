"""`lskip predict --resume true` goes on as the run was begun, or not at all; and one process writes at a time."""

import json
import os
import re
import resource
import shutil
import signal
from pathlib import Path

import pytest

from lskip.cli import main
from lskip.inference import TextGenerator
from lskip.inference import options as command_options
from lskip.utils.output_files import only_writer
from tests.conftest import make_model

RESUMED = "B6 predict goes on with other settings, another model or another seed"
BASE = ["--max_new_tokens=6", "--batch_size=3"]


@pytest.fixture(scope="module")
def models(tmp_path_factory, tiny_tokenizer) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for name, seed in (("a", 0), ("b", 1)):
        make_model(seed=seed).save_pretrained(folder / name)
        tiny_tokenizer.save_pretrained(folder / name)
    shutil.copytree(folder / "a", folder / "moved")
    (folder / "schema.json").write_text('{"type": "boolean"}')
    return folder


@pytest.fixture
def command(tmp_path, models) -> list[str]:
    (tmp_path / "prompts.txt").write_text("".join(f"def f{i}(x):\n" for i in range(8)))
    return ["predict", f"--prompts={tmp_path}/prompts.txt", f"--output={tmp_path}/out.jsonl"]


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "out.jsonl").read_text().splitlines()]


def ctrl_c() -> None:
    raise KeyboardInterrupt


def stop_after(monkeypatch, count: int, stop=ctrl_c) -> None:
    """The next predict is interrupted after so many answers."""
    generate_batch = TextGenerator.generate_batch

    def some(self, *arguments, **settings):
        monkeypatch.setattr(TextGenerator, "generate_batch", generate_batch)
        for number, outcome in enumerate(generate_batch(self, *arguments, **settings)):
            if number == count:
                stop()
            yield outcome

    monkeypatch.setattr(TextGenerator, "generate_batch", some)


OTHERS = [
    pytest.param(["--max_new_tokens=9"], "max_new_tokens: 9, but", id="F21 max_new_tokens"),
    pytest.param(["--model={models}/b"], "model: '.*b', but .* begun with .*a;", id="F21 model"),
    pytest.param(["--seed=100"], "seed: 100, but", id="B6 seed"),
    pytest.param(["--temperature=0.5"], "temperature: 0.5, but", id="temperature"),
    pytest.param(["--exit_layer=2"], "exit_layer: 2, but", id="exit_layer"),
    pytest.param(["--dtype=bfloat16"], "dtype: 'bfloat16', but", id="dtype"),
    pytest.param(
        ["--exit_criterion=Margin", "--exit_criterion.threshold=0.5"], "exit_criterion: .*Margin.* but", id="criterion"
    ),
    pytest.param(["--weights=int8"], "weights: 'int8', but .* begun with 'auto'", id="weights"),
    pytest.param(['--stop_strings=["x"]'], "stop_strings: .*x.* but", id="stop_strings"),
    pytest.param(["--regex=[a-z]+"], r"regex: '\[a-z\]\+', but", id="regex"),
    pytest.param(["--json_schema={models}/schema.json"], "json_schema: .*boolean.* but", id="json_schema"),
]


@pytest.mark.kind(RESUMED)
@pytest.mark.parametrize(("flags", "sentence"), OTHERS)
def test_a_run_goes_on_as_it_was_begun(tmp_path, models, command, capsys, monkeypatch, flags, sentence):
    stop_after(monkeypatch, 3)
    assert main([*command, f"--model={models}/a", *BASE]) == 130
    assert "3 of 8 prompts are done; go on with --resume true" in capsys.readouterr().err
    before = (tmp_path / "out.jsonl").read_bytes()
    with monkeypatch.context() as patched:
        patched.setattr(command_options, "load_generator", None)  # it is refused before the model is loaded
        flags = [flag.format(models=models) for flag in flags]
        assert main([*command, f"--model={models}/a", *BASE, "--resume=true", *flags]) == 2
    said = capsys.readouterr().err
    assert re.search(sentence, said), said
    assert (tmp_path / "out.jsonl").read_bytes() == before
    # As it was begun, by another place of the same model, in other batches.
    assert main([*command, f"--model={models}/moved", *BASE, "--resume=true", "--batch_size=1"]) == 0
    assert [row["line"] for row in rows(tmp_path)] == list(range(1, 9))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.jsonl", "prompts.txt"]


@pytest.mark.kind(RESUMED)
@pytest.mark.parametrize(("flags", "sentence"), [*OTHERS[:4], pytest.param([], None, id="the same")])
def test_answers_that_came_without_settings_are_looked_at(tmp_path, models, command, capsys, flags, sentence):
    """As of a run that had ended, from which lines were taken away."""
    assert main([*command, f"--model={models}/a", *BASE]) == 0
    whole = (tmp_path / "out.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "out.jsonl").write_text("".join(whole[:3]))
    code = main(
        [*command, f"--model={models}/a", *BASE, "--resume=true", *(flag.format(models=models) for flag in flags)]
    )
    assert code == (0 if sentence is None else 2)
    assert len(rows(tmp_path)) == (8 if sentence is None else 3)
    if sentence is not None:
        said = capsys.readouterr().err
        assert ": error: " in said and ("line 1 of " in said)


@pytest.mark.kind(RESUMED)
def test_a_model_whose_files_have_changed_is_another(tmp_path, models, command, capsys, monkeypatch):
    shutil.copytree(models / "a", tmp_path / "model")
    stop_after(monkeypatch, 3)
    assert main([*command, f"--model={tmp_path}/model", *BASE]) == 130
    (tmp_path / "model" / "costs.json").write_text("{}")  # as --costs_file makes it: no part of the model
    stop_after(monkeypatch, 1)
    assert main([*command, f"--model={tmp_path}/model", *BASE, "--resume=true"]) == 130
    shutil.copy(models / "b" / "model.safetensors", tmp_path / "model")
    assert main([*command, f"--model={tmp_path}/model", *BASE, "--resume=true"]) == 2
    assert "whose files have changed" in capsys.readouterr().err


@pytest.mark.kind(RESUMED)
def test_answers_follow_the_schema_of_a_file_as_it_was_at_the_start(tmp_path, models, command, capsys, monkeypatch):
    schema = tmp_path / "schema.json"
    schema.write_text('{"enum": ["a", 12, null]}')
    command = [*command, f"--model={models}/a", *BASE, f"--json_schema={schema}"]
    stop_after(monkeypatch, 3)
    assert main(command) == 130
    schema.write_text('{"enum": ["b", 12, null]}')
    assert main([*command, "--resume=true"]) == 2
    assert "json_schema: " in capsys.readouterr().err
    schema.write_text('{"enum": ["a", 12, null]}')
    assert main([*command, "--resume=true"]) == 0
    assert [json.loads(row["text"]) in ("a", 12, None) for row in rows(tmp_path)] == [True] * 8


BAD_SCHEMAS = {
    "not there": (None, "json_schema: .*schema.json"),
    "not JSON": ("{", "is not JSON"),
    "a list": ("[1]", "json_schema: .* holds no JSON object, which a schema is"),
    "unknown": ('{"type": "objct"}', "json_schema: Invalid type: objct"),
}


@pytest.mark.parametrize(("text", "sentence"), BAD_SCHEMAS.values(), ids=BAD_SCHEMAS)
def test_bad_schemas_are_named_before_a_model_is_loaded(tmp_path, models, command, capsys, monkeypatch, text, sentence):
    if text is not None:
        (tmp_path / "schema.json").write_text(text)
    monkeypatch.setattr(command_options, "load_generator", None)
    for way in (command, ["generate", "--prompt=a"]):
        assert main([*way, f"--model={models}/a", f"--json_schema={tmp_path}/schema.json"]) == 2
        assert re.search(sentence, capsys.readouterr().err)


@pytest.mark.kind("B5 B13 two writers")
@pytest.mark.parametrize("flags", [pytest.param([], id="B5"), ["--overwrite=true"], ["--resume=true"]])
def test_what_another_process_writes_is_left_alone(tmp_path, models, command, capsys, flags):
    (tmp_path / "link.jsonl").symlink_to("out.jsonl")
    with only_writer(tmp_path / "out.jsonl", "output"):
        for output in ("out.jsonl", "link.jsonl"):
            assert main([*command, f"--output={tmp_path}/{output}", f"--model={models}/a", *BASE, *flags]) == 2
            assert "is being written by another process" in capsys.readouterr().err
    assert not (tmp_path / "out.jsonl").exists()
    assert main([*command, f"--model={models}/a", *BASE, *flags]) == 0


@pytest.mark.kind("B24 signals")
@pytest.mark.parametrize("count", [pytest.param(3, id="B24"), 1, 5])
def test_sigterm_ends_predict_as_ctrl_c_does(tmp_path, models, command, capsys, monkeypatch, count):
    stop_after(monkeypatch, count, lambda: os.kill(os.getpid(), signal.SIGTERM))
    handler = signal.getsignal(signal.SIGTERM)
    assert main([*command, f"--model={models}/a", *BASE]) in (130, 143)
    assert f"interrupted, {count} of 8 prompts are done; go on with --resume true" in capsys.readouterr().err
    assert len(rows(tmp_path)) == count and signal.getsignal(signal.SIGTERM) is handler
    assert main([*command, f"--model={models}/a", *BASE, "--resume=true"]) == 0
    assert len(rows(tmp_path)) == 8


@pytest.mark.kind("B11 B27 full disks, and places that cannot be written")
@pytest.mark.parametrize("size", [pytest.param(1000, id="B27"), 700, 1300])
def test_what_was_written_before_the_disk_was_full_stays(tmp_path, models, command, capsys, size):
    command = [*command, f"--model={models}/a", *BASE]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        code = main(command)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    said = capsys.readouterr().err
    assert code == 2 and "error: output: cannot write" in said and "go on with --resume true" in said
    assert (tmp_path / "out.jsonl").stat().st_size == size
    kept = (tmp_path / "out.jsonl").read_text().splitlines()[:-1]
    assert len(kept) >= 2 and main([*command, "--resume=true"]) == 0
    assert {json.dumps(row) for row in rows(tmp_path)} >= {json.dumps(json.loads(line)) for line in kept}
    assert len(rows(tmp_path)) == 8


@pytest.mark.kind("B45 small tracebacks", "B45")
def test_a_clock_that_stands_still_divides_nothing_by_zero(tmp_path, models, command, monkeypatch):
    monkeypatch.setattr("time.perf_counter", lambda: 1.0)
    assert main([*command, f"--model={models}/a", *BASE]) == 0
    assert main(["generate", "--prompt=x", f"--model={models}/a", "--max_new_tokens=2"]) == 0
    drafts = ["--exit_layer=2", "--num_speculations=3"]
    assert main(["generate", "--prompt=x", f"--model={models}/a", "--max_new_tokens=9", *drafts]) == 0
