"""What the exits of one step learn: those before the last the exit target, the last one the text."""

from __future__ import annotations

from copy import deepcopy

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lskip.losses import Lesson, Teacher
from lskip.models.decoder import Decoder
from lskip.targets import Anchored, ExitTarget, Labels


class Lessons:
    """Makes the lessons of `head_loss`.

    Args:
        model: in the state that an anchor is to hold on to.
        exit_target: of each exit but the last.
        anchor_weight: of the last layer's KL from what `model` says now; None: no anchor, and no copy of the model.

    Raises:
        ValueError: anchor_weight out of its range.
    """

    def __init__(self, model: PreTrainedModel, exit_target: ExitTarget, anchor_weight: float | None):
        self.exit_target = exit_target
        self._last_target = Labels() if anchor_weight is None else Anchored(anchor_weight)
        self._reference = None if anchor_weight is None else Reference(model)

    @property
    def need_last_layer(self) -> bool:
        """Whether the other exits need the last layer's states, even where it does not train itself."""
        return self.exit_target.needs_teacher

    def of_step(
        self, picked: list[Tensor | None], last_states: Tensor | None, input_ids: Tensor, positions: Tensor
    ) -> list[Lesson]:
        """One for each exit that is on, ascending.

        Args:
            picked: of each exit, which of the N scored positions it decodes, [n]; None: all.
            last_states: [N, D], the last layer's after the final norm; None: it is not on, so that all exits learn the
                exit target.
            input_ids: [B, S].
            positions: [N], where in the B*S flattened positions the scored ones are.
        """
        early = picked if last_states is None else picked[:-1]
        lessons = [self._early(rows, last_states, len(positions)) for rows in early]
        if last_states is not None:
            teacher = None if self._reference is None else self._reference.teacher(input_ids, positions)
            lessons.append(Lesson(len(positions), self._last_target, teacher))
        return lessons

    def _early(self, rows: Tensor | None, last_states: Tensor | None, count: int) -> Lesson:
        if self.exit_target.needs_teacher:
            states = last_states.detach() if rows is None else last_states.detach()[rows]
            return Lesson(len(states), self.exit_target, Teacher(states))
        return Lesson(count if rows is None else len(rows), self.exit_target)


class Reference:
    """Holds the copy: one more set of weights on each device (a quarter of what AdamW training holds of them).

    It is no part of the trained module: neither optimizer nor checkpoint see it. A resumed run makes it anew from the
    model that the run started from.
    """

    def __init__(self, model: PreTrainedModel):
        self.model = deepcopy(model).eval().requires_grad_(False)
        self.decoder = Decoder(self.model)

    @torch.no_grad()
    def teacher(self, input_ids: Tensor, positions: Tensor) -> Teacher:
        """Its last layer on input_ids [B, S], at `positions` [N] of the B*S flattened ones. Costs a forward pass."""
        self.model.to(input_ids.device)
        decoder = self.decoder
        x = decoder.embed(input_ids)
        inputs = decoder.block_inputs(x)
        for block in range(decoder.num_layers):
            x = decoder.block(block, x, inputs)
        states = decoder.norm(x.flatten(0, 1).index_select(0, positions))
        return Teacher(states, decoder.head_weight, decoder.head_bias)
