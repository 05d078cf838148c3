"""Settings of a run and its final metrics in TensorBoard's HPARAMS tab."""

from collections.abc import Iterable, Mapping

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from torch.utils.tensorboard.summary import hparams

METRICS = ("val/loss", "val/ppl/", "val/agreement/", "val/tokens_per_round_", "val/layers_needed")
# The tab first shows five columns of settings: those marked as differing, then others by name.
FIRST = (
    "early_exit_loss.curriculum",
    "early_exit_loss.curriculum.period",
    "early_exit_loss.e_scale",
    "layer_dropout.p_max",
    "optimizer.lr",
)


class RunHparams(Callback):
    """Writes `settings` and the names of the validation metrics when training ends, so that runs can be compared.

    The tab shows the last value of each metric, such as `val/ppl/layer_08`. Without validation there are only settings.

    Args:
        settings: names and plain values.
    """

    def __init__(self, settings: Mapping[str, str | float | int | bool]):
        self.settings = dict(settings)

    @rank_zero_only
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        measured = [name for name in trainer.callback_metrics if name.startswith(METRICS)]
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                for summary in self._summaries(measured):
                    logger.experiment._get_file_writer().add_summary(summary)

    def _summaries(self, measured: Iterable[str]) -> tuple[Summary, ...]:
        experiment, *session = hparams(self.settings, dict.fromkeys(measured, 0.0))
        data = experiment.value[0].metadata.plugin_data
        content = HParamsPluginData.FromString(data.content)
        for info in content.experiment.hparam_infos:
            info.differs = info.name in FIRST
        data.content = content.SerializeToString()
        return experiment, *session
