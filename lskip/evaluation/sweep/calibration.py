"""Thresholds of an exit criterion at which drafted tokens are right as often as wanted."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lskip.evaluation.sweep.own_answers import ExitReading, first_of_answers
from lskip.inference.exit_criteria import MeasuredExit


class Threshold(NamedTuple):
    """A threshold of an exit's criterion, and what it made of the tokens that it was chosen on.

    Attributes:
        threshold: as the criterion takes it.
        share: of all tokens, those that are sure enough.
        precision: share of these that are right; 1 where none is sure enough.
    """

    threshold: float
    share: float
    precision: float


def calibrate(measured: Tensor, right: Tensor, precision: float, low_is_sure: bool) -> Threshold:
    """Return the threshold that lets most tokens pass, of which at least `precision` are right.

    As DSSD calibrates exits (arXiv 2407.21082): tokens are ordered by the criterion, the surest first, and the
    threshold is the quantile up to which enough of them are right.

    Args:
        measured, right: [N], the criterion's values, and whether the drafted token is the model's own.
    """
    order = measured.argsort(descending=not low_is_sure)
    values, right = measured[order].double(), right[order].double()
    precise = right.cumsum(0) / torch.arange(1, len(values) + 1) >= precision
    apart = torch.cat([values.diff() != 0, torch.ones(min(len(values), 1), dtype=torch.bool)])  # equals go together
    count = int((precise & apart).nonzero().max()) + 1 if (precise & apart).any() else 0
    none, every = (0.0, 1.0) if low_is_sure else (1.0, 0.0)
    if count in (0, len(values)):
        threshold = every if count else none
    else:
        threshold = (values[count - 1] + values[count]).item() / 2
    return Threshold(threshold, count / max(len(values), 1), right[:count].mean().item() if count else 1.0)


def calibrate_exits(
    readings: Sequence[ExitReading], precision: float, criterion: type[MeasuredExit]
) -> list[Threshold]:
    """Return the threshold of each layer on the drafted tokens of answers: all but the first of each."""
    drafted = ~first_of_answers(readings)
    hits, measured = (torch.cat(parts, 1)[:, drafted] for parts in zip(*readings, strict=True))
    return [calibrate(*layer, precision, criterion.low_is_sure) for layer in zip(measured, hits, strict=True)]
