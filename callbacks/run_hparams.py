"""A run's settings beside its final numbers of every layer, in TensorBoard's HPARAMS tab."""

from collections.abc import Mapping

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch.utils.tensorboard.summary import hparams

METRICS = ("val/loss", "val/ppl/", "val/agreement/", "val/layers_needed")


class RunHparams(Callback):
    """Writes `settings` and the numbers of the last validation when training ends, so that runs compare by curriculum.

    A number stands under hparam/: `hparam/val/ppl/layer_08`. A run without validation has settings alone.

    Args:
        settings: names and plain values.
    """

    def __init__(self, settings: Mapping[str, str | float | int | bool]):
        self.settings = dict(settings)

    @rank_zero_only
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        measured = {
            f"hparam/{name}": float(value)
            for name, value in trainer.callback_metrics.items()
            if name.startswith(METRICS)
        }
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                for summary in hparams(self.settings, measured):
                    logger.experiment._get_file_writer().add_summary(summary)
                logger.log_metrics(measured, step=trainer.global_step)
