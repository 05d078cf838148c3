"""A runner that decodes an exit through the affine map that it has of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from lskip.inference.layers.lm_head import Ban
from lskip.inference.runners.base import ModelRunner

if TYPE_CHECKING:
    from lskip.models.exit_heads import ExitHeads, TrainedExits


class ExitHeadRunner:
    """Another runner, its states decoded as those of one exit: its affine map, then the shared norm and head."""

    def __init__(self, runner: ModelRunner, heads: ExitHeads, exit_layer: int):
        self.runner, self.heads, self.exit_layer = runner, heads, exit_layer

    def __getattr__(self, name: str):
        return getattr(self.runner, name)

    def decode(self, x: Tensor) -> Tensor:
        """Return logits [..., V] of exit states [..., D]."""
        return self.runner.decode(self.heads(self.exit_layer, x))

    def argmax(self, x: Tensor, ban: Ban | None = None) -> Tensor | None:
        """Return the argmax of exit states [A, n, D], of what `ban` leaves; None: by `decode` it is as fast."""
        return self.runner.argmax(self.heads(self.exit_layer, x), ban)


def read_at(runner: ModelRunner, exits: TrainedExits | None, exit_layer: int) -> ModelRunner:
    """Return `runner` as `exit_layer`'s states are to be decoded; itself where the exit has nothing of its own."""
    if exits is None or exits.heads is None or exit_layer == runner.num_layers:
        return runner
    return ExitHeadRunner(runner, exits.heads, exit_layer)
