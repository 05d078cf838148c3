"""Sequence classification and regression on a decoder: after every block a head reads the last token's state."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, partial
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lskip.inference.exit_criteria import ExitCriterion
from lskip.models.exit_heads import closeness
from lskip.module import LayerSkipModule
from lskip.utils.checks import check_whole


@dataclass(frozen=True)
class Classification:
    """One of `num_outputs` classes, whose logits the heads give; targets are their numbers."""

    num_outputs: int
    has_probabilities: ClassVar[bool] = True

    def __post_init__(self):
        check_whole("num_outputs", self.num_outputs, 2)

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy in nats, [N]."""
        return F.cross_entropy(outputs, targets, reduction="none")

    def rightness(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """What the judge learns (BERxiT): whether the likeliest class is right, [N]."""
        return outputs.argmax(-1) == targets


@dataclass(frozen=True)
class Regression:
    """A number; targets in a unit in which an error of 1 is a large one."""

    num_outputs: ClassVar[int] = 1
    has_probabilities: ClassVar[bool] = False

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The squared error, [N]."""
        return (outputs.squeeze(-1) - targets).square()

    def rightness(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """What the judge learns (BERxiT): 1 - tanh|prediction - target|, [N]."""
        return closeness(outputs.squeeze(-1), targets)


class Answers(NamedTuple):
    """Outputs [N, num_outputs] of N texts, and the blocks that each of them ran, [N]."""

    outputs: Tensor
    depths: Tensor


class TaskModule(LayerSkipModule):
    """Trains a decoder and a linear head after each block, by the same two vectors and callbacks as a language model.

    LayerDropout, EarlyExitLoss, TwoStages (DeeBERT) and AlternatingExits (BERxiT) mean the same here. A head reads the
    state of the text's last token, which has seen all others, after the final norm. Batches are {"input_ids" [B, S],
    padded at the right, "lengths" [B], "targets" [B]}.

    Args:
        model: as in LayerSkipModule.
        task: Classification(num_outputs) or Regression().
        settings: the other arguments of LayerSkipModule. `learned_exit` trains the judge for LearnedExit.
    """

    def __init__(self, model, task: Classification | Regression, **settings):
        super().__init__(model, **settings)
        self.task = task
        decoder = self.decoder
        self.heads = nn.ModuleList(
            nn.Linear(decoder.hidden_size, task.num_outputs) for _ in range(decoder.num_layers)
        ).to(decoder.device, decoder.dtype)

    @property
    def has_exit_heads(self) -> bool:
        return True

    def read(self, exit_layer: int, states: Tensor) -> Tensor:
        """Last tokens' states [N, D] after so many blocks -> outputs [N, num_outputs]."""
        return self.heads[exit_layer - 1](self.decoder.norm(states))

    def early_exit_loss(self, batch: dict[str, Tensor], micro_batch: int) -> tuple[Tensor, Tensor]:
        """The exits' mean losses by exit_weights, with the judge's; and the loss of the last exit that is on."""
        targets, weights = batch["targets"], self.exit_weights.values
        exits = [block for block, weight in enumerate(weights) if weight > 0]
        if not exits:
            raise ValueError("exit_weights: all are 0, so that nothing is trained; set at least one")
        total, judged = 0.0, []
        for block, x in self._exit_states(batch["input_ids"], exits, micro_batch):
            states = last_states(x, batch["lengths"])
            outputs = self.read(block + 1, states)
            loss = self.task.losses(outputs, targets).mean()
            total = total + weights[block] * loss
            if self.exits is not None and self.exits.certainty is not None and block + 1 < self.decoder.num_layers:
                judged.append(self.exits.certainty.loss(states, self.task.rightness(outputs, targets)))
        return total + self._judge_loss(judged), loss.detach()

    @torch.inference_mode()
    def answer(
        self, input_ids: Tensor, lengths: Tensor, criterion: ExitCriterion | None = None, exit_layer: int | None = None
    ) -> Answers:
        """Reads each text off at the first exit that the criterion names; those that have exited leave the batch.

        Args:
            input_ids: [N, S], padded at the right.
            lengths: [N].
            criterion: None: all at exit_layer.
            exit_layer: blocks that run at most; None: all.

        Raises:
            ValueError: a criterion that this task or model cannot serve, or an exit_layer that there is not.
        """
        criterion = None if criterion is None else self._bound(criterion)
        decoder, full = self.decoder, self.decoder.num_layers if exit_layer is None else exit_layer
        decoder.block_index(full)
        x, left = decoder.embed(input_ids), torch.arange(len(input_ids), device=input_ids.device)
        inputs, before = decoder.block_inputs(x), last_states(x, lengths)
        outputs, depths = x.new_empty(len(x), self.task.num_outputs), torch.full_like(left, full)
        for depth in range(1, full + 1):
            x = decoder.block(depth - 1, x, inputs)
            after = last_states(x, lengths)
            read = cache(partial(self.read, depth, after))
            if depth == full:
                outputs[left] = read()
            elif criterion is not None and criterion.looks_at(depth):
                gone = criterion.exits(depth, before, after, read)
                outputs[left[gone]], depths[left[gone]] = read()[gone], depth
                stay = (~gone).nonzero().squeeze(1)
                if len(stay) == 0:
                    break
                inputs, x, after = inputs.rows(stay, len(x)), x[stay], after[stay]
                lengths, left = lengths[stay], left[stay]
            before = after
        return Answers(outputs, depths)

    def _bound(self, criterion: ExitCriterion) -> ExitCriterion:
        if criterion.reads_probabilities and not self.task.has_probabilities:
            name = type(criterion).__name__
            raise ValueError(f"exit_criterion: {name} reads probabilities, which a regression has none of")
        return criterion.bound(None if self.exits is None else self.exits.certainty)


def last_states(x: Tensor, lengths: Tensor) -> Tensor:
    """[N, S, D] -> [N, D], of the last token of each text."""
    return x[torch.arange(len(x), device=x.device), lengths - 1]
