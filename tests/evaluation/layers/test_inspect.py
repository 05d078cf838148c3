"""`lskip inspect` as a user types it: what it writes, and what it refuses before a model is loaded."""

import errno
import json
import re
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.nn.functional import cross_entropy

from lskip.cli import main
from lskip.evaluation.layers import inspect as command
from lskip.models.pretrained import load_model
from lskip.utils.output_files import only_writer


@pytest.fixture
def model_folder(tmp_path, tiny_model, tiny_tokenizer):
    tiny_model().save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def text_file(tmp_path):
    (tmp_path / "text.txt").write_text("def add(a, b):\n    return a + b\n\n" * 20)
    return tmp_path / "text.txt"


@pytest.fixture
def small_figure(monkeypatch):
    """For tests that do not look at it: the real one takes most of the time."""
    monkeypatch.setattr(command, "divergence_figure", lambda report, title: Figure(figsize=(1, 1)))


def page_content(folder) -> dict:
    html = (folder / "settling.html").read_text()
    return json.loads(re.search(r'<script id="settling" type="application/json">(.*?)</script>', html, re.S)[1])


@torch.no_grad()
def test_report_figure_image_and_page(tmp_path, model_folder, text_file, capsys):
    folder = tmp_path / "out"
    options = ["--block_size=32", "--num_blocks=3", "--batch_size=2", "--text_tokens=20"]
    assert main(["inspect", f"--model={model_folder}", f"--data={text_file}", f"--output={folder}", *options]) == 0
    report = json.loads((folder / "report.json").read_text())
    assert (report["model"], report["data"], report["positions"]) == (str(model_folder), str(text_file), 3 * 31)
    model, tokenizer = load_model(str(model_folder))
    ids = torch.tensor(tokenizer(text_file.read_text()).input_ids)[: 3 * 32].view(3, 32)
    loss = cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert report["layers"][-1]["perplexity"] == pytest.approx(loss.exp().item(), rel=1e-4)
    assert len(report["layers"]) == report["num_layers"] == 4
    printed = capsys.readouterr().out
    assert f"layers_needed {report['layers_needed']:.1f} of 4" in printed and "settled" in printed
    assert (folder / "figure.png").read_bytes().startswith(b"\x89PNG")
    events = EventAccumulator(str(folder))
    events.Reload()
    assert events.Images("inspect/divergence")[0].width > 500
    assert [token["id"] for token in page_content(folder)["tokens"]] == ids[0, :20].tolist()


def test_the_page_shows_the_text_that_is_given(tmp_path, model_folder, text_file, small_figure):
    folder = tmp_path / "out"
    arguments = ["inspect", f"--model={model_folder}", f"--data={text_file}", f"--output={folder}", "--block_size=16"]
    assert main([*arguments, "--num_blocks=1", "--text=for i in <b>"]) == 0
    content = page_content(folder)
    said = "".join(content["spellings"][str(token["id"])] for token in content["tokens"])
    assert said == "for i in <b>" and len(content["tokens"][1]["layers"]) == 4


def test_of_a_pair_the_page_leaves_out_what_fills_the_block(tmp_path, model_folder, small_figure):
    (tmp_path / "pairs.jsonl").write_text(json.dumps({"prompt": "def add", "completion": "(a, b)"}) + "\n")
    folder = tmp_path / "out"
    arguments = [f"--model={model_folder}", f"--data={tmp_path / 'pairs.jsonl'}", f"--output={folder}"]
    assert main(["inspect", *arguments, "--block_size=64"]) == 0
    content = page_content(folder)
    said = "".join(content["spellings"][str(token["id"])] for token in content["tokens"])
    assert said == "def add(a, b)<|endoftext|>"


REFUSED = {
    "--data=nowhere.txt": "data: no file or folder 'nowhere.txt'",
    "--block_size=1": "block_size: 1 is not a whole number from 2 up",
    "--block_size=129": "block_size: 129 is more than the 128 tokens that the model can read",
    "--text_tokens=1": "text_tokens: 1 is not a whole number from 2 up",
    "--text=": "text: is empty",
    "--split=most": "split: 'most' is not one of train, val, test",
    "--device=abacus": "device: 'abacus' cannot be used here",
    "--model=none/such.gguf": "model: there is no file or folder 'none/such.gguf'",
}


@pytest.mark.parametrize(("flag", "sentence"), REFUSED.items(), ids=REFUSED)
def test_what_is_wrong_is_said_before_a_model_is_loaded(tmp_path, model_folder, capsys, monkeypatch, flag, sentence):
    monkeypatch.setattr(command, "load_model", lambda *arguments, **more: pytest.fail("loaded"))
    assert main(["inspect", f"--model={model_folder}", f"--output={tmp_path / 'out'}", flag]) == 2
    assert sentence in capsys.readouterr().err


def test_a_report_is_not_overwritten_unasked(tmp_path, model_folder, text_file, small_figure, capsys):
    arguments = ["inspect", f"--model={model_folder}", f"--data={text_file}", f"--output={tmp_path / 'out'}"]
    arguments += ["--block_size=16", "--num_blocks=1"]
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "report.json").write_text("mine")
    assert main(arguments) == 2
    assert "holds a report; replace it by --overwrite true" in capsys.readouterr().err
    assert (tmp_path / "out" / "report.json").read_text() == "mine"
    assert main([*arguments, "--overwrite=true"]) == 0
    assert json.loads((tmp_path / "out" / "report.json").read_text())["positions"] == 15


def test_a_model_without_a_tokenizer_or_with_too_little_text(tmp_path, tiny_model, model_folder, capsys):
    tiny_model().save_pretrained(tmp_path / "bare")
    assert main(["inspect", f"--model={tmp_path / 'bare'}", f"--output={tmp_path / 'out'}", "--block_size=16"]) == 2
    assert "has no tokenizer" in capsys.readouterr().err
    arguments = [f"--model={model_folder}", f"--output={tmp_path / 'out'}", "--block_size=16", "--text=d"]
    assert main(["inspect", *arguments]) == 2
    assert "text: 'd' is too short, it needs 2 tokens" in capsys.readouterr().err


def arguments(tmp_path, model_folder, text_file) -> list[str]:
    more = [f"--data={text_file}", f"--output={tmp_path / 'out'}", "--block_size=16", "--num_blocks=1"]
    return ["inspect", f"--model={model_folder}", *more]


LOST = "B11 B27 full disks, and places that cannot be written"


@pytest.mark.kind(LOST, "B27")
@pytest.mark.parametrize("name", ["report.json", "settling.html", "figure.png"])
def test_a_full_disk_leaves_no_half_report_and_the_table_is_shown(
    tmp_path, model_folder, text_file, small_figure, capsys, monkeypatch, name
):
    opened = Path.open

    def filling(path, mode="r", *more, **options):
        if path.name == name and "w" in mode:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return opened(path, mode, *more, **options)

    asked = arguments(tmp_path, model_folder, text_file)
    with monkeypatch.context() as full:
        full.setattr(Path, "open", filling)
        assert main(asked) == 2
    printed = capsys.readouterr()
    assert "layers_needed" in printed.out and "No space left on device" in printed.err
    assert not (tmp_path / "out").exists()
    assert main(asked) == 0  # without --overwrite


@pytest.mark.kind(LOST, "B11")
def test_a_place_that_cannot_be_written_is_told_before_the_model_is_loaded(
    tmp_path, model_folder, text_file, capsys, monkeypatch
):
    def refuse(**where):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr("lskip.utils.output_files.TemporaryFile", refuse)
    monkeypatch.setattr(command, "load_model", None)
    assert main(arguments(tmp_path, model_folder, text_file)) == 2
    assert "output: cannot write" in capsys.readouterr().err


@pytest.mark.kind(LOST)
def test_ctrl_c_says_that_nothing_is_written(tmp_path, model_folder, text_file, capsys, monkeypatch):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "report_divergence", interrupt)
    assert main(arguments(tmp_path, model_folder, text_file)) == 130
    assert "inspect: interrupted; nothing is written yet: the same command begins anew" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.kind("B5 B13 two writers")
def test_two_reports_are_kept_apart(tmp_path, model_folder, text_file, capsys, monkeypatch):
    monkeypatch.setattr(command, "load_model", None)
    with only_writer(tmp_path / "out", "output"):
        assert main(arguments(tmp_path, model_folder, text_file)) == 2
    assert "is being written by another process" in capsys.readouterr().err


@pytest.mark.kind("B34 names and words of strangers")
@pytest.mark.parametrize("name", ["[red]a[", "$a$b$", "<b>&'\"", "B34 x\x1b]0;t\x07"])
def test_a_model_of_any_name(tmp_path, model_folder, text_file, capsys, name):
    model_folder.rename(tmp_path / name)
    assert main(arguments(tmp_path, tmp_path / name, text_file)) == 0
    printed = capsys.readouterr().out
    assert "\x1b" not in printed and name.replace("\x1b", "\\x1b").replace("\x07", "\\x07") in "".join(
        printed.split("\n")
    )
    assert json.loads((tmp_path / "out" / "report.json").read_text())["model"] == str(tmp_path / name)


@pytest.mark.kind("B17 B29 nonsense in a model's config")
@pytest.mark.parametrize(
    "config",
    [
        pytest.param({"model_type": "clip"}, id="B29 clip"),
        pytest.param({"model_type": "vit"}, id="vit"),
        pytest.param({"model_type": "whisper"}, id="whisper"),
        pytest.param({"model_type": "t5"}, id="t5"),
    ],
)
def test_a_config_of_another_kind_of_model_is_told_by_every_command(tmp_path, text_file, capsys, config):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text(json.dumps(config))
    (tmp_path / "adds.jsonl").write_text('{"prompt": "a", "reference": "b"}\n')
    task = ["--task=LocalTask", f"--task.path={tmp_path / 'adds.jsonl'}"]
    (tmp_path / "answers.jsonl").write_text('{"prompt": "a", "text": "b"}\n')
    commands = {
        "inspect": arguments(tmp_path, tmp_path / "other", text_file)[2:],
        "sweep": [*task, f"--output={tmp_path / 'out'}"],
        "tune": task,
        "adapt": [f"--answers=[{tmp_path / 'answers.jsonl'}]", f"--output={tmp_path / 'out'}"],
    }
    for name, options in commands.items():
        assert main([name, f"--model={tmp_path / 'other'}", *options]) == 2
        said = capsys.readouterr().err
        assert "model: " in said and config["model_type"] in said
        assert not (tmp_path / "out").exists()
