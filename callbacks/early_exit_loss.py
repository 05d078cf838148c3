"""Early exit loss: every layer learns to be decoded by the shared LM head (arXiv 2404.16710, section 4.2)."""

from lightning.pytorch import Callback, LightningModule, Trainer

from lskip.curricula import ExitCurriculum, Rotational
from lskip.losses import exit_weights
from lskip.utils.checks import check_real


class EarlyExitLoss(Callback):
    """Sets the weight of each exit's loss at the start of each step.

    Args:
        e_scale: weight of the early exits against the last, from 0 (none) up; the paper uses 0.1 to 1.
        curriculum: which exits are on at a step: Rotational, Gradual, AllExits, LastExit or your own.

    The exit after the first block weighs e(0) = 0: it is never trained, whatever the curriculum.

    Raises:
        ValueError: e_scale below 0 or not finite.
    """

    def __init__(self, e_scale: float = 0.2, curriculum: ExitCurriculum = Rotational(period=8)):
        check_real("e_scale", e_scale, "from 0 up", lambda value: value >= 0)
        self.e_scale = e_scale
        self.curriculum = curriculum

    def exit_weights(self, step: int, total_steps: int | None, num_layers: int) -> list[float]:
        """Return ẽ(t, l) for each layer at optimizer step `step` (0-based) of `total_steps`."""
        on = self.curriculum.on(step, total_steps or 0, num_layers)
        return exit_weights(num_layers, self.e_scale, on)

    def check_layers(self, pl_module: LightningModule) -> None:
        """Raise ValueError where the curriculum names exits that the model does not have."""
        self.curriculum.check(len(pl_module.exit_weights.values))

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        pl_module.exit_weights.claim(self)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.curriculum.needs_total and pl_module.total_steps is None:
            name = type(self.curriculum).__name__
            raise ValueError(f"early_exit_loss.curriculum: {name} needs a known number of steps; set trainer.max_steps")

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch, batch_idx: int) -> None:
        num_layers = len(pl_module.exit_weights.values)
        pl_module.exit_weights.write(self, self.exit_weights(trainer.global_step, pl_module.total_steps, num_layers))
