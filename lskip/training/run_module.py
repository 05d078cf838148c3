"""The part of a LightningModule that is independent of its loss: optimizer, tokenizer, checkpoints."""

import math
from typing import Any

from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.utilities import rank_zero_warn
from torch.optim.lr_scheduler import LRScheduler
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lskip.data.tokenizer import same_tokens
from lskip.flops import Work
from lskip.low_rank import LowRank
from lskip.models.checkpoint import pack_model, random_state, random_states, restore_random_state
from lskip.models.decoder import Decoder
from lskip.optimization import WarmupCosine, clip_gradients, gradient_norm, parameter_groups
from lskip.training.batch_checks import check_batch
from lskip.training.checkpoint_file import use_whole_files
from lskip.training.finite_steps import FiniteSteps
from lskip.training.layer_vector import LayerVector
from lskip.training.optimizer_making import (
    LRSchedulerCallable,
    OptimizerCallable,
    make_optimizer,
    make_schedule,
    try_step,
)
from lskip.training.resumed_settings import ResumedSettings, rows_of
from lskip.training.training_log import TrainingLog
from lskip.utils.checks import check_real


class RunModule(LightningModule):
    """Base class of LayerSkipModule: optimizer, tokenizer and checkpoints of a run.

    Args:
        optimizer, lr_scheduler, not_finite, peak_flops: as in LayerSkipModule.

    Attributes:
        settings: of the run, in plain values, which its checkpoints keep; None: not known.
        work: what training steps have computed since it was last begun anew, for their FLOPs.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    decoder: Decoder
    low_rank: LowRank | None
    drop_rates: LayerVector
    kept_scales: LayerVector
    exit_weights: LayerVector

    def __init__(
        self,
        optimizer: OptimizerCallable,
        lr_scheduler: LRSchedulerCallable | None,
        not_finite: str,
        peak_flops: float | None = None,
    ):
        super().__init__()
        if peak_flops is not None:
            check_real("peak_flops", peak_flops, "above 0", lambda value: value > 0)
        self.peak_flops = peak_flops
        self.work = Work()
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.finite_steps = FiniteSteps(not_finite)
        self.settings: dict | None = None
        self._resumed_random_state: dict | None = None
        self._has_checked = False  # a batch

    @property
    def total_steps(self) -> int | None:
        """T, the optimizer steps of the run; None where they are unbounded."""
        steps = self.trainer.estimated_stepping_batches
        # Lightning returns -1 for a stream of unknown length without max_steps.
        return None if math.isinf(steps) or steps < 0 else int(steps)

    def check_training(self, total_steps: int | None) -> None:
        """Raise ValueError where optimizer or schedule cannot be made or cannot step; needs no data.

        Args:
            total_steps: of the run; None: unknown.
        """
        optimizer = make_optimizer(self.optimizer, parameter_groups(self))
        if self.lr_scheduler is not None:
            try_step(make_schedule(self.lr_scheduler, optimizer, total_steps))

    def configure_optimizers(self):
        optimizer = make_optimizer(self.optimizer, parameter_groups(self))
        if self.lr_scheduler is None:
            return optimizer
        scheduler = make_schedule(self.lr_scheduler, optimizer, self.total_steps)
        if isinstance(scheduler, WarmupCosine) and scheduler.total_steps is None:
            scheduler.total_steps = self.total_steps
        if not self.trainer.fast_dev_run:
            _warn_of_warmup(scheduler)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None) -> None:
        self.gradient_norm = gradient_norm(self.trainer, optimizer)
        if self.finite_steps.admits(self.trainer, self, self.gradient_norm):
            clip_gradients(self.trainer, optimizer, gradient_clip_val, gradient_clip_algorithm)

    def configure_callbacks(self) -> list[Callback]:
        return [self.finite_steps, ResumedSettings(), TrainingLog()]

    def check_batch(self, batch: Any) -> None:
        """Raise ValueError for a batch that would train something else; on a GPU, which would wait, of the first."""
        if not self._has_checked or batch["input_ids"].device.type == "cpu":
            check_batch(batch, self.decoder.vocab_size)
            self._has_checked = True
        if (length := batch["input_ids"].shape[1]) > (context := self.decoder.context_length):
            raise ValueError(f"block_size: {length} tokens, the model's context holds {context}")

    def on_train_start(self) -> None:
        if self._resumed_random_state is not None:
            restore_random_state(self._resumed_random_state, self.global_rank)

    def setup(self, stage: str) -> None:
        use_whole_files(self.trainer)  # for `validate` and `test`, too
        for vector in (self.drop_rates, self.kept_scales, self.exit_weights):
            vector.reset()
        of_data = getattr(self.trainer.datamodule, "tokenizer", None)
        if not isinstance(of_data, PreTrainedTokenizerBase):
            of_data = None  # another DataModule may mean something else by the name
        self.check_tokenizer(of_data)
        if self.tokenizer is None and of_data is not None:
            self.adopt_tokenizer(of_data)

    def check_tokenizer(self, of_data: PreTrainedTokenizerBase | None) -> None:
        """Raise ValueError where the data's tokenizer is not the model's, or has more entries than the model."""
        if of_data is not None and self.tokenizer is not None:
            differing = same_tokens(of_data, self.tokenizer)
            if differing is not None:
                raise ValueError(f"data.tokenizer: {of_data.name_or_path!r} is not the model's ({differing})")
        tokenizer, size = of_data if self.tokenizer is None else self.tokenizer, self.decoder.vocab_size
        if tokenizer is not None and len(tokenizer) > size:
            raise ValueError(f"vocab_size: the model has {size}, the tokenizer {len(tokenizer)} entries")

    def adopt_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Set the data's tokenizer, and its end-of-text token, as the model's."""
        self.tokenizer = tokenizer
        self.model.config.eos_token_id = tokenizer.eos_token_id
        self.model.generation_config.eos_token_id = tokenizer.eos_token_id

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        checkpoint["lskip"] = pack_model(self.model, self.tokenizer)
        if self.low_rank is not None:
            checkpoint["lskip"]["low_rank_scale"] = self.low_rank.scale
        if self.trainer.state.fn == "fit":
            checkpoint["lskip"] |= {"rows": rows_of(self.trainer), "total_steps": self.total_steps}
        if self.settings is not None:
            checkpoint["lskip"]["settings"] = self.settings
        # Of each rank: dropout inside the model draws from streams of their own.
        checkpoint["random_state"] = random_states(checkpoint.get("random_state", random_state()))
        self.finite_steps.check_saved(self.trainer, checkpoint)

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        self._resumed_random_state = checkpoint.get("random_state")


def _warn_of_warmup(scheduler: LRScheduler) -> None:
    steps = scheduler.stage_steps if isinstance(scheduler, WarmupCosine) else None
    if steps is not None and steps <= scheduler.warmup_steps:
        of = "the run" if scheduler.stages == 1 else "a stage"
        share = steps / (scheduler.warmup_steps + 1)
        rank_zero_warn(
            f"lr_scheduler.warmup_steps: {scheduler.warmup_steps}, but {of} ends at step {steps}: the learning rate "
            f"comes to {share:.0%} of the optimizer's"
        )
