"""Callbacks: the policies of training, imported as lskip.callbacks."""

from lskip.callbacks.early_exit_loss import EarlyExitLoss
from lskip.callbacks.layer_dropout import LayerDropout
from lskip.callbacks.layer_metrics import LayerMetrics
from lskip.callbacks.run_checkpoint import RunCheckpoint

__all__ = ["EarlyExitLoss", "LayerDropout", "LayerMetrics", "RunCheckpoint"]
