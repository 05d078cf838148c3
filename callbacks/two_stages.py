"""DeeBERT's recipe (Xin et al., ACL 2020, arXiv 2004.12993): the last exit first, then the others on a frozen model."""

from lightning.pytorch import Callback, LightningModule, Trainer

from lskip.utils.checks import check_real


class TwoStages(Callback):
    """Trains the last exit alone; then freezes the model and trains all other exits, each with the same weight.

    The exits need trainable heads: `exit_heads: true`, or those of a TaskModule. The second stage does not change the
    model: embedding, blocks, norm and head.

    Args:
        first_stage: share of the steps that train the last exit; 0 for a model that is trained already.

    Raises:
        ValueError: a share that is not from 0 to below 1.
    """

    def __init__(self, first_stage: float = 0.5):
        check_real("first_stage", first_stage, "from 0 to below 1", lambda share: 0 <= share < 1)
        self.first_stage = first_stage

    def is_first(self, step: int, total_steps: int) -> bool:
        """Return whether optimizer step `step` (0-based) of `total_steps` trains the last exit."""
        return step < self.first_stage * total_steps

    def exit_weights(self, first: bool, num_layers: int) -> list[float]:
        """Return the weights of a stage: the last exit alone, or all others equally."""
        early = num_layers - 1
        return [0.0] * early + [1.0] if first else [1 / early] * early + [0.0]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        pl_module.exit_weights.claim(self)
        self.check_layers(pl_module)
        if trainer.world_size > 1:
            raise ValueError("TwoStages: runs on one device; in each stage some parameters get no gradient")

    def check_layers(self, pl_module: LightningModule) -> None:
        """Raise ValueError where the model has no trainable exit heads, or no early exit."""
        if not pl_module.has_exit_heads:
            raise ValueError("TwoStages: the exits have nothing of their own to train; set exit_heads: true")
        if len(pl_module.exit_weights.values) < 2:
            raise ValueError("TwoStages: the model has one layer, and so no early exit")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if pl_module.total_steps is None:
            raise ValueError("TwoStages: needs a known number of steps; set trainer.max_steps")

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch, batch_idx: int) -> None:
        first = self.is_first(trainer.global_step, pl_module.total_steps)
        pl_module.exit_weights.write(self, self.exit_weights(first, len(pl_module.exit_weights.values)))
        # Optimizers skip parameters without a gradient, also their weight decay and momentum.
        pl_module.model.requires_grad_(first)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        pl_module.model.requires_grad_(True)
