"""The LightningModule that trains a decoder with a drop rate and an exit weight for each block."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torchmetrics import MeanMetric
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lskip.flops import TrainingFlops, training_flops
from lskip.layer_dropout import draw_dropped, run_kept_rows
from lskip.losses import head_loss
from lskip.low_rank import LowRank
from lskip.models.block_inputs import BlockInputs
from lskip.models.decoder import Decoder
from lskip.models.exit_heads import mean_loss, trained_exits
from lskip.models.pretrained import load_model
from lskip.models.readout import Readout, read_exits
from lskip.models.scored import scored_of
from lskip.optimization import WarmupCosine
from lskip.targets import ExitTarget, Labels
from lskip.training.exit_rows import ExitRows, sampled_positions
from lskip.training.flex_attention import check_flex_attention, use_flex_attention
from lskip.training.fsdp2 import FSDP2, shard
from lskip.training.layer_vector import LayerVector
from lskip.training.lightning_utils import waits_for_all_gradients
from lskip.training.optimizer_making import LRSchedulerCallable, OptimizerCallable
from lskip.training.run_module import RunModule
from lskip.training.step_gradients import Part, StepGradients, TookPart, settle_gradients, zero_of
from lskip.training.teachers import ExitSupervision
from lskip.utils.checks import check_real, check_whole
from lskip.utils.finite import check_finite_weights


class LayerSkipModule(RunModule):
    """Trains a transformers causal LM with two vectors of one number for each block.

    `drop_rates` holds the probability that a sequence skips a block, `exit_weights` the weight of the loss of the exit
    after it. By default all drop rates are 0 and only the last exit weighs: plain language-model training. A third
    vector, `kept_scales`, multiplies what a block adds to the sequences that keep it; it is 1 in the paper. The
    callbacks LayerDropout and EarlyExitLoss, or your own, write the vectors at the start of each step.

    Args:
        model: a run folder, a checkpoint, a local or exported folder, a hub name, a .gguf file, `smollm2`, a
            transformers config (model_type and its fields) to start from scratch, or a model already built.
        tokenizer: saved with the model. None: the one that comes with `model`, or else the data's.
        optimizer: parameters -> optimizer. Norms and biases are passed as a group without weight decay.
        lr_scheduler: optimizer -> schedule, stepped at each optimizer step; None for a constant rate.
        position_share: share of the positions at which each exit but the last is decoded, drawn anew at each
            step: an unbiased estimate of the loss at less cost. 1.0 decodes all.
        exit_target: the target of each exit but the last: Labels (the text), SelfDistillation (the last layer's
            distribution in the same pass), LK (the share of drafts that it would accept) or your own. The last layer
            learns the text.
        anchor_weight: weight, beside the text, of the last layer's KL from `model` before training. Costs a copy of
            the weights and a forward pass; null: none.
        low_rank: LowRank trains LoRA factors in the first blocks and freezes all else; null: the whole model trains.
        exit_heads: give each exit but the last an affine map of its own before the shared norm and head (DeeBERT).
        learned_exit: train an exit classifier, by which the criterion LearnedExit stops (BERxiT).
        not_finite: a step whose loss or gradient is NaN or infinite ends the run (stop) or changes nothing (skip).
        gradient_checkpointing: keep only the input of each block for backward and run the block again there: less
            memory for one more forward pass of the blocks, the same gradients.
        flex_attention: on a GPU attend by torch's flex attention, which leaves out what no document of a row sees,
            where the usual one goes by a mask of all pairs of tokens.
        seed: of layer dropout and of the sampled positions.
        peak_flops: TFLOP/s of one device, for `train/mfu`; null: that of a GPU whose data sheet is known.

    Exit heads and exit classifier that were saved with `model` are loaded, whether they are asked for or not.

    Raises:
        ValueError: a number out of its range, an unsupported model family, or a source that is not a model.
    """

    def __init__(
        self,
        model: str | dict | PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        optimizer: OptimizerCallable = partial(torch.optim.AdamW, lr=3e-4),
        lr_scheduler: LRSchedulerCallable | None = WarmupCosine,
        position_share: float = 1.0,
        exit_target: ExitTarget = Labels(),
        anchor_weight: float | None = None,
        low_rank: LowRank | None = None,
        exit_heads: bool = False,
        learned_exit: bool = False,
        not_finite: Literal["stop", "skip"] = "stop",
        gradient_checkpointing: bool = False,
        flex_attention: bool = False,
        seed: int = 0,
        peak_flops: float | None = None,
    ):
        super().__init__(optimizer, lr_scheduler, not_finite, peak_flops)
        check_real("position_share", position_share, "above 0 and at most 1", lambda value: 0 < value <= 1)
        check_whole("seed", seed, 0)
        if anchor_weight is not None:
            check_real("anchor_weight", anchor_weight, "from 0 up", lambda value: value >= 0)
        source = model
        if not isinstance(model, PreTrainedModel):
            model, own = load_model(model)
            tokenizer = own if tokenizer is None else tokenizer
        check_finite_weights(model)
        self.supervision = ExitSupervision(model, exit_target, anchor_weight)
        self.low_rank = low_rank
        if low_rank is not None:
            low_rank.apply(model)
        self.model = model.train()
        if gradient_checkpointing:
            self.model.activation_checkpointing_enable({"use_reentrant": False})
        self.flex_attention = flex_attention
        if flex_attention:
            check_flex_attention(model)
        self.decoder = Decoder(model)
        self.exits = trained_exits(source, self.decoder, exit_heads, learned_exit)
        self.tokenizer = tokenizer
        self.position_share, self.seed = position_share, seed
        layers = self.decoder.num_layers
        self.drop_rates = LayerVector("drop_rates", [0.0] * layers, most=1.0)
        self.kept_scales = LayerVector("kept_scales", [1.0] * layers)
        self.exit_weights = LayerVector("exit_weights", [0.0] * (layers - 1) + [1.0])
        self.validated_exits = [layers]  # LayerMetrics sets all of them
        self.held_out_loss = MeanMetric()
        self.took_part = TookPart()
        self.mask_rank: int | None = None  # of patterns of its own (LayerDropout)
        self._sharded_by: FSDP2 | None = None

    def configure_model(self) -> None:
        strategy = self.trainer.strategy
        if self.flex_attention:
            use_flex_attention([root.model for root in (self, *self.supervision.teachers())], strategy.root_device)
        if isinstance(strategy, FSDP2) and self._sharded_by is None:
            self._sharded_by = strategy
            for root in (self, *self.supervision.teachers()):
                shard(root, root.decoder.blocks, strategy)

    def forward(self, work: Callable[..., Any], *arguments: Any) -> Any:
        """Return `work(*arguments)`, one of this module's methods: the one call within which all its weights are whole.

        Whatever reads a parameter goes through here: sharded weights are gathered when a module is called.
        """
        return work(*arguments)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Return the early exit loss of a batch {"input_ids" [B, S], "labels" [B, S] or absent}, in nats."""
        self.check_batch(batch)
        # Not `ready`, which in a checkpoint from within a batch already includes that batch.
        micro_batch = self.trainer.fit_loop.epoch_loop.batch_progress.total.processed
        self.took_part.begin_micro_batch()
        loss, last_loss = self(self._loss_of_all_parts, batch, micro_batch)
        return loss * self._gradients.weight(self.num_scored(batch), loss, last_loss)

    def _loss_of_all_parts(self, batch: dict[str, Tensor], micro_batch: int) -> tuple[Tensor, Tensor]:
        """Return `early_exit_loss`, with gradients of zero for what took no part where devices wait for them.

        FSDP2 waits for the parts that it holds together, all but the blocks.
        """
        loss, last_loss = self.early_exit_loss(batch, micro_batch)
        sharded = self._sharded_by is not None
        if sharded or waits_for_all_gradients(self.trainer) or not loss.requires_grad:
            parts = (each for each in self.optional_parts() if not (sharded and each[0][0] == "block"))
            idle = (module for part, module in parts if part not in self.took_part.now)
            loss = loss + zero_of(each for module in idle for each in module.parameters() if each.requires_grad)
        return loss, last_loss

    def training_flops(self) -> TrainingFlops:
        """Return the FLOPs of this module's parts, as they train now."""
        teaches, anchored = self.supervision.needs_last_layer, bool(self.supervision.teachers())
        return training_flops(self.decoder, self.exits, teaches, anchored)

    def num_scored(self, batch: dict[str, Tensor]) -> int:
        """Return the number of items whose mean the loss of a batch is."""
        return len(scored_of(batch)[0])

    def optional_parts(self) -> Iterator[tuple[Part, nn.Module]]:
        """Yield the modules that a step may leave out, each with its key in the record of what took part."""
        heads = () if self.exits is None or self.exits.heads is None else self.exits.heads.maps
        yield from ((("block", block), module) for block, module in enumerate(self.decoder.blocks))
        yield from ((("exit", block), module) for block, module in enumerate(heads))
        if self.exits is not None and self.exits.classifier is not None:
            yield ("classifier", 0), self.exits.classifier

    def on_train_start(self) -> None:
        super().on_train_start()
        summed = partial(self.trainer.strategy.reduce, reduce_op="sum")
        self._gradients = StepGradients(self.trainer.world_size, self.device, lambda part: summed(part.clone()))
        self.took_part.begin_step()

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        settle_gradients(self.optional_parts(), self.took_part)
        self.took_part.begin_step()
        loss, last_loss = self._gradients.finish(self.parameters(), self.trainer.accumulate_grad_batches)
        self.log("train/loss", loss, prog_bar=True)
        if self.exit_weights.values[-1] > 0:
            self.log("train/loss_last_layer", last_loss)

    def early_exit_loss(self, batch: dict[str, Tensor], micro_batch: int) -> tuple[Tensor, Tensor]:
        """Return J = Σ_l ẽ(t, l) CE(g(x_{l+1}), y) (section 4.2), each CE a mean over the scored positions.

        An exit target or an anchor replaces CE; the loss of an exit classifier is added.

        Args:
            batch: {"input_ids" [B, S], "labels" [B, S] or absent (all are scored), -100 where not scored,
                "position_ids" [B, S] or absent (`Decoder.enter`)}.
            micro_batch: number of the batch in the run, the key of the random draws.

        Returns:
            J to differentiate, and the loss of the last exit that is on.

        Raises:
            ValueError: all exit weights are 0.
        """
        decoder, (positions, targets) = self.decoder, scored_of(batch)
        exits = [block for block, weight in enumerate(self.exit_weights.values) if weight > 0]
        if not exits:
            raise ValueError("exit_weights: all are 0, so that nothing is trained; set at least one")
        if self.supervision.needs_last_layer:
            exits = sorted({*exits, decoder.num_layers - 1})
        through = self._exit_states(batch, exits, micro_batch)
        read = [self._exit_rows(block, x, positions, targets, micro_batch) for block, x in through]
        last_states = read[-1].states if exits[-1] == decoder.num_layers - 1 else None
        total, losses = head_loss(
            torch.cat([rows.states for rows in read]),
            decoder.head_weight,
            decoder.head_bias,
            torch.cat([rows.labels for rows in read]),
            torch.cat([rows.weights for rows in read]),
            decoder.logit_softcap,
            self.supervision.of_step([rows.picked for rows in read], last_states, batch, positions),
        )
        last = losses[len(losses) - len(read[-1].labels) :]
        classifier_loss = mean_loss([rows.classifier_loss for rows in read])
        return total / max(len(positions), 1) + classifier_loss, last.sum() / max(len(last), 1)

    def _exit_rows(self, block: int, x: Tensor, positions: Tensor, targets: Tensor, micro_batch: int) -> ExitRows:
        """Return the rows to decode of the exit after `block`, whose output is x [B, S, D]."""
        share = 1.0 if block == self.decoder.num_layers - 1 else self.position_share
        picked = sampled_positions(self.seed, micro_batch, block, len(positions), share, x.device)
        rows, labels = (part if picked is None else part[picked] for part in (positions, targets))
        self.work.decode(len(rows), last=block == self.decoder.num_layers - 1)
        states, classifier_loss = x.flatten(0, 1).index_select(0, rows), None
        if self.exits is not None:
            classifier_loss = self.exits.classifier_loss(self.decoder, block + 1, states, labels)
            if self.exits.classifier is not None and block + 1 < self.decoder.num_layers:
                # Without a scored token it has no loss here, and on another device it may have one.
                self.took_part.add(("classifier", 0), in_graph=classifier_loss is not None)
            states = self.exits.translate(block + 1, states)
        weight = self.exit_weights.values[block] * len(positions) / max(len(rows), 1)
        weights = torch.full_like(rows, weight, dtype=torch.promote_types(self.decoder.dtype, torch.float32))
        return ExitRows(self.decoder.norm(states), labels, weights, picked, classifier_loss)

    def _exit_states(self, batch: dict[str, Tensor], exits: list[int], micro_batch: int):
        """Yield (block, its output [B, S, D]) for the blocks in `exits`, ascending, with layer dropout."""
        x, inputs = self.decoder.enter(batch["input_ids"], batch.get("position_ids"))
        self.work.embed(*x.shape[:2])
        for block in range(max(exits) + 1):
            rate, scale = self.drop_rates.values[block], self.kept_scales.values[block]
            dropped = draw_dropped(self.seed, micro_batch, block, len(x), rate, self.mask_rank)
            if dropped.all():
                x = self._skip(block, x, inputs)
            else:
                self.took_part.add(("block", block))
                self.work.run(block, int((~dropped).sum()), x.shape[1])
                x = run_kept_rows(partial(self.decoder.block, block), x, inputs, dropped, scale)
            if block in exits:
                self.took_part.add(("exit", block))
                yield block, x

    def _skip(self, block: int, x: Tensor, inputs: BlockInputs) -> Tensor:
        """Return x as it is, of a block that no sequence runs."""
        part = ("block", block)
        self.took_part.skip(part)
        # Another device may run it. And FSDP2 adds up each rank's own gradients of earlier micro-batches, in the last
        # one, only for a block that runs.
        pending = part in self.took_part.used and self._sharded_by is not None and self._sharded_by.syncs
        if self.mask_rank is None and not pending:
            return x
        self.took_part.add(part)
        return x + 0 * self.decoder.block(block, x[:1], inputs.rows(torch.zeros(1, dtype=torch.long), len(x)))

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> Readout:
        return self._read("val/loss", batch)

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> Readout:
        return self._read("test/loss", batch)

    def _read(self, name: str, batch: dict[str, Tensor]) -> Readout:
        self.check_batch(batch)
        ids, labels, places = batch["input_ids"], batch.get("labels"), batch.get("position_ids")
        readout = self(read_exits, self.decoder, ids, labels, self.validated_exits, self.exits, places)
        last = readout.losses[-1]
        # A mean over tokens, of all batches and devices.
        self.held_out_loss.update(last.sum() / max(len(last), 1), len(last))
        self.log(name, self.held_out_loss, on_step=False, on_epoch=True, prog_bar=True, batch_size=1)
        return readout

    @property
    def has_exit_heads(self) -> bool:
        """Whether the early exits have trainable heads."""
        return self.exits is not None and self.exits.heads is not None
