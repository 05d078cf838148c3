"""Logging of training steps besides the loss: learning rate, gradient norm, vectors, speed."""

import time

from lightning.pytorch import Callback, LightningModule, Trainer


class TrainingLog(Callback):
    """Logs, every `log_every_n_steps`, about the steps since the last time.

    `train/lr` (of the first parameter group) and `train/gradient_norm` (before clipping) are of the last step;
    `train/drop_rate/layer_08` and `train/exit_weight/layer_08` are means over the steps, since a curriculum changes at
    each; `train/tokens_per_second`; and with `not_finite: skip` the steps skipped so far, `train/skipped_steps`.
    """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._lr = None
        self._logged_step = trainer.global_step
        self._begin()

    def _begin(self) -> None:
        self._tokens, self._since = 0, time.perf_counter()

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer) -> None:
        self._lr = optimizer.param_groups[0]["lr"]  # after the step the schedule sets that of the next one

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs, batch, batch_idx) -> None:
        pl_module.drop_rates.count_step()
        pl_module.exit_weights.count_step()
        self._tokens += batch["input_ids"].numel() * trainer.world_size
        every, step = trainer.log_every_n_steps, trainer.global_step
        if every and step % every == 0 and step != self._logged_step:
            self._log(trainer, pl_module)
            self._logged_step = step

    def _log(self, trainer: Trainer, pl_module: LightningModule) -> None:
        values = {
            "train/lr": float(self._lr),
            "train/gradient_norm": float(pl_module.gradient_norm),
            "train/tokens_per_second": self._tokens / (time.perf_counter() - self._since),
        }
        if pl_module.finite_steps.not_finite == "skip":
            values["train/skipped_steps"] = pl_module.finite_steps.skipped
        for name, vector in (("drop_rate", pl_module.drop_rates), ("exit_weight", pl_module.exit_weights)):
            for layer, mean in enumerate(vector.take_mean(), start=1):
                values[f"train/{name}/layer_{layer:02d}"] = mean
        for logger in trainer.loggers:
            logger.log_metrics(values, step=trainer.global_step)
        self._begin()
