"""Advice on what to set for a task, from the cells that were measured."""

import math
from collections.abc import Sequence
from typing import Any

from lskip.evaluation.sweep.grid import Cell, CriterionCell, cell_of

MIN_SPEEDUP = 1.02  # from which drafting is advised: other load on the machine can make a timing differ by less
MIN_TURNS = 0.75  # share of the turns in which it must have been faster, for the same reason


def best_cell(records: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """Return the record of the fastest cell; None where none pays. A cell that accepted no draft is never chosen."""
    paying = [record for record in records if record["acceptance_rate"] and pays(record["times"])]
    return max(paying, key=lambda record: record["times"]["speedup"], default=None)


def pays(times: dict[str, Any]) -> bool:
    """Return whether drafting is surely faster. Times of a clock that stood still (NaN or infinity) are no proof."""
    faster = sum(speedup > 1 for speedup in times["speedups"])
    return MIN_SPEEDUP <= times["speedup"] < math.inf and faster >= MIN_TURNS * len(times["speedups"])


def advice(task: str, records: Sequence[dict[str, Any]]) -> str:
    """Return one sentence: the settings to use for this task, or not to draft."""
    best = best_cell(records)
    if best is None:
        measured = [speedup for record in records if math.isfinite(speedup := record["times"]["speedup"])]
        most = f"at most {max(measured):.2f}x" if measured else "no time could be measured"
        return f"do not draft for {task}: of {len(records)} settings none is surely faster ({most})"
    speedup, rate = best["times"]["speedup"], best["acceptance_rate"]
    return (
        f"use {', '.join(flags(cell_of(best)))} for {task}: {speedup:.2f}x autoregressive, acceptance_rate {rate:.2f},"
        f" tokens_per_round {best['tokens_per_round']:.2f}"
    )


def flags(cell: Cell) -> list[str]:
    """Return a cell as options of generate and predict."""
    given = {"exit_layer": cell.exit_layer, "num_speculations": cell.num_speculations}
    given |= {"draft": cell.settings()["draft"], "draft_weights": cell.draft_weights}
    if cell.policy != "FixedDraft":
        given["draft_policy"] = cell.policy
    if isinstance(cell, CriterionCell):
        given["draft_policy.criterion"] = cell.criterion
        given["draft_policy.criterion.threshold"] = f"{cell.threshold:.4g}"
    return [f"{name}={value}" for name, value in given.items() if value is not None]
