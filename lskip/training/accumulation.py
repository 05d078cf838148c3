"""Gradient accumulation over micro-batches with unequal numbers of scored tokens."""

from collections.abc import Iterable

import torch
from torch import Tensor


class AccumulatedTokens:
    """Counts that make the loss of an accumulated step the mean over all of its scored tokens.

    Lightning adds the gradients of A micro-batches, each divided by A, and a mean of means would weight tokens of short
    micro-batches more. The counts of later micro-batches are unknown, so each loss is weighted by its tokens relative
    to the first micro-batch, and the gradients are scaled once before the optimizer's step. With equal micro-batches
    both factors are exactly 1.
    """

    def __init__(self) -> None:
        self._counts: list[int] = []

    def weight(self, scored: int) -> float:
        """Return the factor of the next micro-batch's loss, which is a mean over its `scored` tokens."""
        self._counts.append(scored)
        return scored / self._first

    def correct(self, parameters: Iterable[Tensor], accumulate_grad_batches: int) -> None:
        """Scale the step's gradients, in place, and begin a new step.

        Args:
            accumulate_grad_batches: A, by which every loss was divided; an epoch's last step may have fewer.
        """
        factor = accumulate_grad_batches * self._first / max(sum(self._counts), 1)
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        if factor != 1 and gradients:
            torch._foreach_mul_(gradients, factor)
        self._counts.clear()

    @property
    def _first(self) -> int:
        return max(self._counts[0], 1)
