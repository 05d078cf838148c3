"""TensorBoard's files of a run."""

from __future__ import annotations

from collections.abc import Mapping

from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only


class RunLogger(TensorBoardLogger):
    """Lightning's, without the curve of the epoch, which it adds to whatever is logged and which comes first.

    Nor does it write hparams.yaml, which would be empty: config.yaml says what the run is.
    """

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Write all but the epoch."""
        values = {name: value for name, value in metrics.items() if name != "epoch"}
        if values:
            super().log_metrics(values, step)

    @rank_zero_only
    def save(self) -> None:
        """Write what is not on disk yet."""
        self.experiment.flush()
