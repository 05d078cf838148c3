"""The verdict on a claim: paired differences over seeds, and the rule that turns them into words."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass

# Student's t, two-sided 95 %, for 1, 2, … degrees of freedom.
T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
RULE = (
    "A claim is *reproduced* where the 95 % interval of the mean difference over seeds (paired by seed, Student's t)"
    " lies wholly on the claimed side of zero, *not reproduced* where it lies wholly on the other side, and"
    " *within noise* where it holds zero."
)


@dataclass(frozen=True)
class Claim:
    """A sentence and what was measured for it.

    Attributes:
        differences: one a seed, positive where it is as the sentence says.
    """

    says: str
    differences: tuple[float, ...]
    unit: str = "nats"

    def verdict(self) -> str:
        if len(self.differences) < 2:
            return "one seed: no verdict"
        margin = margin_95(self.differences)
        mean = statistics.mean(self.differences)
        if abs(mean) <= margin:
            return "within noise"
        return "reproduced" if mean > 0 else "not reproduced"

    def line(self) -> str:
        return f"- {self.says}: **{self.verdict()}** ({with_error(self.differences, 4, '+')} {self.unit})."


def standard_error(values) -> float:
    """Of the mean of independent values; nan for a single one."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def margin_95(values) -> float:
    """Half of the 95 % interval of the mean of independent values, by Student's t; nan for a single one."""
    return T_95[len(values) - 2] * standard_error(values) if len(values) > 1 else math.nan


def with_interval(values, digits: int = 3) -> str:
    """Mean and its 95 % interval; the mean alone of a single value."""
    mean, margin = statistics.mean(values), margin_95(values)
    if math.isnan(margin):
        return f"{mean:+.{digits}f}"
    return f"{mean:+.{digits}f} [{mean - margin:+.{digits}f}, {mean + margin:+.{digits}f}]"


def with_error(values, digits: int = 3, sign: str = "") -> str:
    """Mean ± standard error; a dash where a seed has no value."""
    if any(math.isnan(value) for value in values):
        return "-"
    mean = f"{statistics.mean(values):{sign}.{digits}f}"
    return mean if len(values) < 2 else f"{mean} ± {standard_error(values):.{digits}f}"


def paired(first: list[float], second: list[float]) -> tuple[float, ...]:
    """first - second, seed by seed."""
    return tuple(a - b for a, b in zip(first, second, strict=True))
