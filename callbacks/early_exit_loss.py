"""Early exit loss: every layer learns to be decoded by the shared LM head (arXiv 2404.16710, section 4.2)."""

import math
from collections.abc import Mapping

from lightning.pytorch import Callback, LightningModule, Trainer

from lskip.curricula import AllExits, ExitCurriculum, Rotational
from lskip.losses import exit_weights, share_weights
from lskip.utils.checks import check_real, check_whole

LARGEST = 1 - 1e-6  # sum of the shares: less is left of the last layer's by rounding alone
E_SCALE, PERIOD = 0.2, 8  # where neither e_scale nor shares are given


class EarlyExitLoss(Callback):
    """Sets the weight of each exit's loss at the start of each step: the paper's e(l), or chosen shares.

    By the paper's equation the exit after the first block weighs e(0) = 0: it is never trained, whatever the
    curriculum. And an early exit of a deep model weighs little at any e_scale: exit 4 of 30 has at most 1.5 % of the
    loss. Shares are lskip's own, not the paper's.

    Args:
        e_scale: weight of the early exits against the last, from 0 (none) up; the paper uses 0.1 to 1. null: 0.2,
            unless there are shares.
        curriculum: which exits are on at a step: Rotational, Gradual, AllExits, LastExit or your own. null:
            Rotational(8); with shares AllExits.
        shares: in the place of the paper's equation, exit layer (1 is the first block) -> its share of the loss at the
            steps at which it is on, above 0 and together below 1. The rest is the last layer's.

    Raises:
        ValueError: a number out of its range, or both e_scale and shares.
    """

    def __init__(
        self,
        e_scale: float | None = None,
        curriculum: ExitCurriculum | None = None,
        shares: dict[int, float] | None = None,
    ):
        if e_scale is not None:
            check_real("e_scale", e_scale, "from 0 up", lambda value: value >= 0)
        if shares is not None:
            _check_shares(shares, e_scale)
        self.e_scale = E_SCALE if e_scale is None and shares is None else e_scale
        self.shares = shares
        self.curriculum = curriculum or (Rotational(PERIOD) if shares is None else AllExits())

    def exit_weights(self, step: int, total_steps: int | None, num_layers: int) -> list[float]:
        """Return ẽ(t, l), or the shares, for each layer at optimizer step `step` (0-based) of `total_steps`."""
        on = self.curriculum.on(step, total_steps or 0, num_layers)
        return exit_weights(num_layers, self.e_scale, on) if self.shares is None else share_weights(self.shares, on)

    def check_layers(self, pl_module: LightningModule) -> None:
        """Raise ValueError where curriculum or shares name exits that the model lacks, or that are never on."""
        layers = len(pl_module.exit_weights.values)
        self.curriculum.check(layers)
        for exit_layer in self.shares or ():
            if exit_layer >= layers:
                raise ValueError(f"shares: exit layer {exit_layer} is not below the last layer, {layers}")
            if exit_layer not in self.curriculum.exits(layers):
                name = type(self.curriculum).__name__
                raise ValueError(f"shares: exit layer {exit_layer} is on at no step of curriculum {name}")

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        pl_module.exit_weights.claim(self)
        self.check_layers(pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.curriculum.needs_total and pl_module.total_steps is None:
            name = type(self.curriculum).__name__
            raise ValueError(f"early_exit_loss.curriculum: {name} needs a known number of steps; set trainer.max_steps")

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch, batch_idx: int) -> None:
        num_layers = len(pl_module.exit_weights.values)
        pl_module.exit_weights.write(self, self.exit_weights(trainer.global_step, pl_module.total_steps, num_layers))


def _check_shares(shares: Mapping[int, float], e_scale: float | None) -> None:
    if e_scale is not None:
        raise ValueError(
            f"shares: {shares} and e_scale: {e_scale} both weigh the exits; e_scale null leaves it to shares"
        )
    if not isinstance(shares, Mapping):
        raise ValueError(f"shares: {shares!r} is not exit layers and their shares, as {{4: 0.3}}")
    if not shares:
        raise ValueError("shares: {} names no exit; null is the paper's equation")
    for exit_layer, share in shares.items():
        check_whole("shares: exit layer", exit_layer, 1)
        check_real(f"shares: exit layer {exit_layer}", share, "above 0 and below 1", lambda value: 0 < value < 1)
    if (total := math.fsum(shares.values())) > LARGEST:
        raise ValueError(f"shares: {shares} add up to {total:g}; below 1 is left for the last layer")
