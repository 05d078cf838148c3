"""The early exit loss (arXiv 2404.16710, section 4.2): exit weights, and one loss over the rows of all exits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Logits alive at once: about this many elements (32 MB in float32), but never fewer rows than keep the products
# with the head efficient.
LOGITS_AT_ONCE = 2**23
MIN_ROWS = 128


def exit_scale(num_layers: int, e_scale: float) -> list[float]:
    """e(l) of the paper: e_scale times 0 + 1 + … + l; the last, (L-1) + e_scale times 0 + 1 + … + (L-2).

    e(0) is 0: the exit after the first block is never trained.
    """
    early = [e_scale * block * (block + 1) / 2 for block in range(num_layers - 1)]
    last = num_layers - 1
    # One layer alone would weigh 0; it is the only exit there is, so its normalized weight is 1.
    return [*early, last + e_scale * (last - 1) * last / 2] if num_layers > 1 else [1.0]


def exit_weights(num_layers: int, e_scale: float, on: Sequence[bool]) -> list[float]:
    """The normalized weights ẽ(t, l) = C(t, l) e(l) / Σ_i C(t, i) e(i), one a layer.

    Args:
        on: C(t, ·), one entry a layer.
    """
    weights = [e * c for e, c in zip(exit_scale(num_layers, e_scale), on, strict=True)]
    return [weight / sum(weights) for weight in weights]


def rows_at_once(vocab_size: int) -> int:
    """How many rows of logits to hold at a time."""
    return max(MIN_ROWS, LOGITS_AT_ONCE // vocab_size)


def head_loss(
    states: Tensor, head_weight: Tensor, head_bias: Tensor | None, labels: Tensor, row_weights: Tensor
) -> tuple[Tensor, Tensor]:
    """Weighted cross-entropy of rows through the shared head, without ever holding all of their logits.

    Rows go through in chunks; loss and gradients are made together in the forward pass, so that backward needs
    neither logits nor a second product with the head, and the head's gradient is summed in one buffer.
    Under autocast the products run in its dtype; softmax and sums are at least float32.

    Args:
        states: [N, D], exit states after the final norm, the rows of all exits that are on.
        head_weight: [V, D].
        head_bias: [V] or None.
        labels: [N], target ids; every row counts, so leave out what is not scored.
        row_weights: [N], the weight of each row in the sum.

    Returns:
        Σ_i row_weights_i CE_i, a scalar to differentiate, and CE [N], detached.
    """
    return _HeadLoss.apply(states, head_weight, head_bias, labels, row_weights)


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, states, head_weight, head_bias, labels, row_weights):
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
        rows = rows_at_once(len(head_weight))
        with torch.autocast(device, enabled=False):
            for start in range(0, len(states), rows):
                part = slice(start, start + rows)
                x = states[part].to(dtype)
                logits = (x @ weight.T).to(total_dtype)
                if head_bias is not None:
                    logits += head_bias
                losses[part], grad_logits = _cross_entropy(logits, labels[part], row_weights[part])
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
            None,
            None,
        )


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, without a second buffer of its size where the dtypes allow it."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    else:
        total += a @ b


def _cross_entropy(logits: Tensor, labels: Tensor, row_weights: Tensor) -> tuple[Tensor, Tensor]:
    """CE [n] of logits [n, V], and the gradient of its weighted sum; the logits are overwritten with it."""
    log_total = torch.logsumexp(logits, dim=-1)
    losses = log_total - logits.gather(1, labels[:, None]).squeeze(1)
    probabilities = logits.sub_(log_total[:, None]).exp_()
    probabilities[torch.arange(len(labels), device=labels.device), labels] -= 1
    return losses, probabilities.mul_(row_weights[:, None])
