"""The early exit loss (arXiv 2404.16710, section 4.2): exit weights, and one loss over the rows of all exits."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lskip.targets import ExitTarget, Labels

# Elements of logits in memory at once (32 MB in float32; on a GPU, whose products need more rows, 256 MB), but never
# fewer rows than keep the products with the head efficient.
LOGITS_AT_ONCE, LOGITS_ON_GPU = 2**23, 2**26
MIN_ROWS = 128


def exit_scale(num_layers: int, e_scale: float) -> list[float]:
    """Return e(l) of the paper for each layer: e_scale Σ_{i≤l} i; for the last, (L-1) + e_scale Σ_{i≤L-2} i.

    e(0) is 0: the exit after the first block is never trained.
    """
    early = [e_scale * block * (block + 1) / 2 for block in range(num_layers - 1)]
    last = num_layers - 1
    # The only layer of a model would weigh 0, but its normalized weight must be 1.
    return [*early, last + e_scale * (last - 1) * last / 2] if num_layers > 1 else [1.0]


def exit_weights(num_layers: int, e_scale: float, on: Sequence[bool]) -> list[float]:
    """Return the normalized weights ẽ(t, l) = C(t, l) e(l) / Σ_i C(t, i) e(i), one for each layer.

    Args:
        on: C(t, ·), one entry for each layer.
    """
    weights = [e * c for e, c in zip(exit_scale(num_layers, e_scale), on, strict=True)]
    return [weight / sum(weights) for weight in weights]


def share_weights(shares: Mapping[int, float], on: Sequence[bool]) -> list[float]:
    """Return the weight of each layer by chosen shares of the loss (not the paper's): the last layer has the rest.

    Args:
        shares: exit layer (1-based) -> its share; an exit that is off leaves its share to the last layer.
        on: C(t, ·), one entry for each layer.
    """
    weights = [shares.get(layer, 0.0) * c for layer, c in enumerate(on[:-1], start=1)]
    return [*weights, 1 - sum(weights)]


def rows_at_once(vocab_size: int, device: torch.device) -> int:
    """Return how many rows of logits to compute at a time."""
    logits = LOGITS_AT_ONCE if device.type == "cpu" else LOGITS_ON_GPU
    return max(MIN_ROWS, logits // vocab_size)


class Teacher(NamedTuple):
    """States and head whose logits are the target of n rows; they get no gradient.

    Attributes:
        states: [n, D], after the teacher's final norm.
        head_weight: [V, D]; None: the head that is being trained, at its present weights.
        head_bias: [V] or None, with `head_weight` only.
    """

    states: Tensor
    head_weight: Tensor | None = None
    head_bias: Tensor | None = None


class Supervision(NamedTuple):
    """The target of consecutive rows.

    Attributes:
        count: number of rows.
        target: their loss.
        teacher: None where the target needs none.
    """

    count: int
    target: ExitTarget
    teacher: Teacher | None = None


def head_loss(
    states: Tensor,
    head_weight: Tensor,
    head_bias: Tensor | None,
    labels: Tensor,
    row_weights: Tensor,
    softcap: float | None = None,
    supervision: Sequence[Supervision] | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the weighted loss of rows through the shared head, computed with the logits of one chunk at a time.

    Loss and gradients are computed together in the forward pass: backward needs neither logits nor a second product
    with the head, and the head's gradient is summed in one buffer. A teacher's logits are computed in chunks too.
    Under autocast the products run in its dtype; softmax and sums are at least float32.

    Args:
        states: [N, D], exit states after the final norm, the rows of all exits that are on.
        head_weight: [V, D].
        head_bias: [V] or None.
        labels: [N], target ids; every row counts, so leave out what is not scored.
        row_weights: [N], the weight of each row in the sum.
        softcap: c, where logits are c tanh(logits / c) (Gemma, arXiv 2408.00118 section 2); a teacher's too.
        supervision: the targets of the rows in their order, N rows together; None: the labels (cross-entropy).

    Returns:
        Σ_i row_weights_i loss_i, a scalar to differentiate, and the losses [N] in nats, detached.
    """
    supervision = [Supervision(len(states), Labels())] if supervision is None else supervision
    return _HeadLoss.apply(states, head_weight, head_bias, labels, row_weights, softcap, supervision)


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, states, head_weight, head_bias, labels, row_weights, softcap, supervision):
        device = states.device.type
        autocast = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if autocast else states.dtype
        total_dtype = torch.promote_types(states.dtype, torch.float32)
        needs_states, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        weight = head_weight.to(dtype)
        losses = torch.empty(len(states), dtype=total_dtype, device=states.device)
        grad_states = torch.empty_like(states) if needs_states else None
        grad_weight = torch.zeros_like(head_weight, dtype=total_dtype) if needs_weight else None
        grad_bias = torch.zeros_like(head_bias, dtype=total_dtype) if needs_bias else None
        with torch.autocast(device, enabled=False):
            for part, target, teacher in _chunks(supervision, rows_at_once(len(head_weight), states.device)):
                x = states[part].to(dtype)
                logits = _logits(x, weight, head_bias, total_dtype)
                slope = None if softcap is None else _cap(logits, softcap)
                teacher_logits = _teacher_logits(teacher, weight, head_bias, softcap, total_dtype)
                losses[part], grad_logits = target.checked_loss(logits, labels[part], teacher_logits)
                grad_logits.mul_(row_weights[part, None])
                if slope is not None:
                    grad_logits.mul_(slope)
                if needs_bias:
                    grad_bias += grad_logits.sum(0)
                grad_logits = grad_logits.to(dtype)
                if needs_states:
                    grad_states[part] = grad_logits @ weight
                if needs_weight:
                    _add_product(grad_weight, grad_logits.T, x)
        ctx.save_for_backward(grad_states, grad_weight, grad_bias)
        ctx.dtypes = head_weight.dtype, None if head_bias is None else head_bias.dtype
        ctx.mark_non_differentiable(losses)
        return (losses * row_weights).sum(), losses

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, _):
        grad_states, grad_weight, grad_bias = ctx.saved_tensors
        weight_dtype, bias_dtype = ctx.dtypes
        return (
            None if grad_states is None else grad_states * grad.to(grad_states.dtype),
            None if grad_weight is None else (grad_weight * grad).to(weight_dtype),
            None if grad_bias is None else (grad_bias * grad).to(bias_dtype),
            *[None] * 4,
        )


def _chunks(supervision: Sequence[Supervision], rows: int):
    """Yield (slice of at most `rows` rows, their target, the teacher of these rows or None)."""
    begin = 0
    for count, target, teacher in supervision:
        for start in range(0, count, rows):
            stop = min(start + rows, count)
            part = None if teacher is None else teacher._replace(states=teacher.states[start:stop])
            yield slice(begin + start, begin + stop), target, part
        begin += count


def _logits(states: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return states @ weight.T + bias, computed in the weight's dtype, as `dtype`."""
    logits = (states.to(weight.dtype) @ weight.T).to(dtype)
    return logits if bias is None else logits.add_(bias)


def _teacher_logits(
    teacher: Teacher | None, weight: Tensor, bias: Tensor | None, softcap: float | None, dtype: torch.dtype
) -> Tensor | None:
    """Return the teacher's logits; `weight` and `bias` are of the head that is being trained."""
    if teacher is None:
        return None
    own_head = (weight, bias) if teacher.head_weight is None else teacher[1:]
    logits = _logits(teacher.states, *own_head, dtype)
    if softcap is not None:
        _cap(logits, softcap)
    return logits


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add a @ b to `total`, without a second buffer of its size where the dtypes allow it."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    else:
        total += a @ b


def _cap(logits: Tensor, softcap: float) -> Tensor:
    """Replace logits by c tanh(logits / c), in place, and return the derivative 1 - tanh²."""
    slope = logits.div_(softcap).tanh_().square().neg_().add_(1)
    logits.mul_(softcap)
    return slope
