"""`lskip sweep`: cells, resuming and results; a resumed sweep ends like an uninterrupted one."""

import csv
import errno
import json
import shutil
from pathlib import Path

import pytest
import torch

from lskip.cli import main
from lskip.evaluation.layers.figure import image_of
from lskip.evaluation.sweep import sweep as sweep_module
from lskip.evaluation.sweep.advice import advice
from lskip.evaluation.sweep.cells import Generators, Pair, measure_cell, times_of
from lskip.evaluation.sweep.figure import sweep_figure
from lskip.evaluation.sweep.grid import Cell, exits_of, grid
from lskip.evaluation.sweep.sweep import print_cells
from lskip.evaluation.tasks.prompts import Prompt
from lskip.evaluation.tasks.task import Example
from lskip.inference import Generation
from lskip.inference.drafting.costs import Costs, RowCosts
from lskip.inference.options import LoadingOptions
from lskip.models.exit_names import exit_names
from lskip.utils.console import plain_console
from lskip.utils.output_files import only_writer
from tests.conftest import make_model

pytestmark = pytest.mark.usefixtures("quick_costs")
NEW_TOKENS = 12


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_tokenizer):
    """Return a folder with a model and a task."""
    folder = tmp_path_factory.mktemp("sweep")
    make_model(eos_token_id=None).save_pretrained(folder / "model")
    tiny_tokenizer.save_pretrained(folder / "model")
    lines = [{"prompt": f"def f{n}(a, b):", "reference": "return a + b"} for n in range(3)]
    (folder / "adds.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def arguments(place, output: str, *more: str) -> list[str]:
    task = ["--task=LocalTask", f"--task.path={place}/adds.jsonl", f"--task.max_new_tokens={NEW_TOKENS}"]
    cells = ["--exit_layers=[2,3]", "--num_speculations=[1,3]", "--drafts=[layers,ngram]", "--exits=2,last"]
    counts = ["--num_prompts=2", "--scored_prompts=3", "--rounds=2"]
    return ["sweep", f"--model={place}/model", f"--output={place}/{output}", *task, *cells, *counts, *more]


def timeless(path) -> dict:
    """Return a sweep's JSON without what depends on the clock."""
    report = json.loads(path.read_text())
    report.pop("times")
    for cell in report["cells"]:
        cell.pop("times")
    return report


@pytest.fixture(scope="module")
def whole(place):
    """Return the report of an uninterrupted sweep."""
    assert main(arguments(place, "whole")) == 0
    return timeless(place / "whole" / "sweep.json")


def test_a_killed_sweep_goes_on_without_redoing_a_cell(place, whole, monkeypatch, capsys):
    measured, measure = [], sweep_module.measure_cell

    def counting(generators, cell, prompts, rounds):
        if len(measured) == 3:
            raise KeyboardInterrupt
        measured.append(str(cell))
        return measure(generators, cell, prompts, rounds)

    monkeypatch.setattr(sweep_module, "measure_cell", counting)
    assert main(arguments(place, "killed")) == 130
    assert "3 of 8 cells are done; go on with --resume true" in capsys.readouterr().err
    assert not (place / "killed" / "sweep.json").exists()
    with (place / "killed" / "cells.jsonl").open("a") as file:
        file.write('{"part": "layers exit_la')  # as a kill leaves it
    before = (place / "killed" / "cells.jsonl").read_text().splitlines()[:4]
    monkeypatch.setattr(sweep_module, "measure_cell", lambda *given: measured.append(str(given[1])) or measure(*given))
    assert main(arguments(place, "killed", "--resume=true")) == 0
    assert len(measured) == len(set(measured)) == 6
    assert (place / "killed" / "cells.jsonl").read_text().splitlines()[:4] == before
    assert timeless(place / "killed" / "sweep.json") == whole


def test_a_finished_sweep_loads_no_model_to_say_it_again(place, whole, monkeypatch):
    monkeypatch.setattr(sweep_module, "Generators", None)
    assert main(arguments(place, "whole", "--resume=true")) == 0
    assert timeless(place / "whole" / "sweep.json") == whole


def test_what_is_written(place, whole):
    assert [(c["draft"], c["exit_layer"], c["num_speculations"]) for c in whole["cells"]] == [
        *(("layers", exit_layer, count) for exit_layer in (2, 3) for count in (1, 3)),
        *(("ngram", None, count) for count in (1, 3)),
    ]
    assert all(cell["mismatches"] == 0 and cell["tokens"] == 2 * 2 * NEW_TOKENS for cell in whole["cells"])
    assert [(each["exit_layer"], each["prompts"]) for each in whole["exits"]] == [(2, 3), (4, 3)]
    rows = list(csv.DictReader((place / "whole" / "sweep.csv").open()))
    assert [row["num_speculations"] for row in rows] == ["1", "3"] * 3
    assert float(rows[0]["speedup"]) > 0
    assert (place / "whole" / "sweep.png").stat().st_size > 10_000


BAD = [
    ("--resume=true --task.max_new_tokens=5", "task.max_new_tokens: '5', but the sweep in '{place}/whole' has '12'"),
    ("", "holds a sweep; go on with it by --resume true"),
    ("--resume=true --overwrite=true", "exclude each other"),
    ("--exit_layers=[5]", "exit_layers: 5 is not from 1 to 4"),
    ("--exit_layers=[4] --drafts=[layers]", "exit_layers: [4] leaves no layer from 1 to 3"),
    ("--exits=9", "exits: 9 is not a whole number from 1 to 4"),
    ("--num_speculations=[0]", "num_speculations: 0 is not a whole number from 1 up"),
    ("--num_speculations=[]", "num_speculations: is an empty list"),
    ("--draft_weights=int8", "draft_weights: 'int8' is set by the grid here"),
    ("--drafts=[adapter]", "exit_adapter: is None; the draft 'adapter' needs one"),
    ("--rounds=0", "rounds: 0 is not a whole number from 1 up"),
    ("--task=StdlibCod", "task: 'StdlibCod' is not one of CnnDmContinuation, CnnDmSummarization, DocstringToCode"),
]


@pytest.mark.parametrize(("flags", "said"), BAD, ids=[flags or "no flag" for flags, _ in BAD])
def test_bad_options_are_told_before_a_model_is_loaded(place, whole, capsys, monkeypatch, flags, said):
    monkeypatch.setattr(sweep_module, "Generators", None)
    assert main(arguments(place, "whole", *flags.split())) == 2
    assert said.format(place=place) in capsys.readouterr().err


def test_grid_of_a_model():
    """A sixth, a quarter, a third and half of 12 layers; rounded weights draft with all of them."""
    assert exits_of("layers", None, 12) == [2, 3, 4, 6]
    assert exits_of("int4", None, 12) == exits_of("ngram", [3], 12) == [None]
    assert exits_of("int8", [12, 3], 12) == [3, None]
    assert exits_of("layers", [12, 3], 12) == [3]
    both = grid(["layers", "int8"], None, [2], ["FixedDraft"], 12)  # exits in their own weights and in int8, and all
    assert [(c.draft, c.exit_layer) for c in both] == [
        *(("layers", exit_layer) for exit_layer in (2, 3, 4, 6)),
        *(("int8", exit_layer) for exit_layer in (2, 3, 4, 6, None)),
    ]
    assert grid(["ngram", "ngram"], None, [1, 2], ["FixedDraft"], 12) == [Cell("ngram", None, d) for d in (1, 2)]


def test_both_take_turns_and_all_of_their_seconds_count(place, monkeypatch):
    """By hand, with set times: prompts A and B, two rounds; the ways take turns in going first."""
    generators = Generators(LoadingOptions(model=f"{place}/model"))
    settings = {"temperature": 0.0, "max_new_tokens": NEW_TOKENS}
    prompts = [Prompt(Example("", ""), [5, 6, number], settings) for number in (7, 8)]
    order, answer = [], generators.plain.generate
    seconds = {True: iter([9, 1.0, 1.0, 2.0, 4.0]), False: iter([9, 2.0, 3.0, 8.0, 4.0])}

    def generate(ids, **chosen):
        found, drafts = answer(ids, **chosen), "draft" in chosen
        if chosen["max_new_tokens"] == 1:
            found.seconds = 0.5
        else:
            order.append((ids[-1], drafts))
            found.seconds = next(seconds[drafts])
        return found

    monkeypatch.setattr(generators.plain, "generate", generate)
    record = measure_cell(generators, Cell("layers", 3, 2), prompts, rounds=2)
    assert order[2:] == [(7, False), (7, True), (8, True), (8, False), (7, True), (7, False), (8, False), (8, True)]
    assert record["times"]["speedups"] == [2.0, 3.0, 4.0, 1.0]
    assert record["times"]["speedup"] == (2 + 3 + 8 + 4) / (1 + 1 + 2 + 4)
    assert record["mismatches"] == 0
    # Without the prefill's half second: 3, 5, 5, 1; the ideal is by the generator's own costs.
    costs, plain = generators.plain.costs, 4 * (NEW_TOKENS - 1)
    assert 4.0 / record["times"]["share_of_ideal"] < plain * costs.plain(1) / costs.verify(0, 1)


def test_a_text_that_differs_is_a_mismatch_of_its_prompt(place, monkeypatch):
    generators = Generators(LoadingOptions(model=f"{place}/model"))
    prompts = [Prompt(Example("", ""), [5, 6, n], {"temperature": 0.0, "max_new_tokens": 4}) for n in (7, 8)]
    answer = generators.plain.generate

    def generate(ids, **chosen):
        found = answer(ids, **chosen)
        if "draft" in chosen and ids[-1] == 8:
            found.token_ids = [1, *found.token_ids[1:]]
        return found

    monkeypatch.setattr(generators.plain, "generate", generate)
    assert measure_cell(generators, Cell("layers", 3, 2), prompts, rounds=2)["mismatches"] == 1


def test_one_model_that_drafts_is_held_at_a_time(place):
    generators = Generators(LoadingOptions(model=f"{place}/model"))
    assert generators.drafting(Cell("layers", 2, 1)) is generators.plain
    assert generators.drafting(Cell("ngram", None, 1)) is generators.plain
    if torch.backends.mkldnn.is_available():
        rounded = generators.drafting(Cell("int8", None, 1))
        assert rounded.draft_runner is not None and rounded is generators.drafting(Cell("int8", 2, 3))
        assert generators.drafting(Cell("layers", 2, 1)).draft_runner is None


def record_of(cell: Cell, *speedups: float) -> dict:
    times = {"speedup": sorted(speedups)[len(speedups) // 2], "speedups": list(speedups)}
    return {**vars(cell), "acceptance_rate": 0.5, "tokens_per_round": 2.0, "times": times}


def test_advice_names_the_fastest_that_is_surely_faster():
    records = [
        record_of(Cell("layers", 4, 2), 1.2, 1.3, 1.2),
        record_of(Cell("int4", None, 5), 1.4, 1.5, 1.6),
        record_of(Cell("ngram", None, 5), 0.9, 1.9, 0.9, 2.1),  # faster in half of the turns only
    ]
    said = advice("T", records)
    assert said.startswith("use num_speculations=5, draft=weights, draft_weights=int4 for T: 1.50x autoregressive")
    assert advice("T", records[:1]).startswith("use exit_layer=4, num_speculations=2, draft=layers for T: 1.20x")
    assert advice("T", records[2:]).startswith("do not draft for T: of 1 settings none is surely faster")
    assert advice("T", [record_of(Cell("layers", 4, 2), 1.01, 1.01)]).startswith("do not draft")
    lucky = record_of(Cell("ngram", None, 2), 1.5) | {"acceptance_rate": None}  # it found nothing to draft
    assert advice("T", [lucky]).startswith("do not draft")


def test_the_figure_maps_grids_and_draws_the_rest_as_lines():
    cells = [Cell("layers", e, d) for e in (2, 3, 4) for d in (1, 2, 4)] + [Cell("int4", None, d) for d in (1, 2, 4)]
    figure = sweep_figure("T", "m", [record_of(cell, 1 + 0.1 * n) for n, cell in enumerate(cells)])
    grid_axes, lines, *_ = figure.axes
    assert (grid_axes.get_xlabel(), grid_axes.get_ylabel()) == ("num_speculations", "exit_layer")
    assert [text.get_text() for text in grid_axes.texts] == [f"{1 + 0.1 * n:.2f}" for n in range(9)]
    assert lines.lines[0].get_xdata().tolist() == [1, 2, 4]
    assert lines.lines[0].get_ydata() == pytest.approx([1.9, 2.0, 2.1])


@pytest.mark.kind("K17 metrics")
@pytest.mark.parametrize(
    "speedups",
    [[1.0], [0.0, 0.0], [float("nan")] * 4, [1.2, float("nan"), 1.1, 1.0], [float("inf"), 1.0, 1.0, 1.0]],
    ids=["one cell", "zeros", "NaN alone", "one NaN", "one infinite"],
)
def test_a_figure_is_drawn_of_any_times(speedups):
    cells = [Cell("layers", e, d) for e in (2, 3) for d in (1, 2)]
    records = [record_of(cell, speedup) for cell, speedup in zip(cells, speedups, strict=False)]
    assert image_of(sweep_figure("T", "m", records), dpi=40).startswith(b"\x89PNG")


@pytest.mark.kind("B34 names and words of strangers")
@pytest.mark.parametrize("name", ["a$b$", "$x", "_run", "x\x1b]0;t\x07", "日本", "n" * 5000, "$\\frac$", "</script>"])
def test_a_figure_shows_any_name(name):
    figure = sweep_figure(name, name, [record_of(Cell("ngram", None, 2), 1.0)])
    assert "\x1b" not in figure.get_suptitle()
    image_of(figure, dpi=40)


@pytest.mark.kind("K17 metrics")
def test_a_clock_that_stands_still_is_no_speed_up():
    text = Generation(token_ids=[1, 2], seconds=0.0, rounds=1)
    costs = Costs(4, RowCosts((1, 64), (1e-3, 1e-3), (1e-3, 1e-3)))
    times = times_of([Pair(text, text, text)], costs, costs, [])
    assert times["speedup"] != times["speedup"] and times["share_of_ideal"] is None


def lines_of(place) -> list[str]:
    return (place / "whole" / "cells.jsonl").read_text().splitlines()


GARBLED = {
    "B18 cut in the middle": lambda lines: [lines[0], lines[1][:40], *lines[2:]],
    "garbage": lambda lines: [*lines[:3], "\x00\ufffd{", *lines[3:]],
    "another object": lambda lines: [*lines, '{"part": 5}'],
    "a cell without times": lambda lines: [*lines, '{"part": "x", "record": {"draft": "layers"}}'],
    "a speed-up in words": lambda lines: [lines[0], lines[1].replace('"speedup": ', '"speedup": "fast", "x": ')],
    "5000 digits": lambda lines: [lines[0], lines[1].replace('"tokens": ', '"tokens": ' + "9" * 5000)],
    "no list of speed-ups": lambda lines: [lines[0], lines[1].replace('"speedups": [', '"speedups": 5, "x": [')],
}


@pytest.mark.kind("B18 damaged caches and files")
@pytest.mark.parametrize("garble", GARBLED.values(), ids=GARBLED)
def test_a_garbled_line_is_named_and_loses_no_other(place, whole, capsys, monkeypatch, tmp_path, garble):
    monkeypatch.setattr(sweep_module, "Generators", None)
    file = tmp_path / "out" / "cells.jsonl"
    file.parent.mkdir()
    file.write_text("".join(f"{line}\n" for line in garble(lines_of(place))))
    before = file.read_bytes()
    assert main(arguments(place, "whole", f"--output={file.parent}", "--resume=true")) == 2
    said = capsys.readouterr().err
    assert "output: line " in said and "remove that line to measure its part again" in said
    assert file.read_bytes() == before


@pytest.mark.kind("B5 B13 two writers")
def test_two_sweeps_are_kept_apart(place, whole, capsys, monkeypatch):
    monkeypatch.setattr(sweep_module, "Generators", None)
    with only_writer(place / "whole", "output"):
        assert main(arguments(place, "whole", "--resume=true")) == 2
    assert "is being written by another process" in capsys.readouterr().err


@pytest.mark.kind("B11 B27 full disks, and places that cannot be written", "B27")
def test_a_full_disk_keeps_the_finished_cells(place, whole, monkeypatch, capsys):
    records = [json.loads(line) for line in lines_of(place)[1:]]
    monkeypatch.setattr(sweep_module, "measure_cell", lambda g, cell, *more: record_named(records, str(cell)))
    monkeypatch.setattr(sweep_module, "score_exit", lambda g, part, *more: record_named(records, str(part)))
    opened, place_of = Path.open, place / "full" / "cells.jsonl"

    def filling(path, mode="r", **more):
        if path == place_of and mode == "a" and path.read_text().count("\n") == 4:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return opened(path, mode, **more)

    with monkeypatch.context() as full:
        full.setattr(Path, "open", filling)
        assert main(arguments(place, "full")) == 2
    said = capsys.readouterr().err
    assert "(No space left on device); 3 parts are kept; go on with --resume true" in said
    assert main(arguments(place, "full", "--resume=true")) == 0
    assert timeless(place / "full" / "sweep.json") == whole


def record_named(records: list[dict], name: str) -> dict:
    return next(each["record"] for each in records if each["part"] == name)


@pytest.mark.kind("B11 B27 full disks, and places that cannot be written", "B48")
def test_a_refused_sweep_leaves_nothing(place, capsys):
    assert main(arguments(place, "none", "--task.max_new_tokens=500")) == 2
    assert "none leaves 500 tokens" in capsys.readouterr().err
    assert not (place / "none").exists()


@pytest.mark.kind("M a new user's first hour")
@pytest.mark.parametrize("terminal", [False, True], ids=["pipe", "narrow terminal"])
def test_no_name_is_cut_in_a_table(capsys, monkeypatch, terminal):
    if terminal:
        monkeypatch.setenv("FORCE_COLOR", "1")
        monkeypatch.setenv("COLUMNS", "60")
    times = {"speedup": 1.0, "tokens_per_second": 12345.6, "share_of_ideal": 0.5}
    cell = Cell("adapter", 29, 8, "ConfidenceDraft")
    print_cells([{**record_of(cell, 1.0), "mismatches": 0, "times": times}], plain_console())
    printed = capsys.readouterr().out
    assert "…" not in printed and (terminal or ("adapter" in printed and "ConfidenceDraft" in printed))


@pytest.mark.kind("M a new user's first hour")
@pytest.mark.parametrize("exits", ["", "last,", "8;16", "-1", "9" * 5000, "first"])
def test_exits_that_are_none_are_told(exits):
    with pytest.raises(ValueError, match=r"exits: '.*' is not a layer's number or last; write them like 8,16,last"):
        exit_names(exits)


@pytest.mark.kind("B6 predict goes on with other settings, another model or another seed")
@pytest.mark.parametrize(("file", "name"), [("model/model.safetensors", "model_files"), ("adds.jsonl", "task.content")])
def test_a_sweep_goes_on_with_the_files_it_was_begun_with(place, whole, capsys, tmp_path, file, name):
    """A model of the same name may be another one."""
    for part in ("model", "whole"):
        shutil.copytree(place / part, tmp_path / part)
    shutil.copy(place / "adds.jsonl", tmp_path)
    (tmp_path / "whole" / "cells.jsonl").unlink()
    assert main(arguments(tmp_path, "whole")) == 0
    (tmp_path / "model" / "results.json").write_text("{}")  # is no part of the model
    assert main(arguments(tmp_path, "whole", "--resume=true")) == 0
    before = (tmp_path / "whole" / "cells.jsonl").read_bytes()
    if file == "adds.jsonl":
        (tmp_path / file).write_text((tmp_path / file).read_text().replace("def f1", "def g1"))
    else:
        make_model(seed=1, eos_token_id=None).save_pretrained(tmp_path / "model")
    assert main(arguments(tmp_path, "whole", "--resume=true")) == 2
    said = capsys.readouterr().err
    assert f"{name}: " in said and "but the sweep in" in said
    assert (tmp_path / "whole" / "cells.jsonl").read_bytes() == before
