"""Perplexity, agreement and tokens per round of every layer, at each validation."""

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from rich.console import Console

from lskip.evaluation.layers.figure import perplexity_figure, print_layers
from lskip.models.readout import LayerReport, LayerReportMetric, Readout


class LayerMetrics(Callback):
    """Measures all layers in the forward pass of validation.

    Logs `val/ppl/layer_08` (perplexity), `val/agreement/layer_08` (share of positions where the layer's argmax is the
    last layer's), `val/tokens_per_round_4/layer_08` (tokens that a round of self-speculation would bring along this
    text, if the layer drafted 4; likewise 8), `val/layers_needed` (mean depth after which the argmax no longer changes)
    and a figure of perplexity by depth; `test` likewise under `test/`. `validate` and `test` end with a table. Each
    layer costs one product with the head.

    Attributes:
        report: the LayerReport of the last validation; None before the first.
        step: optimizer steps before it.
    """

    def __init__(self) -> None:
        self.report: LayerReport | None = None
        self.step = 0
        self._metric: LayerReportMetric | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        num_layers = pl_module.decoder.num_layers
        pl_module.validated_exits = list(range(1, num_layers + 1))
        self._metric = LayerReportMetric(num_layers)

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._metric.to(pl_module.device).reset()

    def on_validation_batch_end(self, trainer, pl_module, outputs: Readout, batch, batch_idx, dataloader_idx=0):
        self._metric.update(outputs)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.report, self.step = self._metric.compute(), trainer.global_step
        if not trainer.sanity_checking:
            self._publish(trainer, pl_module, "val")

    on_test_epoch_start = on_validation_epoch_start
    on_test_batch_end = on_validation_batch_end

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.report = self._metric.compute()
        self._publish(trainer, pl_module, "test")

    def _publish(self, trainer: Trainer, pl_module: LightningModule, split: str) -> None:
        for row in self.report.layers():
            layer = f"layer_{row.pop('layer'):02d}"
            pl_module.log(f"{split}/ppl/{layer}", row.pop("perplexity"), sync_dist=True)
            for name, value in row.items():
                pl_module.log(f"{split}/{name}/{layer}", value, sync_dist=True)
        pl_module.log(f"{split}/layers_needed", self.report.layers_needed, sync_dist=True)
        self._draw(trainer, split)

    @rank_zero_only
    def _draw(self, trainer: Trainer, split: str) -> None:
        figure = perplexity_figure({split: self.report})
        for logger in trainer.loggers:
            if hasattr(logger.experiment, "add_figure"):
                logger.experiment.add_figure(f"{split}/perplexity_by_depth", figure, trainer.global_step)
        figure.clear()  # breaks reference cycles, which would keep it in memory until a full collection

    @rank_zero_only
    def _print(self) -> None:
        print_layers(self.report, Console())

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "validate":
            self._print()

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._print()
