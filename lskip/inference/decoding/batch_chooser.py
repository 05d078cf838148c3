"""Choosing the tokens of a round in all slots of a batch."""

from __future__ import annotations

import torch
from torch import Tensor

from lskip.inference.decoding.engine import keep_agreeing
from lskip.inference.decoding.rejection import RejectionChooser
from lskip.inference.decoding.sampling import TokenChooser


class BatchChooser:
    """Chooses the tokens of a round in all lanes.

    Attributes:
        takes_likeliest: whether what is chosen is the argmax of logits, after `bar`.
    """

    def __init__(self, choosers: list[TokenChooser]):
        """choosers: one a lane, in the order of the lanes."""
        self.choosers = choosers
        self.takes_likeliest = all(chooser.takes_likeliest for chooser in choosers)
        self._lanes = [RejectionChooser(chooser) if chooser.rejection else chooser for chooser in choosers]

    def bar(self, logits: Tensor, drafted: Tensor) -> None:
        """Bars the end tokens of texts that are too short for one, in place. Arguments as in `settle` or `propose`."""
        for chooser, rows, ids in zip(self.choosers, logits, drafted, strict=True):
            chooser.bar(rows, ids)

    def propose(self, logits: Tensor, drafted: Tensor) -> Tensor:
        """The draft's next tokens [B], from its logits [B, 1, V] and the `drafted` [B, i] of this round so far.

        The logits may be written to.
        """
        if self.takes_likeliest:
            return self._likeliest(logits, drafted)[:, 0]
        return torch.cat([lane.propose(*rows) for lane, *rows in zip(self._lanes, logits, drafted, strict=True)])

    def settle(self, logits: Tensor, drafted: Tensor) -> tuple[Tensor, Tensor]:
        """What a verification brings.

        Args:
            logits: [B, d+1, V], the model's, after the text and after each drafted token; may be written to.
            drafted: [B, d], d >= 0.

        Returns:
            [B]: how many drafted tokens are kept; [B]: the model's own token after them.
        """
        if self.takes_likeliest:
            return keep_agreeing(self._likeliest(logits, drafted), drafted)
        outcomes = [lane.settle(*rows) for lane, *rows in zip(self._lanes, logits, drafted, strict=True)]
        accepted, own = zip(*outcomes, strict=True)
        return torch.cat(accepted), torch.cat(own)

    def _likeliest(self, logits: Tensor, drafted: Tensor) -> Tensor:
        """One argmax for all lanes."""
        self.bar(logits, drafted)
        return logits.argmax(-1)
