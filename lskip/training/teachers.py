"""The supervision of the exits: early ones by the exit target, the last one by the text and an optional anchor."""

from collections.abc import Mapping
from copy import deepcopy

import torch
from torch import Tensor, nn
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
        self.reference = None if anchor_weight is None else Reference(model)

    @property
    def needs_last_layer(self) -> bool:
        """Whether early exits need the last layer's states, even at a step that does not train it."""
        return self.exit_target.needs_teacher

    def teachers(self) -> list["Reference"]:
        """Return the frozen models beside the trained one."""
        return [] if self.reference is None else [self.reference]

    def of_step(
        self,
        picked: list[Tensor | None],
        last_states: Tensor | None,
        batch: Mapping[str, Tensor],
        positions: Tensor,
    ) -> list[Supervision]:
        """Return the supervision of each exit that is on, ascending.

        Args:
            picked: for each exit, which of the N scored positions it decodes, [n]; None: all.
            last_states: [N, D], the last layer's after the final norm; None: the last exit is not on.
            batch: {"input_ids" [B, S], "position_ids" or not}.
            positions: [N], indices of the scored positions among the B*S flattened ones.
        """
        early = picked if last_states is None else picked[:-1]
        supervision = [self._early(rows, last_states, len(positions)) for rows in early]
        if last_states is not None:
            teacher = None if self.reference is None else self.reference(batch, positions)
            supervision.append(Supervision(len(positions), self._last_target, teacher))
        return supervision

    def _early(self, rows: Tensor | None, last_states: Tensor | None, count: int) -> Supervision:
        if self.exit_target.needs_teacher:
            states = last_states.detach() if rows is None else last_states.detach()[rows]
            return Supervision(len(states), self.exit_target, Teacher(states))
        return Supervision(count if rows is None else len(rows), self.exit_target)


class Reference(nn.Module):
    """A frozen copy of the model before training, the teacher of the last layer's anchor.

    It takes one more set of weights on each device (AdamW training takes four), or under FSDP2 a share of one. It is
    not part of the trained module, its optimizer or its checkpoint: a resumed run makes it again from the model that
    the run started from.
    """

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = deepcopy(model).eval().requires_grad_(False)
        self.decoder = Decoder(self.model)

    @torch.no_grad()
    def forward(self, batch: Mapping[str, Tensor], positions: Tensor) -> Teacher:
        """Return its last layer, after a forward pass, at `positions` [N] of the flattened input_ids [B, S]."""
        self.model.to(positions.device)
        decoder = self.decoder
        x, inputs = decoder.enter(batch["input_ids"], batch.get("position_ids"))
        for block in range(decoder.num_layers):
            x = decoder.block(block, x, inputs)
        states = decoder.norm(x.flatten(0, 1).index_select(0, positions))
        return Teacher(states, decoder.head_weight, decoder.head_bias)
