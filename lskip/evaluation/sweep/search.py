"""The search of `lskip tune`: which drafts are tried, and which of their cells are decoded."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from lskip.evaluation.sweep.advice import best_cell
from lskip.evaluation.sweep.calibration import Threshold, calibrate_exits
from lskip.evaluation.sweep.cells import Generators, measure_cell
from lskip.evaluation.sweep.forecast import Answers, forecast, worth_decoding
from lskip.evaluation.sweep.grid import DRAFT_WEIGHTS, Cell, CriterionCell, grid
from lskip.evaluation.sweep.own_answers import own_tokens_per_round
from lskip.inference.exit_criteria import MEASURED
from lskip.models.readout import NUM_SPECULATIONS
from lskip.utils.checks import check_choice, check_real
from lskip.utils.console import say
from lskip.utils.user_errors import one_line

NEED_NO_TRAINING = ("int8", "int4", "ngram")  # drafts for any model
PRECISION = 0.9
EXITING = ("layers", *DRAFT_WEIGHTS)  # drafts whose exits are read along the answers

Records = Sequence[dict[str, Any]]


@dataclass(frozen=True)
class Search:
    """What is tried, in which order.

    Attributes:
        drafts: tried first.
        goes_on: whether, where no exit pays, what needs no training is tried too; what does not work here is then
            left out. Else it is an error, since the user has named it.
        exit_layers, num_speculations, criterion, precision: of `tune`.
        num_layers: L.
        weights: of the model, which do not draft for themselves.
    """

    drafts: Sequence[str]
    goes_on: bool
    exit_layers: Sequence[int] | None
    num_speculations: Sequence[int]
    num_layers: int
    criterion: str | None = None
    precision: float = PRECISION
    weights: str = "auto"

    def run(self, answers: Answers, rounds: int, decoded_cells: int) -> tuple[list[dict[str, Any]], str]:
        """Return the records, as a sweep's, of the cells that were worth decoding; and a line on what was not tried."""
        refused: dict[str, str] = {}
        whole = {cell.draft for cell in self.cells() if cell.exit_layer is None}
        others = [draft for draft in NEED_NO_TRAINING if draft not in {*whole, self.weights}]
        least = 1.0 if self.goes_on and others else 0.0
        records = self._decode(answers, self.cells(), rounds, decoded_cells, refused, least)
        if trained_draft_pays(records) or not others:
            return records, ""
        if not self.goes_on:
            advice = f"which need no training: --drafts '[{','.join(others)}]'"
            return records, "" if best_cell(records) else f"not tried: {', '.join(others)}, {advice}"
        trained = "adapter" if "adapter" in self.drafts else "exit"
        say(f"no {trained} pays: trying {', '.join(others)}, which need no training")
        cells = candidates(others, None, self.num_speculations, self.num_layers)
        records += self._decode(answers, cells, rounds, decoded_cells, refused)
        return records, "\n".join(f"not tried: {draft} ({reason})" for draft, reason in refused.items())

    def cells(self) -> list[Cell]:
        """Return the cells that are tried first, without a criterion."""
        return candidates(self.drafts, self.exit_layers, self.num_speculations, self.num_layers)

    def thresholds(self, answers: Answers, draft: str) -> list[Threshold]:
        """Return the criterion's threshold at each exit of "layers" or rounded weights."""
        return calibrate_exits(answers.readings(draft), self.precision, MEASURED[self.criterion])

    def _decode(
        self,
        answers: Answers,
        cells: Sequence[Cell],
        rounds: int,
        decoded_cells: int,
        refused: dict[str, str],
        least: float = 0.0,
    ) -> list[dict[str, Any]]:
        """Return the records of the best of these cells; drafts that do not work here are added to `refused`."""
        if self.goes_on:
            refused |= refusals(answers.generators, dict.fromkeys(cell.draft for cell in cells))
        usable = [cell for cell in cells if cell.draft not in refused]
        if self.criterion is not None:
            usable += self._criterion_cells(answers, usable)
        return best_records(answers, usable, rounds, decoded_cells, least) if usable else []

    def _criterion_cells(self, answers: Answers, cells: Sequence[Cell]) -> list[Cell]:
        """Return the cells that exit once more, with drafts that the criterion ends."""
        found = []
        for draft in dict.fromkeys(cell.draft for cell in cells if cell.draft in EXITING and cell.exit_layer):
            thresholds = self.thresholds(answers, draft)
            for cell in (cell for cell in cells if cell.draft == draft and cell.exit_layer):
                chosen = thresholds[cell.exit_layer - 1]
                if 0 < chosen.share < 1:  # with all of them it would end no draft
                    settings = (cell.draft, cell.exit_layer, cell.num_speculations)
                    found.append(CriterionCell(*settings, criterion=self.criterion, threshold=chosen.threshold))
        return found


def trained_draft_pays(records: Records) -> bool:
    """Return whether an exit or the adapter does, and not only what needs no training."""
    return best_cell([each for each in records if each["exit_layer"] or each["draft"] == "adapter"]) is not None


def refusals(generators: Generators, drafts: Iterable[str]) -> dict[str, str]:
    """Return, for drafts in rounded weights that do not work with this model on this machine, why not."""
    refused = {}
    for draft in drafts:
        if draft in DRAFT_WEIGHTS:
            try:
                generators.drafting(Cell(draft, None, 1))
            except ValueError as error:
                refused[draft] = one_line(error)
    return refused


def exits_of_answers(answers: Answers, search: Search) -> list[dict[str, Any]]:
    """Return a record for each exit before the last layer, of what it says along the model's own answers.

    Returns:
        "exit_layer"; "own_tokens_per_round_4", …: what decoding makes of so many drafted tokens; where a criterion is
        asked for also "threshold", "share" and "precision" (`Threshold`).
    """
    readings = answers.readings("layers")
    columns = {f"own_tokens_per_round_{d}": own_tokens_per_round(readings, d) for d in NUM_SPECULATIONS}
    layers = enumerate(zip(*columns.values(), strict=True), start=1)
    rows = [{"exit_layer": n, **dict(zip(columns, row, strict=True))} for n, row in layers]
    if search.criterion is not None:
        rows = [row | each._asdict() for row, each in zip(rows, search.thresholds(answers, "layers"), strict=True)]
    return rows[:-1]


def best_records(
    answers: Answers, cells: Sequence[Cell], rounds: int, decoded_cells: int, least: float = 0.0
) -> list[dict[str, Any]]:
    """Return the records, as a sweep's, of the cells that are worth decoding.

    Args:
        least: speed-up that the cost model must promise a cell: it leaves out what a drafted token takes in Python.
    """
    ranked = forecast(answers, cells)
    promised = {each.cell: each.speedup for each in ranked}
    best = [cell for cell in worth_decoding(ranked, decoded_cells) if promised[cell] >= least]
    measured = (measure_cell(answers.generators, cell, answers.prompts, rounds) for cell in best)
    return list(tqdm(measured, total=len(best), desc="decode", unit="cell"))


def candidates(
    drafts: Sequence[str], exit_layers: Sequence[int] | None, num_speculations: Sequence[int], num_layers: int
) -> list[Cell]:
    """Return the grid of a sweep, but with every exit where it has some: one pass reads them all."""
    cells = []
    for draft in dict.fromkeys(drafts):
        every = exit_layers is None and "layers" in drafts and draft in EXITING
        cells += grid(
            [draft], range(1, num_layers + 1) if every else exit_layers, num_speculations, ["FixedDraft"], num_layers
        )
    return cells


def check_criterion(criterion: str | None, precision: float | None, drafts: Sequence[str]) -> float:
    """Return the precision, PRECISION where none is named; ValueError for a criterion that no draft here can have."""
    if criterion is None:
        if precision is not None:
            raise ValueError(f"precision: {precision} is a criterion's; name one, such as Entropy")
        return PRECISION
    precision = PRECISION if precision is None else precision
    check_choice("criterion", criterion, tuple(MEASURED))
    check_real("precision", precision, "above 0 and at most 1", lambda value: 0 < value <= 1)
    if "layers" not in drafts:
        raise ValueError(f"criterion: {criterion!r} ends drafts of exits; name layers among the drafts")
    return precision
