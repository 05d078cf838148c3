"""Detection of steps whose loss or gradient is NaN or infinite: training stops, or skips them."""

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from lskip.utils.checks import check_choice
from lskip.utils.finite import all_finite

MOST_IN_A_ROW = 20  # skipped steps after which training stops
ADVICE = "try a smaller learning rate, clipping (trainer.gradient_clip_val), or not_finite: skip"


class FiniteSteps(Callback):
    """Ensures that losses, gradients and saved weights are finite.

    The place of the first loss or gradient that is not finite is kept on the device, and read when the log is written,
    before validation and before each checkpoint, so that no step waits for it. Training then ends with the step and
    batch in the message; the previous checkpoint stays. A module returns this callback from `configure_callbacks`,
    calls `admits` before its optimizer steps, and `check_saved` when a checkpoint is made.

    Args:
        not_finite: "stop", or "skip": a step that is not finite changes no weight, but counts as a step; the log shows
            how many (`train/skipped_steps`). Each step then waits for its gradient. In 16-mixed the loss scale is
            found by gradients that overflow: those steps are skipped in either case, and are no error.

    Attributes:
        skipped: number of skipped steps.
    """

    def __init__(self, not_finite: str = "stop"):
        check_choice("not_finite", not_finite, ("stop", "skip"))
        self.not_finite = not_finite
        self.skipped = 0
        self._in_a_row = 0
        self._first: Tensor | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.skipped = self._in_a_row = 0
        # Step and micro-batch (1-based) of the first value that was not finite; 0: all were.
        self._first = torch.zeros(2, dtype=torch.long, device=pl_module.device)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        self._look_at(trainer, loss.detach())

    def _look_at(self, trainer: Trainer, value: Tensor) -> None:
        fresh = (self._first[0] == 0) & ~value.isfinite()
        self._first[0].masked_fill_(fresh, trainer.global_step + 1)
        self._first[1].masked_fill_(fresh, trainer.fit_loop.epoch_loop.batch_progress.total.processed + 1)

    def admits(self, trainer: Trainer, pl_module: LightningModule, gradient_norm: Tensor) -> bool:
        """Return whether the optimizer may step; if not, the gradients have been removed."""
        if getattr(trainer.precision_plugin, "scaler", None) is None:
            self._look_at(trainer, gradient_norm.detach())
        if self.not_finite == "stop" or not self._found(trainer):
            self._in_a_row = 0
            return True
        self.skipped += 1
        self._in_a_row += 1
        if self._in_a_row == MOST_IN_A_ROW:
            raise ValueError(f"{self._where()}, as in the {MOST_IN_A_ROW - 1} steps before it: {ADVICE}")
        self._first.zero_()
        for parameter in pl_module.parameters():
            parameter.grad = None  # so that the optimizer skips it, with its weight decay and momentum
        return False

    def _found(self, trainer: Trainer) -> bool:
        """Return whether any process had a value that was not finite; a collective call."""
        return trainer.strategy.reduce_boolean_decision(bool(self._first[0] > 0), all=False)

    def _where(self) -> str:
        step, batch = self._first.tolist()
        place = f"step {step} (batch {batch} of the run)" if step else "a step of another process"
        return f"not_finite: in {place} the loss or its gradient is NaN or infinite"

    def check(self, trainer: Trainer) -> None:
        """Raise ValueError where a step so far was not finite, and was not skipped."""
        if self.not_finite == "stop" and self._first is not None and self._found(trainer):
            raise ValueError(f"{self._where()}; what was saved before it stays: {ADVICE}")

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs, batch, batch_idx) -> None:
        every = trainer.log_every_n_steps
        if every and trainer.global_step % every == 0:
            self.check(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self.check(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.check(trainer)

    def check_saved(self, trainer: Trainer, checkpoint: dict) -> None:
        """Raise ValueError, before anything is written, where weights or optimizer state are not finite."""
        self.check(trainer)
        parts = {"weights": checkpoint["state_dict"], "optimizer's state": checkpoint.get("optimizer_states")}
        for name, part in parts.items():
            if trainer.strategy.reduce_boolean_decision(not all_finite(part), all=False):
                where = f"after step {trainer.global_step} the {name} is NaN or infinite"
                raise ValueError(f"not_finite: {where}; what was saved before it stays: {ADVICE}")
