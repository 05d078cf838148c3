"""Callbacks: the policies of training, imported as lskip.callbacks."""

from lskip.callbacks.alternating_exits import AlternatingExits
from lskip.callbacks.early_exit_loss import EarlyExitLoss
from lskip.callbacks.finite_steps import FiniteSteps
from lskip.callbacks.layer_dropout import LayerDropout
from lskip.callbacks.layer_metrics import LayerMetrics
from lskip.callbacks.resumed_settings import ResumedSettings
from lskip.callbacks.run_checkpoint import RunCheckpoint
from lskip.callbacks.run_hparams import RunHparams
from lskip.callbacks.training_log import TrainingLog
from lskip.callbacks.two_stages import TwoStages

__all__ = [
    "AlternatingExits",
    "EarlyExitLoss",
    "FiniteSteps",
    "LayerDropout",
    "LayerMetrics",
    "ResumedSettings",
    "RunCheckpoint",
    "RunHparams",
    "TrainingLog",
    "TwoStages",
]
