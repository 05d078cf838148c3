"""The LightningModule and callbacks that train an exit adapter on unrolled drafts."""

from collections.abc import Iterator
from datetime import timedelta

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging, Timer
from torch import Tensor
from torch.autograd.function import once_differentiable

from lskip.adapters.unroll import draft_metrics, drafted_at, unrolled_states
from lskip.losses import rows_at_once
from lskip.models.exit_adapter import ExitAdapter
from lskip.optimization import WarmupCosine
from lskip.targets import ExitTarget, SelfDistillation
from lskip.training.finite_steps import FiniteSteps
from lskip.training.resumed_settings import ResumedSettings

MEASURED_STEPS = 6  # draft steps of validation, at least


def step_weights(num_steps: int, decay: float) -> list[float]:
    """Return decay^(j-1) for draft steps j = 1, 2, …, normalized to a sum of 1."""
    weights = [decay**step for step in range(num_steps)]
    return [weight / sum(weights) for weight in weights]


def draft_loss(
    states: Tensor, last_states: Tensor, head_weight: Tensor, row_weights: Tensor, target: ExitTarget
) -> Tensor:
    """Return Σ row_weights · the target's loss of softmax(states head^T), differentiable by `states` only.

    Logits are computed a few rows at a time. As in `head_loss`, the forward pass computes the gradient, and products
    run in autocast's dtype.

    Args:
        states: [N, D], the adapter's.
        last_states: [N, D], the frozen model's at the same positions: the teacher's.
        head_weight: [W, D].
        row_weights: [N].
        target: one that needs a teacher and no labels.
    """
    return _DraftLoss.apply(states, last_states, head_weight, row_weights, target)


class _DraftLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, states, last_states, head_weight, row_weights, target):
        device = states.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else head_weight.dtype
        total_dtype = torch.promote_types(states.dtype, torch.float32)
        weight, grad = head_weight.to(dtype), torch.empty_like(states)
        total = torch.zeros((), dtype=total_dtype, device=states.device)
        count = rows_at_once(len(head_weight), states.device)
        with torch.autocast(device, enabled=False):
            for start in range(0, len(states), count):
                part = slice(start, start + count)
                logits, wanted = ((x[part].to(dtype) @ weight.T).to(total_dtype) for x in (states, last_states))
                losses, grad_logits = target.loss(logits, None, wanted)
                total += (losses * row_weights[part]).sum()
                grad[part] = grad_logits.mul_(row_weights[part, None]).to(dtype) @ weight
        ctx.save_for_backward(grad)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_total):
        (grad,) = ctx.saved_tensors
        return grad * grad_total.to(grad.dtype), *[None] * 4


class AdapterModule(LightningModule):
    """Training of an ExitAdapter to predict what the frozen model's last layer predicts.

    A batch is {"exit_states" [B, S, D], "last_states" [B, S, D] after the final norm, "scored" [B, S] bool}, padded
    at the right; validation also needs "choices" [B, S], the argmax of the model. The loss is the target's (by
    default KL) for the last layer's distribution and the adapter's over the adapter's words, a mean over the scored
    positions of each draft step, and over the steps with weights decay^(j-1).

    Args:
        adapter: in float32.
        unroll: draft steps to train on; 1 without joins_last_state, since all steps are then alike.
        decay: weight of a draft step against the one before, above 0.
        unroll_every: draft steps after the first are trained only on rounds that begin at every n-th position, shifted
            in each optimizer step: each step on all positions would cost as much as the first, for little gain.
        lr: peak learning rate of AdamW.
        warmup_steps: optimizer steps until the peak.
        clip: maximal norm of the gradient.
        target: one that needs a teacher and no labels; None: SelfDistillation.
    """

    def __init__(
        self,
        adapter: ExitAdapter,
        unroll: int = 3,
        decay: float = 0.8,
        unroll_every: int = 3,
        lr: float = 1e-3,
        warmup_steps: int = 50,
        clip: float = 1.0,
        target: ExitTarget | None = None,
    ):
        super().__init__()
        self.adapter, self.target = adapter, target or SelfDistillation()
        self.unroll = unroll if adapter.shape.joins_last_state else 1
        self.decay, self.unroll_every = decay, unroll_every
        self.lr, self.warmup_steps, self.clip = lr, warmup_steps, clip
        self.finite_steps = FiniteSteps()
        self.tokens_seen = 0  # scored positions, counted each time they are trained on
        self._hits: list[Tensor] = []

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.tokens_seen += int(batch["scored"].sum())
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        """Return the loss of a batch in nats a token; 0 if nothing is scored."""
        scored, last_states = batch["scored"], batch["last_states"]
        everywhere = torch.arange(scored.shape[1], device=scored.device)
        starts = everywhere[self.global_step % self.unroll_every :: self.unroll_every]
        states, wanted, weights = [], [], []
        share = step_weights(self.unroll, self.decay)
        for step, unrolled in enumerate(self._unrolled(batch, self.unroll, starts), start=1):
            places, counted = drafted_at(scored, everywhere if step == 1 else starts, step)
            where = counted.flatten().nonzero().squeeze(1)
            states.append(unrolled.flatten(0, 1).index_select(0, where))
            wanted.append(last_states[:, places].flatten(0, 1).index_select(0, where))
            dtype = torch.promote_types(unrolled.dtype, torch.float32)
            weights.append(torch.full_like(where, share[step - 1] / max(len(where), 1), dtype=dtype))
        parts = (torch.cat(each) for each in (states, wanted))
        return draft_loss(*parts, self.adapter.body.lm_head.weight, torch.cat(weights), self.target)

    def _unrolled(self, batch: dict[str, Tensor], num_steps: int, starts: Tensor | None = None) -> Iterator[Tensor]:
        parts = [batch[name].to(self.adapter.join.weight.dtype) for name in ("exit_states", "last_states")]
        return unrolled_states(self.adapter, *parts, num_steps, starts)

    # Validation: agreement of each draft step with the model's argmax, and tokens per round.

    def hits(self, batch: dict[str, Tensor]) -> list[Tensor]:
        """Return for each row bool [A, J]: whether draft step j at scored position a is the model's argmax."""
        scored, choices, head = batch["scored"], batch["choices"], self.adapter.body.lm_head
        right = []
        for later, states in enumerate(self._unrolled(batch, max(self.unroll, MEASURED_STEPS))):
            states = F.pad(states, (0, 0, later, 0))[:, : scored.shape[1]]  # index by drafted position
            words = self.adapter.token_ids[head(states[scored]).argmax(-1)]
            right.append(words == choices[scored])
        return list(torch.stack(right, 1).cpu().split(scored.sum(1).tolist()))

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self._hits += self.hits(batch)

    def on_validation_epoch_end(self) -> None:
        values, self._hits = draft_metrics(self._hits), []
        self.log("val/draft_agreement", values["draft_agreement"], prog_bar=True)
        told = {step: value for step, value in enumerate(values["agreement"], start=1) if value is not None}
        self.log_dict({f"val/agreement/step_{step}": value for step, value in told.items()})
        self.log_dict({f"val/tokens_per_round/d_{d}": value for d, value in values["tokens_per_round"].items()})

    # The optimizer. Clipping here, since Lightning's refuses fused optimizers in mixed precision.

    def configure_optimizers(self) -> dict:
        parameters = self.adapter.trained_parameters()
        optimizer = torch.optim.AdamW(parameters, lr=self.lr, betas=(0.9, 0.95), weight_decay=0.01, fused=True)
        steps = self.trainer.max_steps if self.trainer.max_steps > 0 else None
        schedule = WarmupCosine(optimizer, self.warmup_steps, final=0.05, total_steps=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None) -> None:
        norm = torch.nn.utils.clip_grad_norm_(self.adapter.trained_parameters(), self.clip)
        self.finite_steps.admits(self.trainer, self, norm)
        self.log("train/gradient_norm", norm)

    def configure_callbacks(self) -> list[Callback]:
        return [self.finite_steps, ResumedSettings()]

    # A checkpoint belongs to one adapter; its words are not part of the weights.

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        checkpoint["adapter"] = {**self._identity(), "tokens_seen": self.tokens_seen}
        self.finite_steps.check_saved(self.trainer, checkpoint)

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        saved = dict(checkpoint["adapter"])
        self.tokens_seen = saved.pop("tokens_seen")
        if saved != self._identity():
            raise ValueError("resume: the checkpoint is of another adapter (its model, shape or words differ)")

    def _identity(self) -> dict:
        shape = self.adapter.shape
        return {**vars(shape), "model": self.adapter.made_for, "token_ids": self.adapter.token_ids.tolist()}


class TimeBudget(Timer):
    """A timer of training, across interruptions; a limit ends training with the learning rate decayed."""

    def __init__(self, max_minutes: float | None):
        super().__init__(None if max_minutes is None else timedelta(minutes=max_minutes), verbose=False)
        self.max_seconds = None if max_minutes is None else 60 * max_minutes

    def on_train_batch_start(self, trainer: Trainer, pl_module: AdapterModule, batch, batch_idx: int) -> None:
        if self.max_seconds is None:
            return
        # The schedule counts steps: extrapolate their number from the pace so far.
        steps = trainer.global_step * self.max_seconds / max(self.time_elapsed(), 1e-3)
        limit = trainer.max_steps if trainer.max_steps > 0 else steps
        pl_module.lr_schedulers().total_steps = max(min(steps, limit), 1)


class AveragedWeights(EMAWeightAveraging):
    """EMA of the weights, which replaces them only after the last checkpoint, which must hold both.

    If training ends before averaging begins, the weights stay.
    """

    def __init__(self, decay: float, first_step: int, device: torch.device | None = None):
        """Keep the average on `device`; None: where the module is when training is set up, usually the CPU."""
        super().__init__(device, use_buffers=False, decay=decay, update_starting_at_step=first_step)

    def on_train_end(self, trainer: Trainer, pl_module: AdapterModule) -> None:
        pass

    def on_fit_end(self, trainer: Trainer, pl_module: AdapterModule) -> None:
        if self._average_model.n_averaged > 0:
            super().on_train_end(trainer, pl_module)
