"""Schedules of the drop rate: over depth, D(l), and over time, S(t) (arXiv 2404.16710, section 4.1).

The paper's formulas are the same for both, with (l, L) or (t, T). For one layer or one step they divide by zero; here
the factor is then 0, as at the first of several.
"""

import math


class Schedule:
    """A factor from 0 to 1. Subclass it for a schedule of your own.

    Attributes:
        needs_total: false if the value does not depend on `count`, so that the number of steps may be unknown.
    """

    needs_total = True

    def __call__(self, index: int, count: int) -> float:
        """Return the factor at `index` (0-based) of `count` blocks or steps."""
        raise NotImplementedError


class Constant(Schedule):
    """1 everywhere: the same rate for every block, or (over time) the full rate from the first step on."""

    needs_total = False

    def __call__(self, index: int, count: int) -> float:
        return 1.0


class Linear(Schedule):
    """index / (count - 1): 0 at the first, 1 at the last."""

    def __call__(self, index: int, count: int) -> float:
        return _progress(self, index, count)


class Exponential(Schedule):
    """exp(index ln2 / (count - 1)) - 1: 0 at the first, 1 at the last, steeper towards the end."""

    def __call__(self, index: int, count: int) -> float:
        return math.expm1(_progress(self, index, count) * math.log(2))


def _progress(schedule: Schedule, index: int, count: int) -> float:
    if count < 1:
        raise ValueError(f"{type(schedule).__name__} schedule: needs at least 1 layer or step, not {count}")
    return index / (count - 1) if count > 1 else 0.0
