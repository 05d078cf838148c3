"""BERxiT's recipe (Xin et al., EACL 2021, section 3.2): the last exit and all exits, by turns."""

from lightning.pytorch import Callback, LightningModule, Trainer


class AlternatingExits(Callback):
    """Trains the last exit alone at the first, third … step, and all exits, with equal weights, at the others.

    So the early exits cost the last layer less. With `learned_exit: true` the steps of all exits also train the exit
    classifier.
    """

    def exit_weights(self, step: int, num_layers: int) -> list[float]:
        """Return the weight of each layer at optimizer step `step` (0-based): the last exit alone, or all equally."""
        early = num_layers - 1
        return [0.0] * early + [1.0] if step % 2 == 0 else [1 / num_layers] * num_layers

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        pl_module.exit_weights.claim(self)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch, batch_idx: int) -> None:
        num_layers = len(pl_module.exit_weights.values)
        pl_module.exit_weights.write(self, self.exit_weights(trainer.global_step, num_layers))
