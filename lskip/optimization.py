"""Parameter groups, gradient norm and clipping, and the default learning-rate schedule."""

import math

from lightning.pytorch import Trainer
from lightning.pytorch.plugins.precision import MixedPrecision, Precision
from lightning.pytorch.utilities import GradClipAlgorithmType
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lskip.utils.checks import check_real, check_whole


def parameter_groups(module: nn.Module) -> list[dict]:
    """Return the trained parameters in two groups: matrices, and norms and biases without weight decay."""
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    matrices = [parameter for parameter in trained if parameter.ndim > 1]
    vectors = [parameter for parameter in trained if parameter.ndim <= 1]
    groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def gradient_norm(trainer: Trainer, optimizer: Optimizer) -> Tensor:
    """Return the norm of all gradients together, without waiting for the device."""
    trained = [part for group in optimizer.param_groups for part in group["params"]]
    norm = nn.utils.get_total_norm([part.grad for part in trained if part.grad is not None])
    if isinstance(norm, DTensor):  # of sharded gradients
        norm = norm.full_tensor()
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    if scaler is not None and getattr(optimizer, "_step_supports_amp_scaling", False):
        norm = norm / scaler.get_scale()  # a fused optimizer unscales in its step
    return norm


def clip_gradients(trainer: Trainer, optimizer: Optimizer, value: float | None, algorithm: str | None) -> None:
    """Clip gradients as Lightning does, also for a fused optimizer in bf16-mixed.

    Lightning refuses that because of float16, where such an optimizer unscales gradients in its step, after clipping.
    In bfloat16 there is no scale.
    """
    plugin = trainer.precision_plugin
    if isinstance(plugin, MixedPrecision) and plugin.scaler is None:
        Precision.clip_gradients(plugin, optimizer, value or 0.0, GradClipAlgorithmType(algorithm or "norm"))
    else:
        trainer.lightning_module.clip_gradients(optimizer, value, algorithm)


class WarmupCosine(LRScheduler):
    """Linear warm-up, then a cosine down to a share of the full rate.

    Args:
        optimizer: whose learning rates to set.
        warmup_steps: optimizer steps until the full rate.
        final: the share of the full rate that is left at the end, 0 to 1.
        total_steps: length of the run in optimizer steps; LayerSkipModule fills it in when not given.
        stages: equal parts of the run, each with a warm-up and a cosine of its own (DeeBERT trains in two).

    Raises:
        ValueError: a number out of its range.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        warmup_steps: int = 100,
        final: float = 0.1,
        total_steps: int | None = None,
        stages: int = 1,
    ):
        check_whole("warmup_steps", warmup_steps, 0)
        check_real("final", final, "from 0 to 1", lambda value: 0 <= value <= 1)
        check_whole("stages", stages, 1)
        if total_steps is not None:
            check_whole("total_steps", total_steps, 1)
        self.stages = stages
        self.warmup_steps = warmup_steps
        self.final = final
        self.total_steps = total_steps
        super().__init__(optimizer)

    @property
    def stage_steps(self) -> int | None:
        """Optimizer steps of a stage; None: unknown."""
        return None if self.total_steps is None else math.ceil(self.total_steps / self.stages)

    def factor(self, step: int) -> float:
        """Return the share of the full rate at optimizer step `step` (0-based)."""
        length = self.stage_steps
        if length is not None and self.stages > 1:
            step %= length
        if step < self.warmup_steps:
            return (step + 1) / (self.warmup_steps + 1)
        if length is None:
            return 1.0
        remaining = max(length - self.warmup_steps, 1)
        progress = min((step - self.warmup_steps) / remaining, 1.0)
        return self.final + (1 - self.final) * (1 + math.cos(math.pi * progress)) / 2

    def get_lr(self) -> list[float]:
        return [base * self.factor(self.last_epoch) for base in self.base_lrs]

    def state_dict(self) -> dict:
        """Return the state without the length of the run: a run resumed with more steps stretches its schedule."""
        return {key: value for key, value in super().state_dict().items() if key != "total_steps"}
