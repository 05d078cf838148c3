"""Callbacks: the policies of training, imported as lskip.callbacks."""

from lskip.callbacks.alternating_exits import AlternatingExits
from lskip.callbacks.early_exit_loss import EarlyExitLoss
from lskip.callbacks.layer_dropout import LayerDropout
from lskip.callbacks.layer_metrics import LayerMetrics
from lskip.callbacks.run_checkpoint import RunCheckpoint
from lskip.callbacks.run_hparams import RunHparams
from lskip.callbacks.two_stages import TwoStages
from lskip.training.finite_steps import FiniteSteps
from lskip.training.resumed_settings import ResumedSettings
from lskip.training.training_log import TrainingLog

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
