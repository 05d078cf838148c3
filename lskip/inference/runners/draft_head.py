"""A head over few tokens, for drafts: some rows of the model's own (FR-Spec, arXiv 2502.14856)."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from lskip.inference.layers.linear import Layout, Plain, pack
from lskip.inference.layers.lm_head import Ban
from lskip.inference.layers.quantized import choose_draft_layouts
from lskip.inference.runners.base import ModelRunner
from lskip.models.decoder import Decoder, capped


class DraftHead:
    """Rows of the model's head for some tokens, rounded to int8 where that works: they only draft.

    Attributes:
        token_ids: [W], ascending.
        vocab_size: V.
    """

    def __init__(self, decoder: Decoder, token_ids: Collection[int], batch_size: int = 1):
        """Copy the rows.

        Args:
            token_ids: at least one.
            batch_size: texts that are decoded together.

        Raises:
            ValueError: an id that is not in the vocabulary.
        """
        self.vocab_size = decoder.vocab_size
        for token in token_ids:
            if not 0 <= token < self.vocab_size:
                raise ValueError(f"draft_tokens: {token} is not a token from 0 to {self.vocab_size - 1}")
        self.token_ids = torch.tensor(sorted(set(token_ids)), device=decoder.device)
        weight, bias = decoder.head_weight.detach()[self.token_ids], decoder.head_bias
        layouts = rounded_layouts([weight], batch_size)
        self.matrix = pack(layouts, weight, None if bias is None else bias.detach()[self.token_ids])
        self.dtype = layouts[0].inner_dtype or weight.dtype
        self.softcap = decoder.logit_softcap

    def __call__(self, x: Tensor) -> Tensor:
        """Return logits [..., W] of normed states [..., D], in their type."""
        logits = self.matrix(x.flatten(0, -2).to(self.dtype)).to(x.dtype).view(*x.shape[:-1], -1)
        return capped(logits, self.softcap)

    @property
    def nbytes(self) -> int:
        """Bytes of its rows."""
        return self.matrix.nbytes


class DraftHeadRunner:
    """Another runner, its states decoded to the tokens of a DraftHead alone."""

    def __init__(self, runner: ModelRunner, head: DraftHead):
        self.runner, self.head = runner, head

    def __getattr__(self, name: str):
        return getattr(self.runner, name)

    def decode(self, x: Tensor) -> Tensor:
        """Return logits [..., V] of exit states [..., D]: -inf for tokens that the head lacks."""
        return spread(self.head(self.runner.norm(x)), self.head.token_ids, self.head.vocab_size)

    def argmax(self, x: Tensor, ban: Ban | None = None) -> Tensor:
        """Return the argmax of exit states [A, n, D] among the head's tokens, of what `ban` leaves."""
        logits, ids = self.head(self.runner.norm(x)), self.head.token_ids
        if ban is not None:
            banned = logits.new_zeros(*x.shape[:-1], self.head.vocab_size)
            ban(banned)
            logits = logits + banned.index_select(-1, ids)
        return ids[logits.argmax(-1)]


def rounded_layouts(samples: list[Tensor], batch_size: int) -> list[Layout]:
    """Return the layouts of weights that only draft: int8 where that works here, else plain."""
    try:
        return choose_draft_layouts("int8", samples, batch_size)
    except ValueError:  # this machine has no such kernels, or not for these matrices
        return [Plain]


def spread(logits: Tensor, token_ids: Tensor, vocab_size: int) -> Tensor:
    """Return logits [..., V] of those of some tokens, [..., W]: -inf for all others."""
    everywhere = logits.new_full((*logits.shape[:-1], vocab_size), float("-inf"))
    return everywhere.index_copy_(-1, token_ids, logits)
