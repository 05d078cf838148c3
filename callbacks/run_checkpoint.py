"""The checkpoint from which a run goes on as if nothing had happened."""

import os
import signal
import threading
from pathlib import Path

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint


class RunCheckpoint(Checkpoint):
    """Keeps `last.ckpt` in a folder: every some steps, at the end, and when Ctrl-C stops the run.

    Lightning's ModelCheckpoint may save between two micro-batches of one accumulated step, whose gradient is
    then lost, and moves the file from another folder, which a kill can cut in two. Here a checkpoint is only
    made right after an optimizer step, and replaces the one before at once. To keep the best by some metric,
    add a ModelCheckpoint to `trainer.callbacks`.

    The first Ctrl-C finishes the step, saves and ends; a second one ends at once.

    Args:
        folder: where `last.ckpt` goes.
        every_n_train_steps: optimizer steps between two checkpoints.

    Raises:
        ValueError: a number of steps below 1.
    """

    def __init__(self, folder: str | Path, every_n_train_steps: int = 200):
        if every_n_train_steps < 1:
            raise ValueError(f"every_n_train_steps: {every_n_train_steps} is not a whole number from 1 up")
        self.path = Path(folder) / "last.ckpt"
        self.every_n_train_steps = every_n_train_steps
        self._step = 0  # optimizer steps at the end of the last micro-batch
        self._saved = -1  # and when it was last saved
        self._interrupted = False
        self._previous_handler = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._step = trainer.global_step
        self._interrupted = False
        if threading.current_thread() is threading.main_thread():
            self._previous_handler = signal.signal(signal.SIGINT, self._interrupt(trainer))

    def _interrupt(self, trainer: Trainer):
        def handler(signum, frame):
            if self._interrupted or not trainer.training:
                raise KeyboardInterrupt
            self._interrupted = True
            print("\nCtrl-C: finishing this step and saving; once more to stop at once", flush=True)

        return handler

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs, batch, batch_idx) -> None:
        stepped = trainer.global_step != self._step
        self._step = trainer.global_step
        if not stepped:
            return
        # Every process must come to the same decision: saving takes all of them.
        interrupted = trainer.strategy.reduce_boolean_decision(self._interrupted, all=False)
        if interrupted or self._step % self.every_n_train_steps == 0:
            self._save(trainer)
        if interrupted:
            raise KeyboardInterrupt

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._saved != trainer.global_step:
            self._save(trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self._previous_handler is not None:
            signal.signal(signal.SIGINT, self._previous_handler)
            self._previous_handler = None

    def _save(self, trainer: Trainer) -> None:
        if trainer.fast_dev_run:
            return
        partial = self.path.with_suffix(".partial")
        trainer.save_checkpoint(partial)
        if trainer.is_global_zero:
            os.replace(partial, self.path)
        trainer.strategy.barrier()
        self._saved = trainer.global_step
