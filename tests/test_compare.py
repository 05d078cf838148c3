"""`lskip compare`: the table, the figure, and runs given by position."""

import pytest
import yaml
from matplotlib.image import imread
from test_run_summary import FIRST, LAST, write_events

from lskip.cli import main
from lskip.evaluation import compare as module

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
        (["skipping", "--figures=x.png"], "figures: there is no such option; did you mean figure?"),
    ],
)
def test_a_mistake_in_one_sentence(runs, capsys, arguments, sentence):
    assert main(["compare", *arguments]) == 2
    assert sentence in capsys.readouterr().err
