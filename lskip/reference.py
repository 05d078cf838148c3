"""A frozen copy of a model as it was before training: what its last layer must not drift away from."""

from __future__ import annotations

from copy import deepcopy

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lskip.decoder import Decoder
from lskip.losses import Teacher


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
