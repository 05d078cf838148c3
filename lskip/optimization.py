"""The default learning-rate schedule, counted in optimizer steps."""

from __future__ import annotations

import math

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler


class WarmupCosine(LRScheduler):
    """Linear warm-up, then a cosine down to a share of the full rate.

    Args:
        optimizer: whose learning rates to set.
        warmup_steps: optimizer steps until the full rate.
        final: the share of the full rate that is left at the end, 0 to 1.
        total_steps: length of the run in optimizer steps; LayerSkipModule fills it in when not given.

    Raises:
        ValueError: a number out of its range.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        warmup_steps: int = 100,
        final: float = 0.1,
        total_steps: int | None = None,
    ):
        if warmup_steps < 0:
            raise ValueError(f"warmup_steps: {warmup_steps} is not a whole number from 0 up")
        if not 0 <= final <= 1:
            raise ValueError(f"final: {final} is not between 0 and 1")
        self.warmup_steps = warmup_steps
        self.final = final
        self.total_steps = total_steps
        super().__init__(optimizer)

    def factor(self, step: int) -> float:
        """The share of the full rate at optimizer step `step` (0-based)."""
        if step < self.warmup_steps:
            return (step + 1) / (self.warmup_steps + 1)
        if self.total_steps is None:
            return 1.0
        remaining = max(self.total_steps - self.warmup_steps, 1)
        progress = min((step - self.warmup_steps) / remaining, 1.0)
        return self.final + (1 - self.final) * (1 + math.cos(math.pi * progress)) / 2

    def get_lr(self) -> list[float]:
        return [base * self.factor(self.last_epoch) for base in self.base_lrs]

    def state_dict(self) -> dict:
        """All but the length of the run, so that a run resumed with more steps stretches its schedule."""
        return {key: value for key, value in super().state_dict().items() if key != "total_steps"}
