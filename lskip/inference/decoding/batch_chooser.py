"""Choice of a round's tokens in all slots of a batch."""

import torch
from torch import Tensor

from lskip.inference.decoding.engine import keep_agreeing
from lskip.inference.decoding.grammar_mask import GrammarMask
from lskip.inference.decoding.rejection import RejectionChooser
from lskip.inference.decoding.sampling import TokenChooser


class BatchChooser:
    """Choice of a round's tokens in all slots.

    Attributes:
        takes_argmax: whether the tokens are the argmax of logits after `ban`.
        rejects: whether a text's drafts are verified by rejection sampling, where equal choices say little.
        logprobs: whether a text's log probabilities are asked for.
    """

    def __init__(self, choosers: list[TokenChooser]):
        """Take one chooser a slot, in the order of the slots."""
        self.choosers = choosers
        self.takes_argmax = all(chooser.takes_argmax for chooser in choosers)
        self.rejects = any(chooser.rejection for chooser in choosers)
        self.logprobs = any(chooser.logprobs for chooser in choosers)
        self._slots = [RejectionChooser(chooser) if chooser.rejection else chooser for chooser in choosers]

    def ban(self, logits: Tensor, drafted: Tensor) -> None:
        """Ban, in place, the end tokens of texts that are too short for one. Arguments as in `verify` or `sample`."""
        for chooser, rows, ids in zip(self.choosers, logits, drafted, strict=True):
            chooser.ban(rows, ids)

    def sample(self, logits: Tensor, drafted: Tensor) -> Tensor:
        """Return the draft's next tokens [B], from its logits [B, 1, V] and the `drafted` [B, i] of this round so far.

        The logits may be written to.
        """
        if self.takes_argmax:
            return self._argmax(logits, drafted)[:, 0]
        return torch.cat([slot.sample(*rows) for slot, *rows in zip(self._slots, logits, drafted, strict=True)])

    def verify(self, logits: Tensor, drafted: Tensor) -> tuple[Tensor, Tensor]:
        """Return the number of drafted tokens [B] that are kept, and the model's own token [B] after them.

        Args:
            logits: [B, d+1, V], the model's, after the text and after each drafted token; may be written to.
            drafted: [B, d], d >= 0.
        """
        if self.takes_argmax:
            return keep_agreeing(self._argmax(logits, drafted), drafted)
        outcomes = [slot.verify(*rows) for slot, *rows in zip(self._slots, logits, drafted, strict=True)]
        accepted, own = zip(*outcomes, strict=True)
        return torch.cat(accepted), torch.cat(own)

    def choose(self, logits: Tensor, drafted: Tensor) -> Tensor:
        """Return the tokens [B, d+1] that logits [B, d+1, V] choose, with the noise of those positions; see `verify`.

        Not for rejection sampling, whose drafts have noise of their own.
        """
        if self.takes_argmax:
            return self._argmax(logits, drafted)
        return torch.stack(
            [chooser.sample(*rows) for chooser, *rows in zip(self.choosers, logits, drafted, strict=True)]
        )

    def possible(self, guesses: list[list[int]]) -> list[list[int]]:
        """Return the first tokens of each slot's guess of what follows its text, before one its grammar forbids."""
        cut = []
        for chooser, guess in zip(self.choosers, guesses, strict=True):
            for mask in chooser.by_text:
                if isinstance(mask, GrammarMask):
                    guess = mask.possible(chooser.text, guess)
            cut.append(guess)
        return cut

    def _argmax(self, logits: Tensor, drafted: Tensor) -> Tensor:
        self.ban(logits, drafted)
        return logits.argmax(-1)
