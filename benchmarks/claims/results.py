"""Results of the finished runs of the claims benchmark, seed by seed."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path

from benchmarks.claims.arms import BOTH, Sizes

LONG, STEP_TIMES = "long", "step_times.json"


def run_folder(out: Path, name: str, seed: int) -> Path:
    return out / "runs" / name / f"seed_{seed}"


class Results:
    """Reader of the folder of a benchmark; lists have one entry per seed.

    Args:
        seeds: those to read, all of them finished; None: sizes.seeds.
    """

    def __init__(self, out: Path, sizes: Sizes, seeds: Sequence[int] | None = None):
        self.out, self.sizes = out, sizes
        self.seeds = range(sizes.seeds) if seeds is None else seeds
        self._read = cache(lambda path: json.loads(path.read_text()))

    def _each_seed(self, name: str, file: str = "result.json") -> list[dict]:
        return [self._read(run_folder(self.out, name, seed) / file) for seed in self.seeds]

    def finished(self, names: Iterable[str], seeds: int) -> Results:
        """Return a reader of those of the first `seeds` seeds that are finished in all these arms."""
        done = [
            seed
            for seed in range(seeds)
            if all((run_folder(self.out, name, seed) / "result.json").is_file() for name in names)
        ]
        return Results(self.out, self.sizes, done)

    def curves(self, name: str) -> list[list[float]]:
        """The loss of every layer at the end of an arm."""
        return [result["readings"][-1]["loss"] for result in self._each_seed(name)]

    def loss(self, name: str, layer: int) -> list[float]:
        return [curve[layer - 1] for curve in self.curves(name)]

    def last_loss(self, name: str) -> list[float]:
        return self.loss(name, self.sizes.layers)

    def agreement(self, name: str) -> list[float]:
        """Agreement of the middle layer with the last."""
        return [result["readings"][-1]["agreement"][self.sizes.middle - 1] for result in self._each_seed(name)]

    def tokens_per_round(self, name: str, layer: int, num_speculations: int) -> list[float]:
        """Expected tokens per round along held-out text, drafted by a layer."""
        readings = (result["readings"][-1]["tokens_per_round"] for result in self._each_seed(name))
        return [reading[str(num_speculations)][layer - 1] for reading in readings]

    def gap(self, name: str) -> list[float]:
        """Loss of the middle layer less that of the last."""
        return [curve[self.sizes.middle - 1] - curve[-1] for curve in self.curves(name)]

    def long_readings(self) -> list[dict]:
        return self._read(run_folder(self.out, LONG, 0) / "result.json")["readings"]

    def step_times(self) -> dict[str, float]:
        """Curriculum -> time of a step against LastExit's."""
        return self._read(self.out / STEP_TIMES)

    def task(self, name: str) -> list[list[float]]:
        """The score of every layer."""
        return [result[name] for result in self._each_seed(BOTH, "tasks.json")]

    def retention(self, name: str) -> list[list[float]]:
        """(score - chance) / (the last layer's score - chance); nan where the last layer is at chance itself."""
        kept = []
        for result in self._each_seed(BOTH, "tasks.json"):
            scores, chance = result[name], result[f"{name}_chance"]
            chances = chance if isinstance(chance, list) else [chance] * len(scores)
            whole = scores[-1] - chances[-1]
            above = [score - by_chance for score, by_chance in zip(scores, chances, strict=True)]
            kept.append([value / whole if whole > 0 else math.nan for value in above])
        return kept
