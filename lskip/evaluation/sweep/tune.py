"""`lskip tune`: the cells of a sweep ranked by the cost model, so that only the best few are decoded."""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from lskip.evaluation.sweep.advice import advice, best_cell, cell_of
from lskip.evaluation.sweep.cells import Generators, measure_cell
from lskip.evaluation.sweep.draft_rounds import (
    DraftRound,
    OwnText,
    exit_predictions,
    rounds_of_exit,
    rounds_of_ngrams,
    shorter_rounds,
    tokens_of,
)
from lskip.evaluation.sweep.grid import Cell, check_grid, grid
from lskip.evaluation.sweep.sweep import print_cells
from lskip.evaluation.sweep.tuned import adapter_place, check_place, save_tuned, tokens_place, tuned_path
from lskip.evaluation.tasks.prompts import Prompt, prompts_of, texts_in_order
from lskip.evaluation.tasks.task import Task
from lskip.inference import TextGenerator
from lskip.inference.drafting.draft import DraftPlan
from lskip.inference.drafting.registry import drafts_of, round_seconds
from lskip.inference.loading import resolve_device
from lskip.inference.options import LoadingOptions
from lskip.models.exit_names import layers_of
from lskip.utils.checks import check_whole
from lskip.utils.console import plain_console
from lskip.utils.interrupts import interrupt_explained
from lskip.utils.user_errors import one_line

MOST_SPECULATIONS = 8
NEED_NO_TRAINING = ("int4", "ngram")  # drafts for any model


class Forecast(NamedTuple):
    """Prediction of the cost model for a cell: the speed-up of the rounds after the prefill."""

    cell: Cell
    speedup: float
    tokens_per_round: float


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
) -> None:
    """Find exit_layer and num_speculations for a task in minutes; `--task` of generate and predict goes by it.

    Times passes once, reads every exit along the model's own answers, ranks all cells by the cost model and
    decodes the best few. What is found is saved beside the model (in ~/.cache/lskip for a hub name or smollm2).

    Args:
        task: as in sweep.
        loading: which model. Its draft weights are set by the drafts.
        drafts: as in sweep.
        exit_layers: layers that may draft; null: all but the last, and all of them for int8 and int4.
        num_speculations: tokens drafted; null: 1 to 8.
        num_prompts: prompts of the task that are answered.
        rounds: how often each of the best cells answers each, autoregressive decoding taking turns with it.
        decoded_cells: cells that are decoded: the best of each draft, then the best of all others.
        batch_size: prompts that are answered together where nothing is timed.

    Raises:
        ValueError: a value that is not allowed.
    """
    num_speculations = list(range(1, MOST_SPECULATIONS + 1)) if num_speculations is None else num_speculations
    if drafts is None:
        drafts = ["layers"] if loading.exit_adapter is None else ["adapter"]
    check_grid(drafts, exit_layers, num_speculations, ["FixedDraft"], loading)
    counts = {"num_prompts": num_prompts, "rounds": rounds, "decoded_cells": decoded_cells, "batch_size": batch_size}
    for name, value in counts.items():
        check_whole(name, value, 1)
    cells = candidates(drafts, exit_layers, num_speculations, layers_of(loading.model))
    path = tuned_path(loading.model)
    check_place(path)
    generators = Generators(loading)
    prompts = prompts_of(task, generators.plain, num_prompts)
    with interrupt_explained("; nothing is saved yet: the same command begins anew"):
        records = best_records(generators, cells, prompts, rounds, decoded_cells, batch_size)
    show_and_save(records, task, drafts, path, found_of(records, loading, prompts))


def show_and_save(
    records: Sequence[dict[str, Any]], task: Task, drafts: Sequence[str], path: Path, found: dict[str, Any]
) -> None:
    """Print the table and the advice, then save what was found; ValueError if that fails."""
    console = plain_console()
    print_cells(records, console)
    console.print(advice(task.name, records), untried(drafts, records), sep="", soft_wrap=True)
    try:
        save_tuned(path, task.name, found)
    except OSError as error:
        raise ValueError(f"task: {task.name!r} could not be saved: {one_line(error)}; it stands above") from error
    console.print(f"saved in {path}; used by --task {task.name}", soft_wrap=True)


def untried(drafts: Sequence[str], records: Sequence[dict[str, Any]]) -> str:
    """Return a line that names untried drafts that need no training; "" where a draft pays or none is left."""
    left = [name for name in NEED_NO_TRAINING if name not in drafts]
    if not left or best_cell(records) is not None:
        return ""
    return f"\nnot tried: {', '.join(left)}, which need no training: --drafts '[{','.join(left)}]'"


def best_records(
    generators: Generators,
    cells: Sequence[Cell],
    prompts: Sequence[Prompt],
    rounds: int,
    decoded_cells: int,
    batch_size: int,
) -> list[dict[str, Any]]:
    """Return the records, as a sweep's, of the cells that are worth decoding."""
    best = worth_decoding(forecast(generators, cells, prompts, batch_size), decoded_cells)
    return [measure_cell(generators, cell, prompts, rounds) for cell in tqdm(best, desc="decode", unit="cell")]


def candidates(
    drafts: Sequence[str], exit_layers: Sequence[int] | None, num_speculations: Sequence[int], num_layers: int
) -> list[Cell]:
    """Return the grid of a sweep, but with every exit for "layers": one pass reads them all."""
    cells = []
    for draft in dict.fromkeys(drafts):
        exits = range(1, num_layers) if exit_layers is None and draft == "layers" else exit_layers
        cells += grid([draft], exits, num_speculations, ["FixedDraft"], num_layers)
    return cells


def forecast(
    generators: Generators, cells: Sequence[Cell], prompts: Sequence[Prompt], batch_size: int
) -> list[Forecast]:
    """Return a forecast for each cell, the best first."""
    plain = generators.plain
    most = prompts[0].settings["max_new_tokens"]
    answers = texts_in_order(plain, prompts, batch_size)
    texts = [OwnText(prompt.ids, answer, most) for prompt, answer in zip(prompts, answers, strict=True)]
    read_exits = any(cell.draft == "layers" for cell in cells)
    hits = [hits_of(plain, text) if read_exits else [] for text in texts]
    counts: dict[tuple[str, int | None], Counter[int]] = {}
    forecasts = []
    for cell in tqdm(cells, desc="forecast", unit="cell"):
        if cell.draft in READ_AHEAD:
            found = [READ_AHEAD[cell.draft](text, hit, cell) for text, hit in zip(texts, hits, strict=True)]
        else:
            key = cell.draft, cell.exit_layer
            if key not in counts:
                largest = max(other.num_speculations for other in cells)
                counts[key] = accepted_counts(generators.drafting(cell), cell, prompts, batch_size, largest)
            found = [shorter_rounds(counts[key], cell.num_speculations)]
        forecasts.append(promised(generators.drafting(cell), cell, [each for rounds in found for each in rounds]))
    return best_first(forecasts)


# Drafts whose rounds can be predicted along a text, without decoding: (text, hits of each exit, cell) -> rounds.
READ_AHEAD: dict[str, Callable[[OwnText, list[list[bool]], Cell], list[DraftRound]]] = {
    "layers": lambda text, hits, cell: rounds_of_exit(text, hits[cell.exit_layer - 1], cell.num_speculations),
    "ngram": lambda text, hits, cell: rounds_of_ngrams(text, cell.num_speculations),
}


def best_first(forecasts: Sequence[Forecast]) -> list[Forecast]:
    """Return the forecasts by speed-up, the highest first and those that are not finite last."""
    return sorted(forecasts, key=lambda each: each.speedup if math.isfinite(each.speedup) else 0.0, reverse=True)


def hits_of(generator: TextGenerator, text: OwnText) -> list[list[bool]]:
    """Return, by exit, first to last, and token of the answer, whether the token is the exit's argmax."""
    reader = generator.runners.reading_drafts(generator.runner, generator.num_layers)
    predictions = exit_predictions(reader, text, generator.vocab_size)
    return (predictions.cpu() == torch.tensor(text.answer)).tolist()


def accepted_counts(
    generator: TextGenerator, cell: Cell, prompts: Sequence[Prompt], batch_size: int, most: int
) -> Counter[int]:
    """Return the accepted counts of a draft decoded with `most` tokens.

    For drafts whose input depends on earlier rounds, so that no single pass can predict them.
    """
    settings = {**cell.settings(), "num_speculations": most}
    ended = generator.generate_batch([p.ids for p in prompts], batch_size, **prompts[0].settings, **settings)
    return sum((generation.accepted_counts for _, generation in ended), Counter())


def promised(generator: TextGenerator, cell: Cell, rounds: Sequence[DraftRound]) -> Forecast:
    """Return the forecast of a cell: by the cost model, seconds of plain decoding over seconds of these rounds."""
    if not rounds:
        return Forecast(cell, 1.0, 1.0)
    costs = generator.costs
    draft, *_ = drafts_of(cell.drafter.kind, cell.exit_layer, generator.runners.available)
    seconds = sum(
        number * round_seconds(costs, DraftPlan(draft, drafted), 1)
        for drafted, number in Counter(each.drafted for each in rounds).items()
    )
    tokens = tokens_of(rounds)
    return Forecast(cell, tokens * costs.plain(1) / seconds, tokens / len(rounds))


def worth_decoding(forecasts: Sequence[Forecast], count: int) -> list[Cell]:
    """Return the best cell of each draft, then the best others, `count` in all, those of one draft side by side."""
    firsts = {forecast.cell.draft: forecast.cell for forecast in reversed(forecasts)}
    ranked = [forecast.cell for forecast in forecasts]
    chosen = [*sorted(firsts.values(), key=ranked.index), *(cell for cell in ranked if cell not in firsts.values())]
    return sorted(chosen[:count], key=lambda cell: (list(firsts).index(cell.draft), ranked.index(cell)))


def found_of(records: Sequence[dict[str, Any]], loading: LoadingOptions, prompts: Sequence[Prompt]) -> dict[str, Any]:
    """Return the entry that is saved of a task: what to set, and where and on what that was measured."""
    best = best_cell(records)
    cell = None if best is None else cell_of(best)
    drafted = {"exit_layer": None, "num_speculations": 0, "draft": None} if cell is None else cell.settings()
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
