"""What the steps of a run compute on average, and the most of it: layer dropout and curriculum over all steps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import inf, sqrt
from random import Random
from types import SimpleNamespace

from lightning.pytorch import Callback

from lskip.flops import Work
from lskip.module import LayerSkipModule
from lskip.planning.simulation import Batch

MOST_STEPS = 4096  # that are looked at: all of a shorter run, else one drawn from each of so many equal stretches
SPREADS = 3  # standard deviations of the kept rows that the largest step has more of them than the mean


@dataclass(frozen=True)
class RunAverage:
    """Means and extremes over the steps of a run.

    Attributes:
        work: of a micro-batch, the mean.
        exits_on: how often each exit is on, as a share of the steps.
        drop_rates: of each block, the mean.
        largest_exit_weights: of the step with the most exits.
        kept_share: of the rows of all blocks that a step runs at most.
    """

    work: Work
    exits_on: list[float]
    drop_rates: list[float]
    largest_exit_weights: list[float]
    kept_share: float


def average_run(
    module: LayerSkipModule, callbacks: Sequence[Callback], batch: Batch, total_steps: int | None
) -> RunAverage:
    """Return the averages of a run of `total_steps`; None: unknown, the first MOST_STEPS are looked at.

    Args:
        callbacks: that write the module's vectors.

    Raises:
        ValueError: a callback needs a known number of steps.
    """
    layers = module.decoder.num_layers
    work, on, rates = Work(), [0.0] * layers, [0.0] * layers
    most, largest, kept_share = -1, [], 0.0
    steps = list(steps_of(total_steps))
    for _ in vectors_of(module, callbacks, steps, total_steps):
        weights, drops = module.exit_weights.values, module.drop_rates.values
        exits = exits_of(module)
        add_work(work, module, exits, batch, 1 / len(steps))
        on = [total + (block in exits) / len(steps) for block, total in enumerate(on)]
        rates = [total + rate / len(steps) for total, rate in zip(rates, drops, strict=True)]
        if len(exits) > most:
            most, largest = len(exits), list(weights)
        kept_share = max(kept_share, _kept_share(drops, batch.rows))
    return RunAverage(work, on, rates, largest, kept_share)


def steps_of(total_steps: int | None) -> Iterator[int]:
    """Yield the steps that are looked at; in a long run drawn, so that no curriculum's period is met or missed."""
    if total_steps is None or total_steps <= MOST_STEPS:
        yield from range(total_steps or MOST_STEPS)
        return
    draw = Random(0)
    bounds = [total_steps * part // MOST_STEPS for part in range(MOST_STEPS + 1)]
    yield from (draw.randrange(first, last) for first, last in pairwise(bounds))


def vectors_of(
    module: LayerSkipModule, callbacks: Sequence[Callback], steps: Sequence[int], total_steps: int | None
) -> Iterator[int]:
    """Yield each step after the callbacks have written the module's vectors for it."""
    trainer = SimpleNamespace(world_size=1, estimated_stepping_batches=inf if total_steps is None else total_steps)
    module.trainer = trainer
    for callback in callbacks:
        callback.on_fit_start(trainer, module)
        callback.on_train_start(trainer, module)
    for trainer.global_step in steps:
        for callback in callbacks:
            callback.on_train_batch_start(trainer, module, {}, 0)
        yield trainer.global_step


def exits_of(module: LayerSkipModule) -> list[int]:
    """Return the blocks whose exits a step decodes, by the module's present exit weights."""
    exits = {block for block, weight in enumerate(module.exit_weights.values) if weight > 0}
    last = {module.decoder.num_layers - 1} if module.supervision.needs_last_layer else set()
    return sorted(exits | last)


def add_work(work: Work, module: LayerSkipModule, exits: list[int], batch: Batch, times: float) -> None:
    """Add to `work` what a micro-batch is expected to compute at the module's present vectors, so many times."""
    work.embed(times * batch.rows, batch.length)
    for block in range(max(exits) + 1):
        work.run(block, times * batch.rows * (1 - module.drop_rates.values[block]), batch.length)
    scored, last = batch.rows * (batch.length - 1), module.decoder.num_layers - 1
    for block in exits:
        rows = scored if block == last else max(1, round(module.position_share * scored))
        work.decode(times * rows, last=block == last)


def _kept_share(rates: Sequence[float], rows: int) -> float:
    """Return the share of the rows of all blocks that a step at these drop rates runs, hardly ever more."""
    mean, variance = sum(1 - rate for rate in rates), sum(rate * (1 - rate) for rate in rates)
    return min(1.0, (rows * mean + SPREADS * sqrt(rows * variance)) / (rows * len(rates)))
