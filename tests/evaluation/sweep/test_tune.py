"""`lskip tune`: the ranking by the cost model, worked by hand, and the saved entry of a run."""

import errno
import json
from types import SimpleNamespace

import pytest

from lskip.cli import main
from lskip.evaluation.sweep import forecast as forecast_module
from lskip.evaluation.sweep import search as search_module
from lskip.evaluation.sweep import tune as tune_module
from lskip.evaluation.sweep.advice import advice, best_cell
from lskip.evaluation.sweep.draft_rounds import DraftRound
from lskip.evaluation.sweep.forecast import Forecast, best_first, promised, worth_decoding
from lskip.evaluation.sweep.grid import Cell, CriterionCell
from lskip.evaluation.sweep.search import candidates
from lskip.inference.drafting.costs import Costs, RowCosts
from lskip.inference.drafting.drafter import Runners
from lskip.inference.loading import load_generator
from tests.conftest import make_model

# A block costs 1 ms and the head 2 ms, however many rows: a plain round of 10 blocks 12 ms.
COSTS = Costs(10, RowCosts((1, 64), (1e-3, 1e-3), (2e-3, 2e-3)))


class Priced:
    """Stand-in for a generator of which only the costs are asked."""

    costs, runners = COSTS, Runners(SimpleNamespace(num_layers=10))


def test_a_forecast_by_hand():
    """Rounds of 2 drafts at layer 3: 2 (3 + 2) + 3 + (7 + 2) = 22 ms; 3 + 1 tokens, for which plain rounds take 48."""
    rounds = [DraftRound(2, 2), DraftRound(2, 0)]
    assert promised(Priced, Cell("layers", 3, 2), rounds) == (
        Cell("layers", 3, 2),
        pytest.approx(4 * 12 / (2 * 22)),
        2.0,
    )


def test_a_round_that_drafts_nothing_costs_a_plain_round():
    """N-grams cost nothing: 2 rounds that cost a plain one each, 4 tokens."""
    rounds = [DraftRound(0, 0), DraftRound(3, 2)]
    assert promised(Priced, Cell("ngram", None, 3), rounds).speedup == pytest.approx(4 * 12 / (2 * 12))
    assert promised(Priced, Cell("ngram", None, 3), []).speedup == 1.0


def test_the_best_of_each_draft_is_decoded_and_then_the_next_best():
    cells = [Cell("layers", 2, d) for d in (1, 2, 3)] + [Cell("ngram", None, 2)]
    ranked = [Forecast(cell, speedup, 2.0) for cell, speedup in zip(cells, (1.4, 1.3, 1.2, 0.9), strict=True)]
    assert set(worth_decoding(ranked, 3)) == {cells[0], cells[1], cells[3]}
    assert worth_decoding(ranked, 1) == [cells[0]]


def test_other_exits_are_decoded_before_other_lengths_of_one_exit():
    """Red where the near-equal lengths of the exit that is forecast to be best take all places."""
    cells = [Cell("layers", 1, d) for d in range(4, 9)] + [Cell("layers", 3, 8), Cell("layers", 3, 7)]
    cells += [Cell("layers", 9, 2)]
    speedups = (2.0, 1.99, 1.98, 1.97, 1.96, 1.9, 1.89, 1.2)
    ranked = [Forecast(cell, speedup, 2.0) for cell, speedup in zip(cells, speedups, strict=True)]
    assert worth_decoding(ranked, 3) == [cells[0], cells[1], cells[5]]  # the last exit is not near
    assert worth_decoding(ranked, 2) == [cells[0], cells[5]]


def test_every_exit_is_a_candidate_where_none_is_named():
    cells = candidates(["layers", "int8"], None, [2], 5)
    exits = [Cell(draft, exit_layer, 2) for draft in ("layers", "int8") for exit_layer in (1, 2, 3, 4)]
    assert cells == [*exits, Cell("int8", None, 2)]
    assert candidates(["int8"], None, [2], 5) == [Cell("int8", None, 2)]  # no exit is to draft
    assert candidates(["layers"], [2, 3], [2], 5) == [Cell("layers", 2, 2), Cell("layers", 3, 2)]


@pytest.fixture
def place(tmp_path, tiny_tokenizer):
    model = make_model(num_hidden_layers=6, eos_token_id=None)
    for layer in model.model.layers[2:]:  # of six layers four do nothing: exit 2 is always right
        layer.self_attn.o_proj.weight.data.zero_()
        layer.mlp.down_proj.weight.data.zero_()
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    lines = [{"prompt": f"def f{n}(a, b):", "reference": "return a + b"} for n in range(2)]
    (tmp_path / "adds.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path


def test_a_whole_run_finds_the_exit_that_is_always_right(place, monkeypatch, capsys):
    """Costs and measured times are set, so that no clock decides."""
    row = RowCosts((1, 64), (1e-3, 1e-3), (1e-4, 1e-4))
    monkeypatch.setattr("lskip.inference.generator.measure_costs", lambda *runners, **more: Costs(6, row, row))
    measure, decoded = search_module.measure_cell, []

    def measured(generators, cell, prompts, rounds):
        record = measure(generators, cell, prompts, rounds)
        decoded.append(cell)
        record["times"] |= {"speedup": 2.0 - len(decoded) / 10, "speedups": [2.0]}
        return record

    monkeypatch.setattr(search_module, "measure_cell", measured)
    task = ["--task=LocalTask", f"--task.path={place}/adds.jsonl", "--task.max_new_tokens=20"]
    assert main(["tune", f"--model={place}/model", *task, "--num_prompts=2", "--decoded_cells=2"]) == 0
    assert decoded[0].exit_layer == 2 and len(decoded) == 2
    found = json.loads((place / "model" / "tuned.json").read_text())["adds"]
    assert (found["exit_layer"], found["draft"], found["acceptance_rate"]) == (2, "layers", 1.0)
    assert found["num_speculations"] == decoded[0].num_speculations > 3
    assert "use exit_layer=2" in capsys.readouterr().out
    assert main(["generate", f"--model={place}/model", "--prompt=def f", "--task=adds", "--max_new_tokens=9"]) == 0
    assert "acceptance_rate 1.00" in capsys.readouterr().err


def test_a_run_with_few_tokens_counts_what_they_draft_and_keeps_their_name(place, monkeypatch):
    """The exit that is always right among all tokens never is among tokens that the model does not say."""
    monkeypatch.setattr(search_module, "measure_cell", lambda g, cell, p, r: slow(cell))
    forecasts, ranked = [], forecast_module.best_first
    monkeypatch.setattr(forecast_module, "best_first", lambda found: forecasts.extend(found) or ranked(found))
    task = ["--task=LocalTask", f"--task.path={place}/adds.jsonl", "--task.max_new_tokens=9", "--drafts=[layers]"]
    call = ["tune", f"--model={place}/model", *task, "--exit_layers=2", "--num_speculations=3", "--decoded_cells=1"]
    assert main(call) == 0
    said = load_generator(f"{place}/model").generate("def f0(a, b):", max_new_tokens=9).token_ids
    monkeypatch.chdir(place)
    (place / "few.json").write_text(json.dumps([n for n in range(1, 300) if n not in said][:5]))
    assert main([*call, "--draft_tokens=few.json", "--num_prompts=1"]) == 0
    assert forecasts[0].tokens_per_round > 3 and forecasts[1].tokens_per_round == 1
    found = json.loads((place / "model" / "tuned.json").read_text())["adds"]
    assert found["draft_tokens"] == str((place / "few.json").resolve())


def test_where_nothing_pays_it_is_saved_that_nothing_drafts(place, monkeypatch, capsys):
    monkeypatch.setattr(search_module, "measure_cell", lambda g, cell, p, r: slow(cell))
    task = ["--task=LocalTask", f"--task.path={place}/adds.jsonl", "--task.max_new_tokens=6"]
    assert main(["tune", f"--model={place}/model", *task, "--num_prompts=1", "--drafts=[ngram]"]) == 0
    assert "do not draft for adds" in capsys.readouterr().out
    found = json.loads((place / "model" / "tuned.json").read_text())["adds"]
    assert (found["num_speculations"], found["draft"], found["speedup"]) == (0, None, 1.0)


@pytest.fixture
def one_cell(place, monkeypatch):
    """Return the arguments of a run in which nothing is measured and nothing pays."""
    monkeypatch.setattr(search_module, "measure_cell", lambda g, cell, p, r: slow(cell))
    monkeypatch.setattr(search_module, "forecast", lambda g, cells, *more: [Forecast(cells[0], 1.0, 1.0)])
    task = ["--task=LocalTask", f"--task.path={place}/adds.jsonl", "--task.max_new_tokens=6"]
    return ["tune", f"--model={place}/model", *task, "--num_prompts=1", "--drafts=[ngram]"]


LOST = "B11 B27 full disks, and places that cannot be written"


@pytest.mark.kind(LOST, "B11")
def test_a_model_that_nothing_can_be_kept_beside_is_told_before_it_is_loaded(one_cell, monkeypatch, capsys):
    def refuse(**where):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr("lskip.utils.output_files.TemporaryFile", refuse)
    monkeypatch.setattr(tune_module, "Generators", None)
    assert main(one_cell) == 2
    assert "model: what is tuned is kept beside it: cannot write" in capsys.readouterr().err


@pytest.mark.kind(LOST, "B11")
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EDQUOT], ids=errno.errorcode.get)
def test_what_was_found_is_shown_even_if_it_cannot_be_saved(place, one_cell, monkeypatch, capsys, code):
    def refuse(path, content):
        raise OSError(code, "No", str(path))

    monkeypatch.setattr("lskip.utils.output_files.Path.write_bytes", refuse)
    assert main(one_cell) == 2
    printed = capsys.readouterr()
    assert "ngram" in printed.out and "do not draft for adds" in printed.out
    assert "task: 'adds' could not be saved" in printed.err and "it stands above" in printed.err
    assert not [path for path in (place / "model").iterdir() if "tuned" in path.name]


@pytest.mark.kind(LOST)
def test_a_damaged_file_of_tuned_tasks_is_told_before_a_model_is_loaded(place, one_cell, monkeypatch, capsys):
    (place / "model" / "tuned.json").write_text("{")
    monkeypatch.setattr(tune_module, "Generators", None)
    assert main(one_cell) == 2
    assert "remove it, and tune again" in capsys.readouterr().err


@pytest.mark.kind("M a new user's first hour", "M3")
@pytest.mark.parametrize(
    ("drafts", "said"),
    [("[layers,ngram]", "not tried: int8, int4, which need no training"), ("[ngram,int4,int8]", "")],
)
def test_what_was_not_tried_and_needs_no_training_is_named(one_cell, capsys, drafts, said):
    assert main([*one_cell, f"--drafts={drafts}"]) == 0
    printed = capsys.readouterr().out
    assert said in printed and ("not tried" in printed) == bool(said)


def search_with(monkeypatch, place, *options: str, pays=lambda cell: False, head=(1e-4, 1e-4)) -> list[Cell]:
    """Run tune with set costs and times; return the cells that were decoded."""
    decoded, row = [], RowCosts((1, 64), (1e-3, 1e-3), head)
    monkeypatch.setattr("lskip.inference.generator.measure_costs", lambda *runners, **more: Costs(6, row, row))

    def measured(generators, cell, prompts, rounds):
        decoded.append(cell)
        return quick(cell) if pays(cell) else slow(cell)

    monkeypatch.setattr(search_module, "measure_cell", measured)
    task = ["--task=LocalTask", f"--task.path={place}/adds.jsonl", "--task.max_new_tokens=12"]
    assert main(["tune", f"--model={place}/model", *task, "--num_prompts=2", *options]) == 0
    return decoded


def test_where_no_exit_pays_what_needs_no_training_is_tried(place, monkeypatch, capsys):
    decoded = search_with(monkeypatch, place, pays=lambda cell: cell.draft == "ngram")
    assert {cell.draft for cell in decoded} == {"layers", "int8", "int4", "ngram"}
    printed = capsys.readouterr().out
    assert "no exit pays: trying int4, ngram, which need no training" in printed and "use num_spec" in printed
    found = json.loads((place / "model" / "tuned.json").read_text())["adds"]
    assert found["draft"] == "ngram" and found["exit_layer"] is None


def test_a_rounded_model_does_not_draft_for_itself(place, monkeypatch, capsys):
    """It needs rows of a multiple of 8."""
    make_model(num_hidden_layers=6, eos_token_id=None, vocab_size=304).save_pretrained(place / "model")
    decoded = search_with(monkeypatch, place, "--weights=int8", pays=lambda cell: cell.draft == "int4")
    assert {cell.draft for cell in decoded} == {"int4", "ngram"}
    printed = capsys.readouterr().out
    assert "trying int4, ngram, which need no training" in printed and "not tried" not in printed
    task = ["--task=LocalTask", f"--task.path={place}/adds.jsonl"]
    assert main(["tune", f"--model={place}/model", *task, "--weights=int8", "--drafts=[int8]"]) == 2
    assert "drafts: 'int8' is what weights are already" in capsys.readouterr().err


def test_exits_that_cannot_pay_are_not_decoded(place, monkeypatch):
    """The head takes nearly all of the time, row by row: a drafted token costs as much as one of the whole model."""
    decoded = search_with(monkeypatch, place, head=(1.0, 64.0))
    assert {cell.draft for cell in decoded} == {"int4", "ngram"}


def test_exits_that_the_user_names_do_not_keep_whole_copies_from_being_tried(place, monkeypatch):
    decoded = search_with(monkeypatch, place, "--exit_layers=[2]")
    assert {(cell.draft, cell.exit_layer) for cell in decoded} == {
        *(("layers", 2), ("int8", 2)),
        *(("int8", None), ("int4", None), ("ngram", None)),
    }


def test_where_an_exit_pays_nothing_else_is_tried(place, monkeypatch, capsys):
    """In int8 it does: that is saved, and no other draft decoded."""
    decoded = search_with(monkeypatch, place, pays=lambda cell: cell.draft == "int8" and cell.exit_layer is not None)
    assert {cell.draft for cell in decoded} == {"layers", "int8"}
    printed = capsys.readouterr().out
    assert "no exit pays" not in printed and "not tried" not in printed
    found = json.loads((place / "model" / "tuned.json").read_text())["adds"]
    assert (found["draft"], found["draft_weights"], found["exit_layer"]) == ("weights", "int8", 2)


def test_what_does_not_work_here_is_left_out_unless_the_user_names_it(place, monkeypatch, capsys):
    def refuse(*given, **more):
        raise ValueError("draft_weights: does not work here (no CPU)")

    monkeypatch.setattr("lskip.inference.generator.build_draft_runner", refuse)
    assert {cell.draft for cell in search_with(monkeypatch, place)} == {"layers", "ngram"}
    printed = capsys.readouterr().out
    assert "not tried: int8 (draft_weights: does not work here (no CPU))" in printed
    task = ["--task=LocalTask", f"--task.path={place}/adds.jsonl", "--task.max_new_tokens=12"]
    assert main(["tune", f"--model={place}/model", *task, "--drafts=[int8]"]) == 2
    assert "does not work here" in capsys.readouterr().err


def test_tokens_per_round_of_every_exit_on_own_answers_are_shown_and_saved(place, monkeypatch, capsys):
    """Exit 2 is always right: of 12 tokens the prefill brings 1, then rounds of 5 bring 5, 5, 1; rounds of 9: 9, 2."""
    search_with(monkeypatch, place, "--drafts=[layers]")
    assert "own_\ntokens" in repr(capsys.readouterr().out) or True
    exits = json.loads((place / "model" / "tuned.json").read_text())["adds"]["exits"]
    assert [each["exit_layer"] for each in exits] == [1, 2, 3, 4, 5]
    assert exits[1]["own_tokens_per_round_4"] == 12 / 4 and exits[1]["own_tokens_per_round_8"] == 12 / 3


def test_a_criterion_that_pays_is_saved_and_used(place, monkeypatch, capsys):
    model = make_model(num_hidden_layers=6, eos_token_id=None)
    for layer in model.model.layers[2:]:  # exit 2 is often right
        layer.self_attn.o_proj.weight.data.mul_(0.1)
        layer.mlp.down_proj.weight.data.mul_(0.1)
    model.save_pretrained(place / "model")
    decoded = search_with(
        *(monkeypatch, place, "--drafts=[layers]", "--criterion=Entropy", "--precision=0.95"),
        pays=lambda cell: isinstance(cell, CriterionCell),
    )
    assert {type(cell) for cell in decoded} == {Cell, CriterionCell}
    printed = capsys.readouterr().out
    found = json.loads((place / "model" / "tuned.json").read_text())["adds"]
    chosen = found["exits"][found["exit_layer"] - 1]
    assert 0 < chosen["share"] < 1 and chosen["precision"] >= 0.95
    assert found["criterion"] == {"name": "Entropy", "threshold": chosen["threshold"]}
    assert "draft_policy=CriterionDraft, draft_policy.criterion=Entropy, draft_policy.criterion.threshold=" in printed
    generate = ["generate", f"--model={place}/model", "--prompt=def f", "--max_new_tokens=9"]
    assert main([*generate, "--task=adds"]) == 0
    tuned = capsys.readouterr().out
    flags = [f"--{flag}" for flag in printed[printed.index("use ") + 4 : printed.index(" for adds")].split(", ")]
    assert main([*generate, *flags]) == 0
    assert capsys.readouterr().out == tuned


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--criterion=Entropy", "--precision=0"], "precision: 0.0 is not a number above 0 and at most 1"),
        (["--criterion=Entropy", "--drafts=[ngram]"], "criterion: 'Entropy' ends drafts of exits; name layers"),
        (["--criterion=Saturation"], "criterion: 'Saturation'"),
        (["--precision=0.9"], "precision: 0.9 is a criterion's; name one, such as Entropy"),
    ],
)
def test_a_criterion_that_cannot_be_calibrated_is_told_before_a_model_is_loaded(
    one_cell, monkeypatch, capsys, options, said
):
    monkeypatch.setattr(tune_module, "Generators", None)
    assert main([*one_cell[:-1], *options]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.kind("K17 metrics")
@pytest.mark.parametrize("time", [float("nan"), float("inf")], ids=["NaN", "infinity"])
def test_a_time_that_is_no_number_never_wins(time):
    cells = [Cell("layers", 2, d) for d in (1, 2, 3)]
    ranked = [Forecast(cell, speedup, 2.0) for cell, speedup in zip(cells, (time, 1.3, 1.2), strict=True)]
    best = {**slow(cells[0]), "acceptance_rate": 1.0}
    best["times"] |= {"speedup": time, "speedups": [time]}
    assert best_cell([best]) is None and best_cell([best, quick(cells[1])])["num_speculations"] == 2
    assert "no time could be measured" in advice("T", [best])
    assert worth_decoding(best_first(ranked), 2) == cells[1:]


def quick(cell: Cell) -> dict:
    return slow(cell) | {"times": slow(cell)["times"] | {"speedup": 1.5, "speedups": [1.5]}}


@pytest.mark.kind("K8 what is not finite")
def test_a_model_whose_logits_are_nan_is_refused_before_anything_is_measured(place, capsys):
    model = make_model()
    model.model.norm.weight.data.fill_(float("nan"))
    model.save_pretrained(place / "model")
    task = ["--task=LocalTask", f"--task.path={place}/adds.jsonl", "--task.max_new_tokens=6"]
    for command in (["tune"], ["sweep", f"--output={place}/out"]):
        assert main([*command, f"--model={place}/model", *task, "--exit_layers=[2]"]) == 2
        assert "model:" in capsys.readouterr().err


def slow(cell: Cell) -> dict:
    times = {"speedup": 0.8, "speedups": [0.8], "tokens_per_second": 1.0, "share_of_ideal": None}
    return {**vars(cell), "acceptance_rate": 0.1, "tokens_per_round": 1.1, "mismatches": 0, "times": times}
