"""The checkpoint of a run, from which it resumes exactly."""

from pathlib import Path

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

from lskip.models.checkpoint import random_state
from lskip.training.checkpoint_file import remove_leftovers, use_whole_files
from lskip.training.fsdp2 import FSDP2, NOT_SHARDED
from lskip.training.lightning_utils import leave_signals_to_lskip
from lskip.training.shared_signal import SharedSignal
from lskip.utils.checks import check_whole
from lskip.utils.interrupts import interrupt


class RunCheckpoint(Checkpoint):
    """Saves `last.ckpt` every few steps, at the end, and when Ctrl-C, SIGTERM or SIGUSR1 stops the run.

    Lightning's ModelCheckpoint may save between two micro-batches of an accumulated step, whose gradient is then lost,
    and moves the file from another folder, which is not atomic. Here a checkpoint is always of the end of an optimizer
    step, and replaces the previous one atomically. To keep the best by a metric, add a ModelCheckpoint to
    `trainer.callbacks`.

    The first signal finishes the step (or the batch of a validation), saves and ends; a second one ends immediately.
    Of several processes one needs to get it: they end together, one step or batch later.

    Args:
        folder: where `last.ckpt` goes.
        every_n_train_steps: optimizer steps between two checkpoints.
        sharded: under fsdp2 each device writes what it holds into a folder beside `last.ckpt`, and none gathers the
            whole, which takes 12 bytes a parameter of main memory with AdamW. Otherwise the checkpoint is one file.

    Raises:
        ValueError: a number of steps below 1, or `sharded` without fsdp2.
    """

    def __init__(self, folder: str | Path, every_n_train_steps: int = 200, sharded: bool = False):
        check_whole("every_n_train_steps", every_n_train_steps, 1)
        if not isinstance(sharded, bool):
            raise ValueError(f"sharded: {sharded!r} is not true or false")
        self.sharded = sharded
        self.path = Path(folder) / "last.ckpt"
        self.every_n_train_steps = every_n_train_steps
        self._signal = SharedSignal()
        self._step = 0  # optimizer steps after the last micro-batch
        self._saved = -1  # and at the last save
        self._end_of_step: dict = {}  # state of that moment, which a later checkpoint would not have
        self._saving = False
        self._ends_in_validation = True

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit" or trainer.fast_dev_run:
            return
        leave_signals_to_lskip(trainer)
        use_whole_files(trainer)
        if self.sharded:
            if not isinstance(trainer.strategy, FSDP2):
                raise ValueError(NOT_SHARDED)
            trainer.strategy.saves_shards = True
        if trainer.is_global_zero:
            remove_leftovers(self.path.parent)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._step = trainer.global_step
        self._saved = self._step if str(trainer.ckpt_path) == str(self.path) else -1
        self._note_end_of_step(trainer)
        self._signal.listen_in(trainer)

    def _note_end_of_step(self, trainer: Trainer) -> None:
        self._end_of_step = {"fit_loop": trainer.fit_loop.state_dict(), "random_state": random_state()}

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs, batch, batch_idx) -> None:
        stepped = trainer.global_step != self._step
        self._step = trainer.global_step
        if not stepped:
            return
        self._note_end_of_step(trainer)
        if self._step % self.every_n_train_steps == 0:
            self._save(trainer)
        self._end_if_asked(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Where each validates as many batches, they can agree after each; elsewhere they end after the next step.
        self._ends_in_validation = not trainer.sanity_checking and self._signal.alike(trainer.num_val_batches)

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *batch) -> None:
        if trainer.state.fn == "fit" and self._ends_in_validation:
            self._end_if_asked(trainer)

    def _end_if_asked(self, trainer: Trainer) -> None:
        """Save and raise the interrupt that a signal to any process stands for; every process decides the same."""
        if (signum := self._signal.agreed()) is None:
            return
        if self._saved != self._step:
            self._save(trainer)
        raise interrupt(signum)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._saved != trainer.global_step:
            self._note_end_of_step(trainer)
            self._save(trainer)
        self._signal.ignore()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._signal.ignore()

    def _save(self, trainer: Trainer) -> None:
        if trainer.fast_dev_run:
            return
        self._saving = True
        trainer.save_checkpoint(self.path)
        self._saving = False
        self._saved = trainer.global_step

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict) -> None:
        if self._saving:
            # Within a validation, weights and optimizer are still those of the step's end. Micro-batches counted since
            # then, of an unfinished step, are repeated by the resumed run.
            checkpoint["loops"]["fit_loop"] = self._end_of_step["fit_loop"]
            checkpoint["random_state"] = self._end_of_step["random_state"]
