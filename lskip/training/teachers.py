"""The supervision of the exits: early ones by the exit target, the last one by the text and an optional anchor."""

from copy import deepcopy

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lskip.losses import Supervision, Teacher
from lskip.models.decoder import Decoder
from lskip.targets import Anchored, ExitTarget, Labels


class ExitSupervision:
    """Target and teacher of each exit, as `head_loss` takes them.

    Args:
        model: copied, in its present state, as the teacher of an anchor.
        exit_target: of each exit but the last.
        anchor_weight: of the last layer's KL from the present `model`; None: no anchor, and no copy of the model.

    Raises:
        ValueError: anchor_weight out of its range.
    """

    def __init__(self, model: PreTrainedModel, exit_target: ExitTarget, anchor_weight: float | None):
        self.exit_target = exit_target
        self._last_target = Labels() if anchor_weight is None else Anchored(anchor_weight)
        self._reference = None if anchor_weight is None else Reference(model)

    @property
    def needs_last_layer(self) -> bool:
        """Whether early exits need the last layer's states, even at a step that does not train it."""
        return self.exit_target.needs_teacher

    @property
    def anchored(self) -> bool:
        """Whether a frozen copy of the model teaches the last layer."""
        return self._reference is not None

    def models(self) -> list[PreTrainedModel]:
        """Return the models beside the trained one."""
        return [] if self._reference is None else [self._reference.model]

    def of_step(
        self, picked: list[Tensor | None], last_states: Tensor | None, input_ids: Tensor, positions: Tensor
    ) -> list[Supervision]:
        """Return the supervision of each exit that is on, ascending.

        Args:
            picked: for each exit, which of the N scored positions it decodes, [n]; None: all.
            last_states: [N, D], the last layer's after the final norm; None: the last exit is not on.
            input_ids: [B, S].
            positions: [N], indices of the scored positions among the B*S flattened ones.
        """
        early = picked if last_states is None else picked[:-1]
        supervision = [self._early(rows, last_states, len(positions)) for rows in early]
        if last_states is not None:
            teacher = None if self._reference is None else self._reference.teacher(input_ids, positions)
            supervision.append(Supervision(len(positions), self._last_target, teacher))
        return supervision

    def _early(self, rows: Tensor | None, last_states: Tensor | None, count: int) -> Supervision:
        if self.exit_target.needs_teacher:
            states = last_states.detach() if rows is None else last_states.detach()[rows]
            return Supervision(len(states), self.exit_target, Teacher(states))
        return Supervision(count if rows is None else len(rows), self.exit_target)


class Reference:
    """A frozen copy of the model before training, the teacher of the last layer's anchor.

    It takes one more set of weights on each device (AdamW training takes four). It is not part of the trained module,
    its optimizer or its checkpoint: a resumed run makes it again from the model that the run started from.
    """

    def __init__(self, model: PreTrainedModel):
        self.model = deepcopy(model).eval().requires_grad_(False)
        self.decoder = Decoder(self.model)

    @torch.no_grad()
    def teacher(self, input_ids: Tensor, positions: Tensor) -> Teacher:
        """Return its last layer at `positions` [N] of the flattened input_ids [B, S], after a forward pass."""
        self.model.to(input_ids.device)
        decoder = self.decoder
        x = decoder.embed(input_ids)
        inputs = decoder.block_inputs(x)
        for block in range(decoder.num_layers):
            x = decoder.block(block, x, inputs)
        states = decoder.norm(x.flatten(0, 1).index_select(0, positions))
        return Teacher(states, decoder.head_weight, decoder.head_bias)
