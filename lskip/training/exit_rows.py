"""The rows of one exit that a training step decodes: at all scored positions, or at a sampled share of them."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lskip.utils.devices import to_device


class ExitRows(NamedTuple):
    """One exit's n rows.

    Attributes:
        states: [n, D], after the final norm.
        labels: [n], the tokens that follow.
        weights: [n], of each row's loss.
        picked: [n], which of the scored positions they are; None: all.
        judged: the loss of the judge of this exit; None where nothing judges it.
    """

    states: Tensor
    labels: Tensor
    weights: Tensor
    picked: Tensor | None
    judged: Tensor | None


def sampled_positions(
    seed: int, micro_batch: int, block: int, count: int, share: float, device: torch.device
) -> Tensor | None:
    """Which of `count` scored positions the exit after `block` decodes, drawn anew each time; None for all."""
    if share == 1 or count == 0:
        return None
    random = np.random.default_rng([seed, micro_batch, block, 1])
    picked = random.permutation(count)[: max(1, round(share * count))]
    return to_device(torch.from_numpy(picked), device)
