"""Rejection sampling of drafted tokens (Leviathan et al., arXiv 2211.17192, algorithm 1)."""

import torch
from torch import Tensor

from lskip.inference.decoding.noise import Purpose, gumbel_noise, random_source
from lskip.inference.decoding.sampling import TokenChooser
from lskip.utils.devices import to_device


class RejectionChooser:
    """Choice of one text's tokens, each an exact draw from the model's processed distribution p.

    The draft draws x from its own processed distribution q. Verification keeps x with probability min(1, p(x) / q(x))
    and, at the first refusal, draws from max(p - q, 0), normalized. Tokens that no `sample` of this round has drawn
    (an n-gram draft) count as q(x) = 1.

    The random numbers of a round depend on the seed, the position where it starts and their purpose. A position that
    is drafted again in a later round gets new ones, since a draft policy may have seen what was refused.
    """

    def __init__(self, chooser: TokenChooser):
        """Take the chooser that has the text and processes logits."""
        self.chooser = chooser
        self._sampled: list[Tensor] = []

    def sample(self, logits: Tensor, drafted: Tensor) -> Tensor:
        """Return the draft's next token [1], from logits [1, V] after the text and `drafted` [i]."""
        index = len(drafted)
        del self._sampled[index:]  # of a round that was given up
        scores = self.chooser.scores(logits, drafted)
        self._sampled.append(scores.softmax(-1))
        return (scores + self._noise(scores, Purpose.DRAFT, index)).argmax(-1)

    def verify(self, logits: Tensor, drafted: Tensor) -> tuple[Tensor, Tensor]:
        """Return the number of kept tokens [1] and the token after them [1], from logits [d+1, V] and drafted [d]."""
        p = self.chooser.scores(logits, drafted).softmax(-1)
        q = torch.cat(self._sampled) if self._sampled else one_hot(drafted, p.shape[1])
        self._sampled = []
        assert len(q) == len(drafted), "either all drafted tokens of a round come from `sample`, or none"
        source = random_source(self.chooser.seed, len(self.chooser.text), Purpose.ACCEPTANCE)
        uniforms = to_device(torch.from_numpy(source.random(len(drafted), dtype="float32")), p.device)
        accepted = accepted_prefix(p, q, drafted, uniforms)
        left = remainder(p, q, accepted)
        return accepted, (left.log() + self._noise(left, Purpose.OWN)).argmax(-1)

    def _noise(self, like: Tensor, purpose: Purpose, index: int = 0) -> Tensor:
        start = len(self.chooser.text)
        return to_device(gumbel_noise(self.chooser.seed, start, like.shape[1], purpose, index), like.device)


def one_hot(drafted: Tensor, size: int) -> Tensor:
    """Return float32 [d, size]: distributions with all probability on the drafted tokens."""
    return torch.zeros(len(drafted), size, device=drafted.device).scatter(1, drafted[:, None], 1.0)


def accepted_prefix(p: Tensor, q: Tensor, drafted: Tensor, uniforms: Tensor) -> Tensor:
    """Return the number [1] of drafted tokens before the first refusal.

    Args:
        p: [d+1, V]. q: [d, V]. drafted: [d]. uniforms: [d], in [0, 1): a token with p = 0 is always refused.
    """
    chosen = drafted[:, None]
    keeps = uniforms[:, None] * q.gather(1, chosen) < p[:-1].gather(1, chosen)
    return keeps.long().cumprod(0).sum(0)


def remainder(p: Tensor, q: Tensor, accepted: Tensor) -> Tensor:
    """Return weights [1, V] of the token after `accepted` [1] drafted ones: max(p - q, 0), or after all d of them p."""
    left = torch.cat([(p[:-1] - q).clamp(min=0), p[-1:]]).index_select(0, accepted)
    # Where p equals q, rounding can refuse a token and leave no weight to draw from.
    return torch.where(left.sum(1, keepdim=True) > 0, left, p.index_select(0, accepted))
