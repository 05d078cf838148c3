"""Tokens per second by batch size, beside the cost model's prediction: the second part of the decoding benchmark."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import replace
from itertools import cycle, islice

from benchmarks.decoding.measuring import PROMPT, Groups, Measured, median, ratios
from benchmarks.decoding.report import best_of_each, setting_of
from benchmarks.decoding.settings import Setting

Rates = dict[Setting, dict[int, tuple[float, float]]]  # setting -> batch -> measured and predicted tokens per second


def batch_settings(records: list[dict], batch_sizes: Iterable[int]) -> list[Setting]:
    """Autoregressive decoding, its control, and of each policy the setting that was fastest alone, in every batch."""
    own = [record for record in records if record["method"] in ("autoregressive", "control", "self_speculative")]
    alone = [setting_of(record) for record in best_of_each(own, ("method", "policy"), "over_autoregressive")]
    return [replace(setting, batch=size) for size in batch_sizes for setting in alone]


def batch_groups(prompts: list[list[int]], batch_sizes: Iterable[int], repeats: int) -> Groups:
    """The prompts, repeated until they fill the largest batch, so that no slot stands empty, `repeats` times."""
    largest = max(batch_sizes)
    count = -(-len(prompts) // largest) * largest
    return [list(islice(cycle(prompts), count))] * repeats


def batch_rates(measured: Measured) -> Rates:
    """Tokens per second after the prompts: the first token of each text belongs to its prompt's pass."""
    rates: Rates = {}
    for setting, runs in measured.runs.items():
        if setting.method == PROMPT:
            continue
        tokens = [run.tokens - len(run.texts) for run in runs]
        seconds = measured.after_prompt(setting)
        rates.setdefault(replace(setting, batch=1), {})[setting.batch] = (
            statistics.median(count / taken for count, taken in zip(tokens, seconds, strict=True)),
            statistics.median(count / run.planned() for count, run in zip(tokens, runs, strict=True)),
        )
    return rates


def batch_gains(measured: Measured, rates: Rates) -> Iterable[str]:
    """A sentence for each batch: what autoregressive decoding gains by it, and what the cost model says."""
    alone = measured.base("autoregressive", 1)
    for setting, points in rates.items():
        if setting.method == "autoregressive" and alone is not None:
            for size in sorted(points.keys() - {1}):
                gain = median(ratios(alone, measured.base("autoregressive", size)))
                after, says = (points[size][column] / points[1][column] for column in (0, 1))
                yield (
                    f"batch {size}: autoregressive {gain:.2f}x batch 1, prompts included;"
                    f" {after:.2f}x without (cost model {says:.2f}x)"
                )
