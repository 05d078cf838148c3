"""Logging of training steps besides the loss: learning rate, gradient norm, vectors, speed."""

import time

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from lskip.flops import Work, known_peak
from lskip.models.scored import NOT_SCORED


class TrainingLog(Callback):
    """Logs, every `log_every_n_steps`, about the steps since the last time.

    `train/lr` (of the first parameter group) and `train/gradient_norm` (before clipping) are of the last step;
    `train/drop_rate/layer_08` and `train/exit_weight/layer_08` are means over the steps, since a curriculum changes at
    each. `train/tokens_per_second` counts tokens of all devices up to the last scored one of each row, in the time
    outside of validation. `train/mfu` is what the blocks that ran and the exits that were on computed, padding
    included, as a share of the device's peak, where that is known (`peak_flops`). `train/waiting_for_data` is the
    share of the same time in which a step waited for its batch, where the loader of TextData counts that. With
    `not_finite: skip` the steps skipped so far are `train/skipped_steps`.
    """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._lr = None
        self._logged_step = trainer.global_step
        self._flops = pl_module.training_flops()
        self._peak = _peak(trainer, pl_module)
        self._begin(pl_module)

    def _begin(self, pl_module: LightningModule) -> None:
        self._tokens: Tensor | int = 0  # on the device, where a batch has padding: no step waits for it
        self._waited = _seconds_waited(pl_module.trainer)
        pl_module.work = Work()
        self._since, self._paused = time.perf_counter(), None

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._paused = time.perf_counter()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._since += time.perf_counter() - self._paused

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer) -> None:
        self._lr = optimizer.param_groups[0]["lr"]  # after the step the schedule sets that of the next one

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs, batch, batch_idx) -> None:
        pl_module.drop_rates.count_step()
        pl_module.exit_weights.count_step()
        self._tokens = self._tokens + count_tokens(batch)
        every, step = trainer.log_every_n_steps, trainer.global_step
        if every and step % every == 0 and step != self._logged_step:
            self._log(trainer, pl_module)
            self._logged_step = step

    def _log(self, trainer: Trainer, pl_module: LightningModule) -> None:
        values = {
            "train/lr": float(self._lr),
            "train/gradient_norm": float(pl_module.gradient_norm),
        }
        tokens = int(self._tokens) * trainer.world_size
        seconds = time.perf_counter() - self._since  # after the device has finished
        values["train/tokens_per_second"] = tokens / seconds
        if self._waited is not None:
            values["train/waiting_for_data"] = (_seconds_waited(trainer) - self._waited) / seconds
        if self._peak is not None:
            values["train/mfu"] = sum(self._flops.of(pl_module.work).values()) / (seconds * self._peak)
        if pl_module.finite_steps.not_finite == "skip":
            values["train/skipped_steps"] = pl_module.finite_steps.skipped
        for name, vector in (("drop_rate", pl_module.drop_rates), ("exit_weight", pl_module.exit_weights)):
            for layer, mean in enumerate(vector.take_mean(), start=1):
                values[f"train/{name}/layer_{layer:02d}"] = mean
        for logger in trainer.loggers:
            logger.log_metrics(values, step=trainer.global_step)
        self._begin(pl_module)


def count_tokens(batch: dict[str, Tensor]) -> Tensor | int:
    """Return the tokens of a batch's rows up to each one's last scored token: what follows is padding.

    All of them where nothing says what is scored; `lengths`, where a batch has them, are those of its rows. Without
    waiting for a device.
    """
    if "lengths" in batch:
        return batch["lengths"].sum()
    if batch.get("labels") is None:
        return batch["input_ids"].numel()
    labels = batch["labels"]
    places = torch.arange(1, labels.shape[1] + 1, device=labels.device)
    return ((labels != NOT_SCORED) * places).amax(1).sum()


def _seconds_waited(trainer: Trainer) -> float | None:
    """Return how long training has waited for batches so far; None where the loader does not count it."""
    return getattr(trainer.train_dataloader, "seconds_waited", None)


def _peak(trainer: Trainer, pl_module: LightningModule) -> float | None:
    """Return the FLOPs a second of one device at most: given, or known of a GPU; None: neither."""
    if pl_module.peak_flops is not None:
        return pl_module.peak_flops * 1e12
    if pl_module.device.type != "cuda":
        return None
    return known_peak(torch.cuda.get_device_name(pl_module.device), trainer.precision)
