"""One step over several micro-batches as if they were one batch, where they score unequal numbers of tokens."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


class AccumulatedTokens:
    """Makes the loss of an accumulated step a mean over all of its scored tokens.

    Lightning adds the gradients of A micro-batches, each divided by A. A mean of means would count a token of a
    short micro-batch more than one of a long one. What is still to come in the step is not known, so each loss is
    weighted by its tokens against the first one's, and the sum is set right once, before the optimizer. With equal
    micro-batches both factors are exactly 1.
    """

    def __init__(self) -> None:
        self._counts: list[int] = []

    def weight(self, scored: int) -> float:
        """The factor of the loss of the step's next micro-batch, which is a mean over its `scored` tokens."""
        self._counts.append(scored)
        return scored / self._first

    def correct(self, parameters: Iterable[Tensor], accumulate_grad_batches: int) -> None:
        """Scale the step's gradients, in place, and begin a new step.

        Args:
            accumulate_grad_batches: A, what every micro-batch was divided by; an epoch's last step may have fewer.
        """
        factor = accumulate_grad_batches * self._first / max(sum(self._counts), 1)
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        if factor != 1 and gradients:
            torch._foreach_mul_(gradients, factor)
        self._counts.clear()

    @property
    def _first(self) -> int:
        return max(self._counts[0], 1)
