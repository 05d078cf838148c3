"""`lskip compare`: the table, the figure, and runs given by position."""

import errno

import pytest
import torch
import yaml
from matplotlib.image import imread
from torch.utils.tensorboard import SummaryWriter

from lskip.cli import main
from lskip.evaluation.layers.figure import image_of, perplexity_figure
from lskip.evaluation.runs import compare as module
from lskip.models.readout import LayerReport
from tests.evaluation.runs.test_summary import FIRST, LAST, write_events

GRADUAL = {
    "layer_dropout": {
        "class_path": "lskip.callbacks.LayerDropout",
        "init_args": {"p_max": 0.1, "depth": {"class_path": "lskip.schedules.Linear"}},
    },
    "early_exit_loss": {
        "class_path": "lskip.callbacks.EarlyExitLoss",
        "init_args": {
            "e_scale": 0.5,
            "curriculum": {"class_path": "lskip.curricula.Rotational", "init_args": {"period": 4}},
        },
    },
    "data": {"class_path": "lskip.data.TextData", "init_args": {"source": "texts/code.jsonl"}},
}


@pytest.fixture
def runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    write_events(tmp_path / "a" / "plain", FIRST)
    (tmp_path / "a" / "plain" / "config.yaml").write_text(yaml.safe_dump({"model": "smollm2"}))
    (tmp_path / "a.png").mkdir()
    write_events(tmp_path / "skipping", LAST)
    (tmp_path / "skipping" / "config.yaml").write_text(yaml.safe_dump(GRADUAL))
    return tmp_path


def test_runs_stand_side_by_side(runs, capsys):
    assert main(["compare", "a/plain", "skipping"]) == 0
    lines = [line.replace("│", "  ").strip() for line in capsys.readouterr().out.splitlines()]
    rows = {
        cells[0]: cells[1:] for line in lines if len(cells := [c.strip() for c in line.split("   ") if c.strip()]) == 3
    }
    assert rows["curriculum"] == ["-", "Rotational 4"]
    assert rows["e_scale"] == ["-", "0.5"] and rows["dropout p_max"] == ["-", "0.1"]
    assert rows["dropout depth, time"] == ["-", "Linear"]
    assert rows["data"] == ["?", "code.jsonl"] and rows["steps"] == ["10", "20"]
    assert rows["last layer's perplexity"] == ["4e+05", "1"]
    assert rows["middle layer's perplexity"] == ["4e+05 (layer 6)", "7 (layer 6)"]
    assert rows["middle layer's agreement"] == ["0.00", "0.50"]
    assert rows["layers_needed"] == ["12.0 of 12", "7.5 of 12"]
    assert imread("compare.png").std() > 0  # not empty


def test_tokens_per_round_of_the_middle_layer(runs, capsys):
    with SummaryWriter(runs / "skipping") as writer:
        for layer in range(1, 13):
            writer.add_scalar(f"val/tokens_per_round_8/layer_{layer:02d}", 1.25 if layer == 6 else 2, 19)
    assert main(["compare", "a/plain", "skipping"]) == 0
    rows = [line.replace("│", " ").split() for line in capsys.readouterr().out.splitlines()]
    assert [row[-2:] for row in rows if "tokens_per_round," in row] == [["-", "-"], ["-", "1.25"]]


def test_the_figure_gets_each_run_under_a_name_that_tells_it_apart(runs, monkeypatch):
    drawn = []
    draw = module.perplexity_figure
    monkeypatch.setattr(module, "perplexity_figure", lambda reports: drawn.append(reports) or draw(reports))
    write_events(runs / "b" / "plain", LAST)
    assert main(["compare", "--figure=both.pdf", "a/plain", "b/plain"]) == 0
    assert {name: report.perplexity for name, report in drawn[0].items()} == {"a/plain": FIRST[1], "b/plain": LAST[1]}
    assert (runs / "both.pdf").is_file()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "runs: must be given"),
        (["a/plain", "nowhere"], "runs: there is no folder 'nowhere'"),
        (["a/plain", "a"], "runs: 'a' has no numbers of its layers"),
        (["skipping", "a/plain", "skipping"], "runs: one is named twice"),
        (["skipping", "--figure=nowhere/x.png"], "figure: there is no folder 'nowhere'"),
        (["skipping", "--figure=x.word"], "figure: 'x.word'"),
        (["skipping", "--figure=a.png"], "figure: 'a.png' is a folder"),
        (["skipping", "--figures=x.png"], "figures: there is no such option; did you mean figure?"),
    ],
)
def test_a_mistake_in_one_sentence(runs, capsys, arguments, sentence):
    assert main(["compare", *arguments]) == 2
    assert sentence in capsys.readouterr().err


@pytest.fixture
def stranger(runs):
    """A run folder whose event file somebody else may have written."""
    write_events(runs / "other", LAST)
    return next((runs / "other").glob("events*"))


DAMAGED = {
    "cut": (lambda data: data[: len(data) // 2 + 3], 0, ""),
    "cut to the last validation but one": (lambda data: data[:-1], 0, ""),
    "nearly nothing": (lambda data: data[:5], 2, "runs: 'other' has no numbers of its layers"),
    "nothing": (lambda data: b"", 2, "runs: 'other' has no numbers of its layers"),
    "garbage": (lambda data: b"\xa5" * 20000, 2, "is damaged: what was logged after that is not seen"),
    "garbage in the middle": (lambda data: data[:3000] + b"\xa5" * 99 + data[3099:], 0, "is damaged: what was logged"),
    "garbage behind": (lambda data: data + b"\xff" * 99, 0, "is damaged: what was logged after that is not seen"),
}
FOLDERS = "B31 run folders of strangers"


@pytest.mark.kind(FOLDERS)
@pytest.mark.parametrize(("damage", "code", "said"), DAMAGED.values(), ids=DAMAGED)
def test_damaged_event_files(stranger, capsys, damage, code, said):
    stranger.write_bytes(damage(stranger.read_bytes()))
    assert main(["compare", "other", "skipping"]) == code
    printed = capsys.readouterr()
    assert said in printed.err and (said or not printed.err)


CURVES = {
    "no layers_needed": {"val/ppl/layer_01": 2.0, "val/agreement/layer_01": 1.0},
    "no agreement": {"val/ppl/layer_01": 2.0, "val/layers_needed": 1.0},
    "a layer in words": {"val/ppl/layer_x": 2.0, "val/agreement/layer_x": 1.0, "val/layers_needed": 1.0},
    "a layer beyond all": {f"val/ppl/layer_{10**30}": 2.0, "val/agreement/layer_01": 1.0, "val/layers_needed": 1.0},
    "no first layer": {"val/ppl/layer_02": 2.0, "val/agreement/layer_02": 1.0, "val/layers_needed": 1.0},
    "an agreement of 7": {"val/ppl/layer_01": 2.0, "val/agreement/layer_01": 7.0, "val/layers_needed": 1.0},
    "9 tokens of a round of 4 drafts": {
        **{"val/ppl/layer_01": 2.0, "val/agreement/layer_01": 1.0, "val/layers_needed": 1.0},
        "val/tokens_per_round_4/layer_01": 9.0,
    },
    "below 0": {"val/ppl/layer_01": -2.0, "val/agreement/layer_01": 1.0, "val/layers_needed": 1.0},
}


@pytest.mark.kind(FOLDERS)
@pytest.mark.parametrize("curves", CURVES.values(), ids=CURVES)
def test_curves_that_lskip_does_not_log(runs, capsys, curves):
    with SummaryWriter(runs / "odd") as writer:
        for tag, value in curves.items():
            writer.add_scalar(tag, value, 3)
    assert main(["compare", "odd"]) == 2
    assert "runs: 'odd' was not logged by lskip" in capsys.readouterr().err


@pytest.mark.kind(FOLDERS)
def test_a_folder_in_place_of_an_event_file(runs, capsys):
    (runs / "odd" / "events.out.tfevents.1").mkdir(parents=True)
    assert main(["compare", "odd"]) == 2
    assert "runs: 'odd/events.out.tfevents.1' is not a file" in capsys.readouterr().err


@pytest.mark.kind("K8 what is not finite")
def test_layers_that_say_no_numbers_agree_in_nothing(runs, capsys):
    write_events(runs / "broken", (9, [float("nan")] * 12, [1.0] * 12, 1.0))
    assert main(["compare", "broken", "skipping"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("- (NaN)") == 4 and "1.00" not in printed


@pytest.mark.kind("B34 names and words of strangers")
@pytest.mark.parametrize(
    "name",
    ["a$b$c", "_run", "[red]x", ":smile:", "日本", "$\\frac$", "n" * 200, "B34 x\x1b]0;t\x07", "<script>"],
)
def test_a_run_of_any_name(runs, capsys, name):
    write_events(runs / name, LAST)
    assert main(["compare", name, "skipping"]) == 0
    printed = capsys.readouterr()
    assert "\x1b" not in printed.out and "\x07" not in printed.out and not printed.err
    assert name.replace("\x1b", "\\x1b").replace("\x07", "\\x07") in printed.out
    figure = perplexity_figure({name: LayerReport(*LAST[1:]), "b": LayerReport(*LAST[1:])})
    assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()][1] == "b"


@pytest.mark.kind("M a new user's first hour")
@pytest.mark.parametrize("perplexities", [[600.0, 2900.0], [3.1, 8.5], [1.0, 4e5], [2.0, 9e4], [1.0, 1e30]])
def test_the_log_axis_says_plain_numbers(perplexities):
    figure = perplexity_figure({"a": LayerReport(perplexities, [1.0, 1.0], 1.0)})
    image_of(figure)  # drawn: only then there are labels
    low, high = figure.axes[0].get_ylim()
    ticks = [tick for tick in figure.axes[0].get_yticks() if low <= tick <= high]
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert 2 <= len(ticks) <= 25 and all(float(label) for label in labels if label)


@pytest.mark.kind("M a new user's first hour")
def test_a_run_that_was_validated_alone_has_its_checkpoints_steps(runs, capsys):
    write_events(runs / "late" / "validate", LAST)
    (runs / "late" / "checkpoints").mkdir()
    saved = {"global_step": 240, "lskip": {"config": {}}, "state_dict": {}}
    torch.save(saved, runs / "late" / "checkpoints" / "last.ckpt")
    assert main(["compare", "late"]) == 0
    assert "240" in capsys.readouterr().out


@pytest.mark.kind("B11 B27 full disks, and places that cannot be written", "B27")
def test_on_a_full_disk_the_table_is_shown(runs, capsys, monkeypatch):
    def refuse(path, content):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(module, "write_bytes", refuse)
    assert main(["compare", "skipping"]) == 2
    printed = capsys.readouterr()
    assert "Rotational" in printed.out and "No space left on device" in printed.err


def test_one_run_by_two_names_is_named_twice(runs, capsys):
    assert main(["compare", "skipping", str(runs / "skipping")]) == 2
    assert "runs: one is named twice" in capsys.readouterr().err


def test_a_validation_that_was_cut_short_does_not_mix_with_the_one_before(runs, capsys):
    write_events(runs / "other", FIRST)
    with SummaryWriter(runs / "other") as writer:
        writer.add_scalar("val/ppl/layer_01", 1.5, 19)
    assert main(["compare", "other"]) == 0
    printed = capsys.readouterr().out
    assert "4e+05 (layer 6)" in printed and " 10 " in printed
