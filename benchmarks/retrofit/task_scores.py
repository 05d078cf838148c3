"""Measures of the task benchmark: agreement of exits along a model's answers, and two models on the same items."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from lskip.data.collation import collate
from lskip.data.rows import padded
from lskip.models.decoder import Decoder
from lskip.models.readout import LayerReportMetric, read_exits

RESAMPLES = 10_000


@torch.inference_mode()
def draft_agreement(decoder: Decoder, prompts: list[list[int]], texts: list[list[int]], batch_size: int) -> list[float]:
    """For each layer, first to last: how often its argmax is the model's own next token along the model's own texts."""
    metric, pairs = LayerReportMetric(decoder.num_layers), list(zip(prompts, texts, strict=True))
    for start in range(0, len(pairs), batch_size):
        batch = pairs[start : start + batch_size]
        size = max(len(prompt) + len(text) for prompt, text in batch)
        rows = [padded(p + t, [False] * len(p) + [True] * len(t), size, 0) for p, t in batch]
        tensors = collate([{"input_ids": ids, "labels": labels} for ids, labels in rows])
        layers = range(1, decoder.num_layers + 1)
        metric.update(read_exits(decoder, tensors["input_ids"], tensors["labels"], layers))
    return metric.compute().agreement


def compare(ours: list[bool], plain: list[bool], groups: list[str]) -> dict:
    """Exact match of ours less the plain one's, on the same items.

    Returns:
        "difference"; "interval": 95 %, by drawing whole groups anew, since the items of one group are right and wrong
        together; "only_layerskip", "only_plain": items that one alone has right; "mcnemar_p": exact, two-sided, as if
        the items were independent.
    """
    gain = np.array(ours, int) - np.array(plain, int)
    first, second = int((gain > 0).sum()), int((gain < 0).sum())
    tail = sum(math.comb(first + second, count) for count in range(min(first, second) + 1))
    return {
        "difference": float(gain.mean()),
        "interval": interval(gain[None], groups),
        "only_layerskip": first,
        "only_plain": second,
        "mcnemar_p": min(1.0, 2 * tail / 2 ** (first + second)),
    }


def interval(gains: np.ndarray, groups: Sequence) -> list[float]:
    """The 95 % interval of the mean gain [S, N], by drawing S seeds and the groups [N] of the items anew."""
    _, group = np.unique(groups, return_inverse=True)
    totals, sizes, random = [np.bincount(group, each) for each in gains], np.bincount(group), np.random.default_rng(0)
    drawn = random.integers(len(sizes), size=(RESAMPLES, len(sizes)))
    seeds = random.integers(len(totals), size=(RESAMPLES, len(totals)))
    sums = np.stack([total[drawn].sum(1) for total in totals], 1)
    means = np.take_along_axis(sums, seeds, 1).mean(1) / sizes[drawn].sum(1)
    return np.percentile(means, (2.5, 97.5)).tolist()
