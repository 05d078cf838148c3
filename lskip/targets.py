"""Targets of an exit: the text's next token, the last layer's distribution, or both."""

import torch
from torch import Tensor

from lskip.utils.checks import check_real, check_whole


class ExitTarget:
    """The loss of a row of logits. Subclass it for a target of your own.

    Attributes:
        needs_teacher: whether `loss` needs a teacher's logits; an exit's teacher is the last layer of the same pass.
    """

    needs_teacher = False

    def loss(self, logits: Tensor, labels: Tensor, teacher_logits: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return losses and their gradients for n rows, computed together, outside autograd.

        Args:
            logits: [n, V], float32 or wider; may be overwritten.
            labels: [n], the text's next tokens.
            teacher_logits: [n, V], may be overwritten; None where needs_teacher is false.

        Returns:
            losses [n] in nats, and the gradient [n, V] of each with respect to its row of logits.
        """
        raise NotImplementedError

    def checked_loss(self, logits: Tensor, labels: Tensor, teacher_logits: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return what `loss` does.

        Raises:
            ValueError: that is something else than losses [n] and gradients [n, V].
        """
        wanted = logits.shape[:1], logits.shape
        found = self.loss(logits, labels, teacher_logits)
        is_pair = isinstance(found, tuple | list) and len(found) == 2
        if not is_pair or tuple(getattr(each, "shape", None) for each in found) != wanted:
            name, shapes = type(self).__name__, [list(shape) for shape in wanted]
            raise ValueError(f"exit_target: {name}.loss must return losses {shapes[0]} and gradients {shapes[1]}")
        return found


class Labels(ExitTarget):
    """The text's next token: cross-entropy, as in the paper (section 4.2)."""

    def loss(self, logits: Tensor, labels: Tensor, teacher_logits: Tensor | None = None) -> tuple[Tensor, Tensor]:
        log_total = torch.logsumexp(logits, dim=-1)
        losses = log_total - logits.gather(1, labels[:, None]).squeeze(1)
        gradient = logits.sub_(log_total[:, None]).exp_()
        gradient[torch.arange(len(labels), device=labels.device), labels] -= 1
        return losses, gradient


class SelfDistillation(ExitTarget):
    """The last layer's distribution: T² KL(p ‖ q), p of the last layer and q of the exit at temperature T.

    The last layer gets no gradient from it. The factor T² keeps the size of the gradient (Hinton et al.,
    arXiv 1503.02531, section 2). It trains agreement with the last layer, which decides whether drafts are accepted,
    and does not pull the shared blocks towards tokens that the last layer does not expect.

    Args:
        temperature: T, above 0; above 1 the less probable tokens count more.
        top_k: only so many of the last layer's most probable tokens count one by one; all others are one outcome, with
            the sum of their probabilities. null: all tokens.

    Raises:
        ValueError: a number out of its range.
    """

    needs_teacher = True

    def __init__(self, temperature: float = 1.0, top_k: int | None = None):
        check_real("temperature", temperature, "above 0", lambda value: value > 0)
        if top_k is not None:
            check_whole("top_k", top_k, 1)
        self.temperature = temperature
        self.top_k = top_k

    def loss(self, logits: Tensor, labels: Tensor, teacher_logits: Tensor | None) -> tuple[Tensor, Tensor]:
        log_q, log_p = (_log_softmax_(part.div_(self.temperature)) for part in (logits, teacher_logits))
        whole = self.top_k is None or self.top_k >= log_q.shape[1]
        losses, gradient = _divergence(log_p, log_q) if whole else _divergence_of_top(log_p, log_q, self.top_k)
        # One factor T of the gradient goes to the inner derivative of logits / T.
        return losses * self.temperature**2, gradient.mul_(self.temperature)


class LK(ExitTarget):
    """The share of drafts that would be accepted, with p of the last layer, q of the exit and α = Σ_v min(p_v, q_v).

    α is the probability that a token drawn from q is accepted (speculative sampling), and 1 - α the total variation.
    The loss is -ln α, or with `eta` the mixture λ KL(p ‖ q) + (1 - λ)(1 - α) whose weight λ = exp(-η α) is that of each
    row and gets no gradient: KL while p and q hardly overlap, acceptance once they do. Both are from LK losses
    (Samarin et al., arXiv 2602.23881), as vllm-project/speculators' pull requests 657 and 673 and sgl-project/SpecForge
    492 state them; ours are the gradients by hand and the use for exits of the same model, in place of a draft model.
    The last layer gets no gradient from it.

    Args:
        eta: η, above 0; 3 is the paper's best, by pull request 673. null: -ln α.

    Raises:
        ValueError: eta out of its range.
    """

    needs_teacher = True

    def __init__(self, eta: float | None = 3.0):
        if eta is not None:
            check_real("eta", eta, "above 0", lambda value: value > 0)
        self.eta = eta

    def loss(self, logits: Tensor, labels: Tensor, teacher_logits: Tensor | None) -> tuple[Tensor, Tensor]:
        log_q, log_p = _log_softmax_(logits), _log_softmax_(teacher_logits)
        log_alpha, rise = _acceptance(log_p, log_q)
        if self.eta is None:
            return -log_alpha, rise.neg_()
        alpha = log_alpha.exp()
        weight = torch.exp(-self.eta * alpha)
        losses, gradient = _divergence(log_p, log_q)
        gradient.mul_(weight[:, None]).addcmul_(rise, ((weight - 1) * alpha)[:, None])
        return weight * losses - (1 - weight) * torch.expm1(log_alpha), gradient


class Anchored(ExitTarget):
    """Labels plus the KL from a teacher's distribution, so that little but the labels is learned.

    The last layer is anchored to a copy of the model as it was (`anchor_weight` of LayerSkipModule). As an exit target
    it is the mixture of Labels and SelfDistillation.

    Args:
        anchor_weight: weight of the KL, from 0 up; the labels weigh 1.
    """

    needs_teacher = True

    def __init__(self, anchor_weight: float):
        check_real("anchor_weight", anchor_weight, "from 0 up", lambda value: value >= 0)
        self.anchor_weight = anchor_weight

    def loss(self, logits: Tensor, labels: Tensor, teacher_logits: Tensor | None) -> tuple[Tensor, Tensor]:
        losses, gradient = Labels().loss(logits.clone(), labels)
        divergence, pull = _divergence(_log_softmax_(teacher_logits), _log_softmax_(logits))
        return losses + self.anchor_weight * divergence, gradient.add_(pull, alpha=self.anchor_weight)


def _log_softmax_(logits: Tensor) -> Tensor:
    return logits.sub_(logits.logsumexp(-1, keepdim=True))


def _divergence(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """Return KL(p ‖ q) [n] and its gradient q - p [n, V] by the logits of q; both inputs are overwritten."""
    p = log_p.exp()
    losses = torch.linalg.vecdot(p, log_p.sub_(log_q))
    return losses, log_q.exp_().sub_(p)


def _acceptance(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """Return ln α [n] of α = Σ_v min(p_v, q_v), and its gradient [n, V] by the logits of q.

    With M = {v: q_v < p_v} it is ([j ∈ M] - Σ_{v∈M} q_v) q_j / α. The sum over α, and q_j / α within M, are at most 1:
    they are made of logarithms, since α of distributions that hardly overlap may underflow.
    """
    below = log_q < log_p
    log_alpha = torch.minimum(log_p, log_q).logsumexp(-1)
    log_rises = log_q.masked_fill(~below, -torch.inf)
    share = (log_rises.logsumexp(-1) - log_alpha).exp()
    return log_alpha, (log_rises - log_alpha[:, None]).exp_().sub_(log_q.exp().mul_(share[:, None]))


def _divergence_of_top(log_p: Tensor, log_q: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Return KL [n] and its gradient [n, V] over p's top_k tokens and all others as one outcome; log_q is overwritten.

    The gradient of a token j outside the top_k is q_j - p_rest q_j / q_rest.
    """
    top_p, top = log_p.topk(top_k)
    top_q = log_q.gather(1, top)
    rest_p, rest_q = (values.scatter(1, top, -torch.inf).logsumexp(-1) for values in (log_p, log_q))
    losses = (top_p.exp() * (top_p - top_q)).sum(-1) + rest_p.exp() * (rest_p - rest_q)
    # By logarithms, since q_rest of a confident exit may underflow.
    share_of_rest = (log_q + (rest_p - rest_q)[:, None]).exp_()
    gradient = log_q.exp_().sub_(share_of_rest)
    return losses, gradient.scatter_(1, top, top_q.exp() - top_p.exp())
