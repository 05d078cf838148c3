"""Schedules of the drop rate: over depth, D(l), and over time, S(t) (arXiv 2404.16710, section 4.1).

The paper's formulas are the same for both, with (l, L) or (t, T). For one layer or one step they divide by zero; here
the factor is then 0, as at the first of several.

Falling and Alternating are not LayerSkip's. They are after its first author's later paper ("Don't Drop Dropout",
ICML 2026, arXiv 2609.05275) as far as its abstract and modded-nanogpt's pull request 348 tell of it; the paper's text
was not at hand.
"""

import math

from lskip.utils.checks import check_real


class Schedule:
    """A factor from 0 to 1. Subclass it for a schedule of your own.

    Attributes:
        needs_total: false if the value does not depend on `count`, so that the number of steps may be unknown.
        over: what it may be a schedule of, "depth", "time" or both.
    """

    needs_total = True
    over: tuple[str, ...] = ("depth", "time")

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


class Falling(Schedule):
    """1 for a share of the run, then linearly down to 0, where it stays: the last stretch runs at full depth.

    A schedule for the steps. The defaults are the proportions of modded-nanogpt's pull request 348, which drops at its
    full rate (p_max 0.2) for 400 steps and falls for 100; 1308 - 500 are left, the 8 among them that it added for the
    model to recover. That the shares stay the same in runs of other lengths is ours.

    Args:
        plateau: share of the run at 1, from 0 to 1.
        decay: share of the run in which it falls, from 0 to 1; both together at most 1.

    Raises:
        ValueError: a share out of its range.
    """

    over = ("time",)

    def __init__(self, plateau: float = 0.31, decay: float = 0.08):
        for name, share in (("plateau", plateau), ("decay", decay)):
            check_real(name, share, "from 0 to 1", lambda value: 0 <= value <= 1)
        if plateau + decay > 1:
            raise ValueError(f"plateau: {plateau} and decay: {decay} are together more than the whole run, 1")
        self.plateau, self.decay = plateau, decay

    def __call__(self, index: int, count: int) -> float:
        done = _progress(self, index, count)
        if done < self.plateau:
            return 1.0
        return max((self.plateau + self.decay - done) / self.decay, 0.0) if self.decay > 0 else 0.0


class Alternating(Schedule):
    """1 at every second block from the second on, 0 at all others and at the last: no two neighbours are skipped.

    A schedule for the depth. Pull request 348 skips blocks 1, 3, 5, 7 and 9, counted from 0, of modded-nanogpt's 11; it
    draws at most one of them a step, here each is drawn by itself.
    """

    over = ("depth",)

    def __call__(self, index: int, count: int) -> float:
        return float(index % 2 == 1 and index < count - 1)


def _progress(schedule: Schedule, index: int, count: int) -> float:
    if count < 1:
        raise ValueError(f"{type(schedule).__name__} schedule: needs at least 1 layer or step, not {count}")
    return index / (count - 1) if count > 1 else 0.0
