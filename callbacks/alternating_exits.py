"""BERxiT's recipe (Xin et al., EACL 2021, section 3.2): the last exit and all exits, by turns."""

from lightning.pytorch import Callback, LightningModule, Trainer


class AlternatingExits(Callback):
    """The first, third … step trains the last exit alone, the others all exits, each with the same weight.

    So the last layer does not pay for what the exits below want of the model. With `learned_exit: true` the steps of
    all exits also train the judge by which LearnedExit stops.
    """

    def exit_weights(self, step: int, num_layers: int) -> list[float]:
        """One a layer, at optimizer step `step` (0-based): the last exit's loss, or the mean of all."""
        early = num_layers - 1
        return [0.0] * early + [1.0] if step % 2 == 0 else [1 / num_layers] * num_layers

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        pl_module.exit_weights.claim(self)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch, batch_idx: int) -> None:
        num_layers = len(pl_module.exit_weights.values)
        pl_module.exit_weights.write(self, self.exit_weights(trainer.global_step, num_layers))
