"""Forecast of a cell's speed-up by the cost model, from the rounds along the model's own answers."""

import math
from collections import Counter
from collections.abc import Sequence
from itertools import chain
from typing import NamedTuple

from tqdm import tqdm

from lskip.evaluation.sweep.cells import Generators
from lskip.evaluation.sweep.draft_rounds import (
    DraftRound,
    rounds_of_criterion,
    rounds_of_exit,
    rounds_of_ngrams,
    shorter_rounds,
    tokens_of,
)
from lskip.evaluation.sweep.grid import DRAFT_WEIGHTS, Cell, CriterionCell
from lskip.evaluation.sweep.own_answers import ExitReading, OwnText, own_texts, read_answer
from lskip.evaluation.tasks.prompts import Prompt
from lskip.inference import TextGenerator
from lskip.inference.drafting.draft import DraftPlan
from lskip.inference.drafting.registry import drafts_of, round_seconds
from lskip.inference.exit_criteria import MEASURED, MeasuredExit

NEAR = 0.85  # of the best forecast: forecasts err by a tenth


class Forecast(NamedTuple):
    """Prediction of the cost model for a cell: the speed-up of the rounds after the prefill."""

    cell: Cell
    speedup: float
    tokens_per_round: float


class Answers:
    """The model's own answers to a task's prompts, and what drafts say along them, each read once.

    Attributes:
        generators: of the model and of its drafts.
        texts: prompts and greedy answers.
    """

    def __init__(
        self,
        generators: Generators,
        prompts: Sequence[Prompt],
        batch_size: int,
        criterion: type[MeasuredExit] | None = None,
    ):
        """Let the model answer.

        Args:
            batch_size: prompts that are answered together.
            criterion: is measured at every exit.
        """
        self.generators, self.batch_size, self.criterion = generators, batch_size, criterion
        self.prompts = prompts
        self.texts = own_texts(generators.plain, prompts, batch_size)
        self._readings: dict[str, list[ExitReading]] = {}
        self._counts: dict[tuple[str, int | None], Counter[int]] = {}

    def readings(self, draft: str) -> list[ExitReading]:
        """Return what each exit says along each answer, in the weights of "layers", "int8" or "int4"."""
        if draft not in self._readings:
            rounded = draft in DRAFT_WEIGHTS
            generator = self.generators.drafting(Cell(draft, None, 1)) if rounded else self.generators.plain
            runner = generator.draft_runner if rounded else generator.runner
            self._readings[draft] = [
                read_answer(runner, generator.runners.reading_drafts, text, generator.vocab_size, self.criterion)
                for text in self.texts
            ]
        return self._readings[draft]

    def rounds(self, cell: Cell, most: int) -> list[DraftRound]:
        """Return the rounds that a cell's draft would have along all answers.

        Args:
            most: tokens that a round drafts where the draft has to be decoded, at least the cell's.
        """
        if cell.draft == "ngram":
            return [each for text in self.texts for each in rounds_of_ngrams(text, cell.num_speculations)]
        if cell.exit_layer is not None and cell.draft in ("layers", *DRAFT_WEIGHTS):
            pairs = zip(self.texts, self.readings(cell.draft), strict=True)
            return [each for text, reading in pairs for each in rounds_of_cell(cell, text, reading)]
        return shorter_rounds(self._accepted_counts(cell, most), cell.num_speculations)

    def _accepted_counts(self, cell: Cell, most: int) -> Counter[int]:
        """Return the accepted counts of a draft decoded with `most` tokens.

        For drafts whose input depends on earlier rounds, so that no single pass can predict them.
        """
        key = cell.draft, cell.exit_layer
        if key not in self._counts:
            settings = {**self.prompts[0].settings, **cell.settings(), "num_speculations": most}
            ids = [prompt.ids for prompt in self.prompts]
            ended = self.generators.drafting(cell).generate_batch(ids, self.batch_size, **settings)
            self._counts[key] = sum((generation.accepted_counts for _, generation in ended), Counter())
        return self._counts[key]


def rounds_of_cell(cell: Cell, text: OwnText, reading: ExitReading) -> list[DraftRound]:
    """Return the rounds of a cell that drafts with an exit."""
    hits = reading.hits[cell.exit_layer - 1].tolist()
    if not isinstance(cell, CriterionCell):
        return rounds_of_exit(text, hits, cell.num_speculations)
    criterion = MEASURED[cell.criterion](cell.threshold)
    sure = criterion.sure(reading.measured[cell.exit_layer - 1]).tolist()
    return rounds_of_criterion(text, hits, sure, cell.num_speculations)


def forecast(answers: Answers, cells: Sequence[Cell]) -> list[Forecast]:
    """Return a forecast for each cell, the best first."""
    most, generators, found = max(cell.num_speculations for cell in cells), answers.generators, []
    for cell in tqdm(cells, desc="forecast", unit="cell"):
        rounds = answers.rounds(cell, most)
        # Asked for a draft that needs nothing, `drafting` lets go of what is loaded.
        generator = generators.plain if cell.drafter.needs is None else generators.drafting(cell)
        found.append(promised(generator, cell, rounds))
    return best_first(found)


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


def best_first(forecasts: Sequence[Forecast]) -> list[Forecast]:
    """Return the forecasts by speed-up, the highest first and those that are not finite last."""
    return sorted(forecasts, key=lambda each: each.speedup if math.isfinite(each.speedup) else 0.0, reverse=True)


def worth_decoding(forecasts: Sequence[Forecast], count: int) -> list[Cell]:
    """Return `count` cells, sorted by draft: the best of each draft and policy, of each exit that is near, then others.

    Exits come before further lengths of one exit, which differ less: forecasts leave out what a drafted token takes
    besides the model, and so rank the first exits too high.
    """
    ranked = [forecast.cell for forecast in forecasts]
    firsts = {(cell.draft, cell.policy): cell for cell in reversed(ranked)}
    near = [each.cell for each in forecasts if each.speedup >= NEAR * forecasts[0].speedup]
    exits = {(cell.draft, cell.policy, cell.exit_layer): cell for cell in reversed(near)}
    parts = ([cell for cell in ranked if cell in found.values()] for found in (firsts, exits))
    chosen = list(dict.fromkeys([*chain(*parts), *ranked]))
    drafts = [draft for draft, _ in firsts]
    return sorted(chosen[:count], key=lambda cell: (drafts.index(cell.draft), ranked.index(cell)))
