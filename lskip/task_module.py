"""The LightningModule for sequence classification and regression, with a head after every block."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, partial
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lskip.inference.exit_criteria import ExitCriterion
from lskip.models.exit_heads import ExitClassifier, closeness, mean_loss
from lskip.module import LayerSkipModule
from lskip.utils.checks import check_whole


@dataclass(frozen=True)
class Classification:
    """Classification into `num_outputs` classes; heads return logits, targets are class numbers."""

    num_outputs: int
    has_probabilities: ClassVar[bool] = True

    def __post_init__(self):
        check_whole("num_outputs", self.num_outputs, 2)

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the cross-entropy in nats, [N]."""
        return F.cross_entropy(outputs, targets, reduction="none")

    def rightness(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the exit classifier's target (BERxiT): whether the argmax class is right, [N]."""
        return outputs.argmax(-1) == targets


@dataclass(frozen=True)
class Regression:
    """Regression of one number; scale targets so that an error of 1 is large."""

    num_outputs: ClassVar[int] = 1
    has_probabilities: ClassVar[bool] = False

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the squared error, [N]."""
        return (outputs.squeeze(-1) - targets).square()

    def rightness(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the exit classifier's target (BERxiT): 1 - tanh|prediction - target|, [N]."""
        return closeness(outputs.squeeze(-1), targets)


class Answers(NamedTuple):
    """Outputs [N, num_outputs] of N texts, and how many blocks each ran, [N]."""

    outputs: Tensor
    depths: Tensor


class TaskModule(LayerSkipModule):
    """Trains a decoder and a linear head after each block, with the same vectors and callbacks as LayerSkipModule.

    A head reads the state of the text's last token, which attends to all others, after the final norm. Batches are
    {"input_ids" [B, S], padded at the right, "lengths" [B], "targets" [B]}.

    Args:
        model: as in LayerSkipModule.
        task: Classification(num_outputs) or Regression().
        settings: the other arguments of LayerSkipModule.
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

    @property
    def classifier(self) -> ExitClassifier | None:
        """The exit classifier, if there is one."""
        return None if self.exits is None else self.exits.classifier

    def read(self, exit_layer: int, states: Tensor) -> Tensor:
        """Return the outputs [N, num_outputs] of an exit for the last tokens' states [N, D]."""
        return self.heads[exit_layer - 1](self.decoder.norm(states))

    def num_scored(self, batch: dict[str, Tensor]) -> int:
        return len(batch["targets"])

    def optional_parts(self) -> Iterator[tuple[tuple[str, int], nn.Module]]:
        for (kind, block), module in super().optional_parts():
            yield ("map" if kind == "exit" else kind, block), module  # maps of text's exits are not used
        for block, module in enumerate(self.heads):
            yield ("exit", block), module

    def early_exit_loss(self, batch: dict[str, Tensor], micro_batch: int) -> tuple[Tensor, Tensor]:
        """Return the weighted loss of the exits and the classifier, and the loss of the last exit that is on."""
        targets, weights = batch["targets"], self.exit_weights.values
        exits = [block for block, weight in enumerate(weights) if weight > 0]
        if not exits:
            raise ValueError("exit_weights: all are 0, so that nothing is trained; set at least one")
        total, classifier_losses = 0.0, []
        for block, x in self._exit_states(batch, exits, micro_batch):
            states = last_states(x, batch["lengths"])
            outputs = self.read(block + 1, states)
            loss = self.task.losses(outputs, targets).mean()
            total = total + weights[block] * loss
            if self.classifier is not None and block + 1 < self.decoder.num_layers:
                self.took_part.add(("classifier", 0))
                classifier_losses.append(self.classifier.loss(states, self.task.rightness(outputs, targets)))
        return total + mean_loss(classifier_losses), loss.detach()

    @torch.inference_mode()
    def answer(
        self, input_ids: Tensor, lengths: Tensor, criterion: ExitCriterion | None = None, exit_layer: int | None = None
    ) -> Answers:
        """Return the answer to each text at the first exit where the criterion holds; texts that exit leave the batch.

        Args:
            input_ids: [N, S], padded at the right.
            lengths: [N].
            criterion: None: all exit at exit_layer.
            exit_layer: the most blocks to run; None: all.

        Raises:
            ValueError: the criterion does not fit this task or model, or the model has no such exit_layer.
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
        return criterion.bound(self.classifier)


def last_states(x: Tensor, lengths: Tensor) -> Tensor:
    """Return the state [N, D] of the last token of each text, for states [N, S, D]."""
    return x[torch.arange(len(x), device=x.device), lengths - 1]
