"""Learning to exit (BERxiT, Xin et al., EACL 2021): a linear layer that tells whether an exit is right."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ExitCertainty(nn.Module):
    """u = sigmoid(w · h + b), one linear layer shared by all exits: how right the exit with state h is, from 0 to 1.

    h is the exit's state over its root mean square: states of a decoder grow from block to block, which would tell
    the depth alone. (BERxiT's states are normed by BERT. Its code stores 1 - u.)
    """

    def __init__(self, width: int):
        super().__init__()
        self.linear = nn.Linear(width, 1)
        nn.init.zeros_(self.linear.weight)  # at first it knows nothing: u = 0.5
        nn.init.zeros_(self.linear.bias)

    def forward(self, states: Tensor) -> Tensor:
        """[..., D], the exit's state before any norm -> u [...], at least float32."""
        normed = F.rms_norm(states.to(torch.promote_types(states.dtype, torch.float32)), states.shape[-1:])
        return F.linear(normed, self.linear.weight.to(normed), self.linear.bias.to(normed)).squeeze(-1).sigmoid()

    def loss(self, states: Tensor, targets: Tensor) -> Tensor:
        """The mean squared error of u against targets [...] in [0, 1].

        The states are not trained by it: an exit shall be right, not look as if it were. (Our choice.)
        """
        return F.mse_loss(self(states.detach()), targets.detach().to(torch.float32))


def closeness(predictions: Tensor, targets: Tensor) -> Tensor:
    """How right numbers are: 1 - tanh|prediction - target|, BERxiT's for regression; errors of 1 are large ones."""
    return 1 - (predictions - targets).abs().tanh()
