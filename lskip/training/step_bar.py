"""The progress bar of training, in optimizer steps, and of validation, in batches."""

import math
import sys
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from tqdm import tqdm

SECONDS = 0.5  # between two updates of the metrics beside the bar, each of which waits for the device
SECONDS_IN_A_LOG = 30.0  # where each update is a line of its own


class StepBar(ProgressBar):
    """Progress bar over the optimizer steps of the run; a resumed run begins at its step."""

    def __init__(self) -> None:
        super().__init__()
        self._enabled = True
        self._training: tqdm | None = None
        self._validation: tqdm | None = None
        self._looked = 0.0

    def disable(self) -> None:
        """Hide the bar; Lightning calls this in all processes but the first."""
        self._enabled = False

    def enable(self) -> None:
        """Show the bar."""
        self._enabled = True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        total = trainer.estimated_stepping_batches
        known = 0 < total < math.inf
        self._training = self._bar("train", total if known else None, trainer.global_step)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs, batch, batch_idx) -> None:
        bar = self._training
        if bar is None or trainer.global_step == bar.n:
            return
        # Before update(), which draws the metrics.
        if (now := bar._time()) - self._looked >= bar.mininterval:
            self._looked = now
            bar.set_postfix(self._shown(trainer, pl_module), refresh=False)
        bar.update(trainer.global_step - bar.n)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        total = sum(trainer.num_val_batches)
        self._validation = self._bar("validate", total if total < math.inf else None, 0, leave=False)

    def on_validation_batch_end(self, *arguments, **more) -> None:
        if self._validation is not None:
            self._validation.update()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._close_validation()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._training is not None:
            self._training.set_postfix(self._shown(trainer, pl_module))
        self._close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._close()

    def _bar(self, name: str, total: int | None, done: int, leave: bool = True) -> tqdm:
        seconds = SECONDS if sys.stderr.isatty() else SECONDS_IN_A_LOG
        settings = {"leave": leave, "mininterval": seconds, "dynamic_ncols": True, "disable": not self._enabled}
        return tqdm(desc=name, total=total, initial=done, unit="step" if leave else "batch", **settings)

    def _shown(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, str]:
        values = self.get_metrics(trainer, pl_module)
        return {name: f"{value:.4g}" for name, value in values.items() if isinstance(value, int | float)}

    def _close_validation(self) -> None:
        if self._validation is not None:
            self._validation.close()
            self._validation = None

    def _close(self) -> None:
        self._close_validation()
        if self._training is not None:
            self._training.close()
            self._training = None


def wants_bar(settings: dict[str, Any]) -> bool:
    """Return whether a Trainer of these arguments shows this bar, and not another or none."""
    given = settings["callbacks"] if isinstance(settings["callbacks"], list) else [settings["callbacks"]]
    own = any(isinstance(callback, ProgressBar) for callback in given)
    return settings["enable_progress_bar"] is not False and not settings["barebones"] and not own
