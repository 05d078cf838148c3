"""Rejection sampling of drafted tokens (Leviathan et al., arXiv 2211.17192, algorithm 1)."""

from __future__ import annotations

import torch
from torch import Tensor

from lskip.inference.decoding.noise import Purpose, gumbel_noise, random_source
from lskip.inference.decoding.sampling import TokenChooser
from lskip.utils.devices import to_device


class RejectionChooser:
    """Chooses the tokens of one text, of which every one is an exact draw from the model's processed distribution.

    The draft draws x from its own processed distribution q. Verification keeps x with probability min(1, p(x) / q(x))
    and, where it refuses first, draws from max(p - q, 0), normalized. What no `sample` of this round has drawn
    (an n-gram draft) counts as q(x) = 1.

    The random numbers of a round depend on the seed, the position where it starts and their purpose. A token that is
    drafted again in a later round is drawn anew: a draft policy may look at what was refused.
    """

    def __init__(self, chooser: TokenChooser):
        """chooser: holds the text and processes logits."""
        self.chooser = chooser
        self._sampled: list[Tensor] = []

    def sample(self, logits: Tensor, drafted: Tensor) -> Tensor:
        """logits [1, V] after the text and `drafted` [i] -> the draft's next token [1]."""
        index = len(drafted)
        del self._sampled[index:]  # of a round that was given up
        scores = self.chooser.scores(logits, drafted)
        self._sampled.append(scores.softmax(-1))
        return (scores + self._noise(scores, Purpose.DRAFT, index)).argmax(-1)

    def verify(self, logits: Tensor, drafted: Tensor) -> tuple[Tensor, Tensor]:
        """logits [d+1, V], drafted [d] -> how many drafted tokens are kept [1], and the token after them [1]."""
        p = self.chooser.scores(logits, drafted).softmax(-1)
        q = torch.cat(self._sampled) if self._sampled else one_hot(drafted, p.shape[1])
        self._sampled = []
        assert len(q) == len(drafted), "a round's draft is either all proposed or not at all"
        source = random_source(self.chooser.seed, len(self.chooser.text), Purpose.ACCEPTANCE)
        uniforms = to_device(torch.from_numpy(source.random(len(drafted), dtype="float32")), p.device)
        accepted = accepted_prefix(p, q, drafted, uniforms)
        left = remainder(p, q, accepted)
        return accepted, (left.log() + self._noise(left, Purpose.OWN)).argmax(-1)

    def _noise(self, like: Tensor, purpose: Purpose, index: int = 0) -> Tensor:
        start = len(self.chooser.text)
        return to_device(gumbel_noise(self.chooser.seed, start, like.shape[1], purpose, index), like.device)


def one_hot(drafted: Tensor, size: int) -> Tensor:
    """float32 [d, size]: the distributions of a draft that could not have drawn anything else."""
    return torch.zeros(len(drafted), size, device=drafted.device).scatter(1, drafted[:, None], 1.0)


def accepted_prefix(p: Tensor, q: Tensor, drafted: Tensor, uniforms: Tensor) -> Tensor:
    """How many drafted tokens come before the first refusal [1].

    Args:
        p: [d+1, V]. q: [d, V]. drafted: [d]. uniforms: [d], in [0, 1): a token with p = 0 is always refused.
    """
    chosen = drafted[:, None]
    keeps = uniforms[:, None] * q.gather(1, chosen) < p[:-1].gather(1, chosen)
    return keeps.long().cumprod(0).sum(0)


def remainder(p: Tensor, q: Tensor, accepted: Tensor) -> Tensor:
    """Weights [1, V] of the token after `accepted` [1] drafted ones: max(p - q, 0), or p [d+1, V] after all d."""
    left = torch.cat([(p[:-1] - q).clamp(min=0), p[-1:]]).index_select(0, accepted)
    # Where p equals q, rounding can refuse a token and leave nothing to draw from.
    return torch.where(left.sum(1, keepdim=True) > 0, left, p.index_select(0, accepted))
