"""TensorBoard logger of a run."""

from collections.abc import Mapping

from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only


class RunLogger(TensorBoardLogger):
    """Lightning's TensorBoardLogger without the "epoch" curve and without hparams.yaml, which would be empty.

    Attributes:
        steps: optimizer steps of the checkpoint that is measured, under which all is logged; None: as Lightning counts.
    """

    steps: int | None = None

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log all metrics but "epoch"."""
        values = {name: value for name, value in metrics.items() if name != "epoch"}
        if values:
            super().log_metrics(values, step if self.steps is None else self.steps - 1)  # Lightning counts from 0

    @rank_zero_only
    def save(self) -> None:
        """Flush to disk."""
        self.experiment.flush()
