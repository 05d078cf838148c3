"""`lskip tune`: the cells of a sweep ranked by the cost model, so that only the best few are decoded."""

from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console

from lskip.evaluation.sweep.advice import advice, best_cell
from lskip.evaluation.sweep.cells import Generators
from lskip.evaluation.sweep.forecast import Answers
from lskip.evaluation.sweep.grid import Cell, CriterionCell, cell_of, check_grid
from lskip.evaluation.sweep.search import Records, Search, check_criterion, exits_of_answers
from lskip.evaluation.sweep.sweep import in_words, print_cells
from lskip.evaluation.sweep.tuned import adapter_place, check_place, save_tuned, tokens_place, tuned_path
from lskip.evaluation.tasks.prompts import Prompt, prompts_of
from lskip.evaluation.tasks.task import Task
from lskip.inference.exit_criteria import MEASURED
from lskip.inference.loading import resolve_device
from lskip.inference.options import LoadingOptions
from lskip.models.exit_names import layers_of
from lskip.utils.checks import check_whole
from lskip.utils.console import plain_console, plain_table
from lskip.utils.interrupts import interrupt_explained
from lskip.utils.user_errors import one_line

MOST_SPECULATIONS = 12
CriterionName = Literal["Entropy", "Margin"]


def tune(
    task: Task,
    loading: LoadingOptions,
    drafts: list[str] | None = None,
    exit_layers: list[int] | None = None,
    num_speculations: list[int] | None = None,
    num_prompts: int = 8,
    rounds: int = 1,
    decoded_cells: int = 3,
    batch_size: int = 4,
    criterion: CriterionName | None = None,
    precision: float | None = None,
) -> None:
    """Find exit_layer and num_speculations for a task in minutes; `--task` of generate and predict goes by it.

    Times passes once, reads every exit along the model's own answers, ranks all cells by the cost model and
    decodes the best few. What is found is saved beside the model (in ~/.cache/lskip for a hub name or smollm2).

    Args:
        task: as in sweep.
        loading: which model. Its draft weights are set by the drafts.
        drafts: as in sweep; null: the exit_adapter where one is named, else the exits in the model's own weights and
            in int8. Where none of these pays, also what needs no training: int8, int4, ngram. (int8 only where
            weights are not.)
        exit_layers: layers that may draft; null: all but the last, and all of them for int8 and int4.
        num_speculations: tokens drafted; null: 1 to 12.
        num_prompts: prompts of the task that are answered.
        rounds: how often each of the best cells answers each, autoregressive decoding taking turns with it.
        decoded_cells: cells that are decoded: the best of each draft, of each exit that is near, then of all others.
        batch_size: prompts that are answered together where nothing is timed.
        criterion: Entropy or Margin: drafts of exits may also end where it is unsure (CriterionDraft), at the
            threshold of each exit that gives `precision`. null: they draft num_speculations every time.
        precision: share of the tokens sure enough by the criterion that are to be right, above 0 to 1; null: .9.

    Raises:
        ValueError: a value that is not allowed.
    """
    num_speculations = list(range(1, MOST_SPECULATIONS + 1)) if num_speculations is None else num_speculations
    named = _first_tried(loading) if drafts is None else drafts
    check_grid(named, exit_layers, num_speculations, ["FixedDraft"], loading)
    counts = {"num_prompts": num_prompts, "rounds": rounds, "decoded_cells": decoded_cells, "batch_size": batch_size}
    for name, value in counts.items():
        check_whole(name, value, 1)
    precise = check_criterion(criterion, precision, named)
    layers = layers_of(loading.model)
    search = Search(named, drafts is None, exit_layers, num_speculations, layers, criterion, precise, loading.weights)
    search.cells()  # refused before a model is loaded
    path = tuned_path(loading.model)
    check_place(path)
    generators = Generators(loading)
    if "adapter" in named:
        generators.drafting(Cell("adapter", None, 1))  # another model's is refused now
    prompts = prompts_of(task, generators.plain, num_prompts)
    with interrupt_explained("; nothing is saved yet: the same command begins anew"):
        answers = Answers(generators, prompts, batch_size, criterion and MEASURED[criterion])
        records, untried = search.run(answers, rounds, decoded_cells)
        exits = exits_of_answers(answers, search) if "layers" in named else []
    show_and_save(records, exits, untried, task, path, found_of(records, loading, prompts))


def _first_tried(loading: LoadingOptions) -> list[str]:
    """Return the drafts that are tried first where none are named; rounded weights do not draft for themselves."""
    named = ["adapter"] if loading.exit_adapter is not None else ["layers", "int8"]
    return [draft for draft in named if draft != loading.weights]


def show_and_save(
    records: Records, exits: Records, untried: str, task: Task, path: Path, found: dict[str, Any]
) -> None:
    """Print the tables and the advice, then save what was found; ValueError if that fails."""
    console = plain_console()
    if exits:
        print_exits(exits, console)
    print_cells(records, console)
    console.print(advice(task.name, records), *[untried] * bool(untried), sep="\n", soft_wrap=True)
    try:
        save_tuned(path, task.name, found | ({"exits": exits} if exits else {}))
    except OSError as error:
        raise ValueError(f"task: {task.name!r} could not be saved: {one_line(error)}; it stands above") from error
    console.print(f"saved in {path}; used by --task {task.name}", soft_wrap=True)


def print_exits(exits: Records, console: Console) -> None:
    names = [name.replace("own_", "own_\n") for name in exits[0]]
    table = plain_table(*names, title="Exits, on the model's own answers")
    for record in exits:
        # A threshold is to be copied, and may be small.
        table.add_row(*(f"{value:.4g}" if name == "threshold" else in_words(value) for name, value in record.items()))
    console.print(table)


def found_of(records: Sequence[dict[str, Any]], loading: LoadingOptions, prompts: Sequence[Prompt]) -> dict[str, Any]:
    """Return the entry that is saved of a task: what to set, and where and on what that was measured."""
    best = best_cell(records)
    cell = None if best is None else cell_of(best)
    drafted = {"exit_layer": None, "num_speculations": 0, "draft": None} if cell is None else cell.settings()
    if isinstance(cell, CriterionCell):
        drafted["criterion"] = {"name": cell.criterion, "threshold": cell.threshold}
    by_adapter = cell is not None and cell.drafter.needs == "exit_adapter"
    return {
        **drafted,
        "draft_weights": cell and cell.draft_weights,
        "exit_adapter": adapter_place(loading.exit_adapter) if by_adapter else None,
        "draft_tokens": None if by_adapter else tokens_place(loading.draft_tokens),
        "speedup": 1.0 if best is None else best["times"]["speedup"],
        "acceptance_rate": best and best["acceptance_rate"],
        "tokens_per_round": best and best["tokens_per_round"],
        "prompts": len(prompts),
        "max_new_tokens": prompts[0].settings["max_new_tokens"],
        "device": resolve_device(loading.device).type,
        "dtype": loading.dtype,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "date": date.today().isoformat(),
    }
