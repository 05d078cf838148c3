"""Layer dropout, more of it in deeper layers: p_{l,t} = S(t) D(l) p_max (arXiv 2404.16710, section 4.1)."""

from typing import Literal

from lightning.pytorch import Callback, LightningModule, Trainer

from lskip.schedules import Constant, Exponential, Schedule
from lskip.utils.checks import check_choice, check_real


class LayerDropout(Callback):
    """Sets the drop rate of each block at the start of each step.

    Args:
        p_max: the drop rate of the last block once the time schedule has reached 1; 0 to 1.
        depth: D(l), how the rate grows over the blocks: Exponential (the paper's), Linear, Constant, Alternating or
            your own.
        time: S(t), how it changes over the optimizer steps: Constant (continual pretraining, fine-tuning),
            Exponential (the paper's, from scratch), Linear, Falling (from scratch) or your own.
        scale_kept: a block adds 1 / (1 - p) times as much to the sequences that keep it, so that its mean is that of
            the full depth; for p = 1, which keeps none, 1. LayerSkip's equation has no such factor: it is the
            inverse-density scaling that modded-nanogpt's pull request 348 takes from "Don't Drop Dropout"
            (arXiv 2609.05275).
        masks: where several devices train, each draws the same pattern for its own rows (shared), so that a block that
            one skips is skipped by all and costs nothing; or a pattern of its own (per_rank), with less noise in the
            gradient where each has few rows.

    Raises:
        ValueError: p_max out of its range; or a schedule of the steps for the depth, or of the depth for the steps.
    """

    def __init__(
        self,
        p_max: float = 0.1,
        depth: Schedule = Exponential(),
        time: Schedule = Constant(),
        scale_kept: bool = False,
        masks: Literal["shared", "per_rank"] = "shared",
    ):
        check_real("p_max", p_max, "from 0 to 1", lambda value: 0 <= value <= 1)
        for name, schedule in (("depth", depth), ("time", time)):
            if name not in schedule.over:
                kind, over = type(schedule).__name__, schedule.over[0]
                raise ValueError(f"{name}: {kind} is a schedule for {over}, not for {name}")
        self.p_max = p_max
        self.depth = depth
        self.time = time
        self.scale_kept = scale_kept
        check_choice("masks", masks, ("shared", "per_rank"))
        self.masks = masks

    def drop_rates(self, step: int, total_steps: int | None, num_layers: int) -> list[float]:
        """Return p_{l,t} for each block at optimizer step `step` (0-based) of `total_steps`."""
        now = _factor("time", self.time, step, total_steps or 0) * self.p_max
        return [now * _factor("depth", self.depth, block, num_layers) for block in range(num_layers)]

    def kept_scales(self, drop_rates: list[float]) -> list[float]:
        """Return the factor of what each block adds to the sequences that keep it."""
        return [1 / (1 - rate) if self.scale_kept and rate < 1 else 1.0 for rate in drop_rates]

    def check_layers(self, pl_module: LightningModule) -> None:
        """Raise ValueError where the depth schedule refuses the model's number of layers."""
        layers = len(pl_module.drop_rates.values)
        for block in range(layers):
            _factor("depth", self.depth, block, layers)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        pl_module.drop_rates.claim(self)
        pl_module.kept_scales.claim(self)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.time.needs_total and pl_module.total_steps is None:
            name = type(self.time).__name__
            raise ValueError(f"layer_dropout.time: {name} needs a known number of steps; set trainer.max_steps")
        self.drop_rates(0, pl_module.total_steps, len(pl_module.drop_rates.values))
        per_rank = self.masks == "per_rank" and trainer.world_size > 1
        pl_module.mask_rank = trainer.global_rank if per_rank else None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch, batch_idx: int) -> None:
        rates = self.drop_rates(trainer.global_step, pl_module.total_steps, len(pl_module.drop_rates.values))
        pl_module.drop_rates.write(self, rates)
        pl_module.kept_scales.write(self, self.kept_scales(rates))


def _factor(name: str, schedule: Schedule, index: int, count: int) -> float:
    """Return the schedule's factor; ValueError where a schedule of the user's own gives no number."""
    factor = schedule(index, count)
    check_real(
        f"layer_dropout.{name}: {type(schedule).__name__}({index}, {count})", factor, "from 0 up", lambda x: x >= 0
    )
    return factor
