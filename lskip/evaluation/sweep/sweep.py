"""`lskip sweep`: the speed of every way to draft on a task's prompts, and the task's metric at fixed exits."""

import csv
import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from tqdm import tqdm

from lskip.evaluation.layers.figure import image_of
from lskip.evaluation.sweep.advice import advice
from lskip.evaluation.sweep.cells import Generators, measure_cell
from lskip.evaluation.sweep.figure import sweep_figure
from lskip.evaluation.sweep.file import SweepFile
from lskip.evaluation.sweep.grid import Cell, PolicyName, check_grid, grid
from lskip.evaluation.tasks import embedded, hub  # noqa: F401 (their classes are what --task can name)
from lskip.evaluation.tasks.prompts import prompts_of, texts_in_order
from lskip.evaluation.tasks.scores import score
from lskip.evaluation.tasks.task import Task
from lskip.inference.options import LoadingOptions
from lskip.inference.text import decode_text
from lskip.models.exit_names import exit_layers_of, exit_names, layers_of
from lskip.models.reading.sources import digest_of
from lskip.utils.checks import check_whole
from lskip.utils.console import plain_console, plain_table
from lskip.utils.output_files import output_folder, write_bytes, write_json
from lskip.utils.user_paths import user_path

NUM_SPECULATIONS = (2, 4, 6, 8)


@dataclass(frozen=True)
class FixedExit:
    """Part of a sweep that is no cell: the task's metric for the answers of one exit."""

    exit_layer: int

    def __str__(self) -> str:
        return f"exit {self.exit_layer}"


Part = Cell | FixedExit


def sweep(
    task: Task,
    output: str,
    loading: LoadingOptions,
    drafts: list[str] | None = None,
    exit_layers: list[int] | None = None,
    num_speculations: list[int] | None = None,
    policies: list[PolicyName] | None = None,
    num_prompts: int = 8,
    rounds: int = 2,
    exits: str | None = None,
    scored_prompts: int = 32,
    batch_size: int = 8,
    resume: bool = False,
    overwrite: bool = False,
) -> None:
    """Time every way to draft on a task, each beside autoregressive decoding, and advise on one.

    Args:
        task: a class of tasks (StdlibCode, DocstringToCode, PythonTopics, HomeAssistant, HumanEval, LocalTask,
            CnnDmSummarization, CnnDmContinuation, XsumSummarization, TopV2) or one of your own by its import path.
        output: folder for cells.jsonl (a line for each finished cell), sweep.json, sweep.csv and sweep.png.
        loading: which model. Its draft weights are set by the drafts.
        drafts: what drafts: layers, int8, int4, ngram, adapter, or a Drafter of your own by its import path; null:
            the exit_adapter where one is named, else layers.
        exit_layers: layers that drafts exit at; the last one stands for rounded drafts of all layers. null: a
            sixth, a quarter, a third and half of the layers; for rounded weights all, and beside layers those too.
        num_speculations: tokens drafted; null: 2, 4, 6 and 8.
        policies: FixedDraft, ConfidenceDraft, CostAwareDraft, which draft so many tokens at most; null: FixedDraft.
        num_prompts: prompts of the task that each cell answers, those whose answers have room in the context.
        rounds: how often it answers each, autoregressive decoding taking turns with it.
        exits: layers with commas between, or last, as 8,16,last: the task's metric for texts that are generated from
            each of them alone. null: none.
        scored_prompts: prompts of the task that each of the exits answers.
        batch_size: prompts that an exit answers together; nothing there is timed.
        resume: go on with a sweep that was stopped; finished cells are kept. The grid may have grown.
        overwrite: start over in an existing folder.

    Raises:
        ValueError: a value that is not allowed, or an output that holds another sweep.
    """
    num_speculations = list(NUM_SPECULATIONS) if num_speculations is None else num_speculations
    policies = ["FixedDraft"] if policies is None else policies
    if drafts is None:
        drafts = ["layers"] if loading.exit_adapter is None else ["adapter"]
    check_grid(drafts, exit_layers, num_speculations, policies, loading)
    counts = {"num_prompts": num_prompts, "rounds": rounds, "scored_prompts": scored_prompts, "batch_size": batch_size}
    for name, value in counts.items():
        check_whole(name, value, 1)
    asked_exits = [] if exits is None else exit_names(exits)
    num_layers = layers_of(loading.model)
    cells = grid(drafts, exit_layers, num_speculations, policies, num_layers)
    parts: list[Part] = [*cells, *map(FixedExit, exit_layers_of(asked_exits, num_layers))]
    shared, folder = {**describe(task, loading), **counts}, user_path(output, "output")
    with output_folder(folder):
        file = SweepFile(folder / "cells.jsonl", shared, resume, overwrite)
        measure_missing(parts, file, task, loading, counts)
        write_results(folder, task, shared, {part: file.parts[str(part)] for part in parts})


def describe(task: Task, loading: LoadingOptions) -> dict[str, Any]:
    """Return the task and the options that all cells of a sweep have in common, in plain types."""
    options = {f"task.{name}": str(value) for name, value in vars(task).items() if not name.startswith("_")}
    return {"task": task.name, **options, **asdict(loading), "model_files": digest_of(loading.model)}


def measure_missing(
    parts: Sequence[Part], file: SweepFile, task: Task, loading: LoadingOptions, counts: dict[str, int]
) -> None:
    """Measure the parts that `file` lacks; with Ctrl-C the finished ones stay, and the error says how to go on."""
    missing = [part for part in parts if str(part) not in file.parts]
    if not missing:
        return
    generators = Generators(loading)
    timed = prompts_of(task, generators.plain, counts["num_prompts"])
    with tqdm(initial=len(parts) - len(missing), total=len(parts), unit="cell", desc="sweep") as bar:
        try:
            for part in missing:
                bar.set_postfix_str(str(part))
                if isinstance(part, Cell):
                    record = measure_cell(generators, part, timed, counts["rounds"])
                else:
                    record = score_exit(generators, part, task, counts)
                file.add(str(part), record)
                bar.update()
        except KeyboardInterrupt as pressed:  # or its subclass for another signal
            message = f", {bar.n} of {len(parts)} cells are done; go on with --resume true"
            raise type(pressed)(message) from None


def score_exit(generators: Generators, part: FixedExit, task: Task, counts: dict[str, int]) -> dict[str, Any]:
    """Return {"exit_layer", "prompts", "scores"}, with the metrics of the texts generated from this exit alone."""
    generator = generators.plain
    prompts = prompts_of(task, generator, counts["scored_prompts"])
    answers = texts_in_order(generator, prompts, counts["batch_size"], exit_layer=part.exit_layer)
    texts = [decode_text(generator.tokenizer, ids) for ids in answers]
    scores = score(task, [prompt.example for prompt in prompts], texts)
    return {"exit_layer": part.exit_layer, "prompts": len(prompts), "scores": scores}


def write_results(folder: Path, task: Task, shared: dict[str, Any], found: dict[Part, dict[str, Any]]) -> None:
    """Print the tables and the advice, and write sweep.json, sweep.csv and sweep.png into the folder."""
    cells = [record for part, record in found.items() if isinstance(part, Cell)]
    exits = [record for part, record in found.items() if not isinstance(part, Cell)]
    advised, console = advice(task.name, cells), plain_console()
    print_cells(cells, console)
    if exits:
        print_exits(exits, console)
    console.print(advised, soft_wrap=True)
    times = {"advice": advised, "threads": torch.get_num_threads(), "torch": torch.__version__}
    write_json(folder / "sweep.json", {**shared, "cells": cells, "exits": exits, "times": times})
    write_bytes(folder / "sweep.csv", csv_of(cells).encode())
    figure = sweep_figure(task.name, Path(shared["model"]).name, cells)
    write_bytes(folder / "sweep.png", image_of(figure))


def csv_of(cells: Sequence[dict[str, Any]]) -> str:
    """Return a CSV table with a line a cell; lists and tables of the JSON file are left out."""
    rows, text = [flat(record) for record in cells], io.StringIO(newline="")
    writer = csv.DictWriter(text, rows[0])
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def flat(record: dict[str, Any]) -> dict[str, Any]:
    single = {**record, **record["times"]}
    return {name: value for name, value in single.items() if not isinstance(value, dict | list)}


def print_cells(cells: Sequence[dict[str, Any]], console: Console) -> None:
    columns = {
        **{"draft": "draft", "exit_layer": "exit_\nlayer", "num_speculations": "num_specu-\nlations"},
        **{"policy": "policy", "speedup": "speed-\nup", "tokens_per_second": "tokens/s"},
        **{"acceptance_rate": "accept-\nance_rate", "tokens_per_round": "tokens_\nper_round"},
        **{"share_of_ideal": "share\nof ideal", "mismatches": "mis-\nmatches"},
    }
    table = plain_table(*columns.values(), title="Speed-up over autoregressive decoding", right=4)
    for column in table.columns[1:3]:
        column.justify = "right"
    for record in map(flat, cells):
        table.add_row(*(in_words(record[name]) for name in columns))
    console.print(table)


def print_exits(exits: Sequence[dict[str, Any]], console: Console) -> None:
    names = list(exits[0]["scores"])
    table = plain_table("exit_layer", *names, title=f"Fixed exits, {exits[0]['prompts']} prompts")
    for record in exits:
        table.add_row(str(record["exit_layer"]), *(f"{record['scores'][name]:.3f}" for name in names))
    console.print(table)


def in_words(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.2f}"
    return "" if value is None else str(value)
