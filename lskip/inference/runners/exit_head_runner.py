"""Steps that decode an exit through the affine map that it has of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from lskip.inference.layers.lm_head import Bar, Likeliest
from lskip.inference.runners.base import Step

if TYPE_CHECKING:
    from lskip.models.exit_heads import ExitHeads, TrainedExits


class HeadedStep:
    """Another step, but states are decoded as those of one exit: its affine map, then the shared norm and head."""

    def __init__(self, step: Step, heads: ExitHeads, exit_layer: int):
        self.step, self.heads, self.exit_layer = step, heads, exit_layer

    def __getattr__(self, name: str):
        return getattr(self.step, name)

    def decode(self, x: Tensor) -> Tensor:
        """Exit states [..., D] -> logits [..., V]."""
        return self.step.decode(self.heads(self.exit_layer, x))

    def likeliest(self, x: Tensor, bar: Bar | None = None) -> Likeliest | None:
        """Of exit states [A, n, D], of what `bar` leaves; None: by `decode` it is as fast."""
        return self.step.likeliest(self.heads(self.exit_layer, x), bar)


def read_at(step: Step, exits: TrainedExits | None, exit_layer: int) -> Step:
    """`step` as states of `exit_layer` are to be decoded; itself where the exit has nothing of its own."""
    if exits is None or exits.heads is None or exit_layer == step.num_layers:
        return step
    return HeadedStep(step, exits.heads, exit_layer)
