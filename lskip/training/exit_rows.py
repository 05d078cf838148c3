"""The rows of one exit that a training step decodes: all scored positions, or a sampled share of them."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lskip.utils.devices import to_device


class ExitRows(NamedTuple):
    """The n decoded rows of one exit.

    Attributes:
        states: [n, D], after the final norm.
        labels: [n], the tokens that follow.
        weights: [n], of each row's loss.
        picked: [n], indices among the scored positions; None: all.
        classifier_loss: of the exit classifier at this exit; None where there is none.
    """

    states: Tensor
    labels: Tensor
    weights: Tensor
    picked: Tensor | None
    classifier_loss: Tensor | None


def sampled_positions(
    seed: int, micro_batch: int, block: int, count: int, share: float, device: torch.device
) -> Tensor | None:
    """Return the indices [n] of the scored positions that an exit decodes; None for all.

    Drawn anew for each exit and micro-batch, a pure function of the arguments.
    """
    if share == 1 or count == 0:
        return None
    random = np.random.default_rng([seed, micro_batch, block, 1])
    picked = random.permutation(count)[: max(1, round(share * count))]
    return to_device(torch.tensor(picked), device)
