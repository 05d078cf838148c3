"""Peak memory of the loss of several exits, by lskip's head_loss and by a plain loop over the exits."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, linear

from benchmarks.memory.peak import peak_bytes
from lskip.losses import head_loss


def measure_exit_loss(
    vocabulary: int, hidden: int, exits: int, rows: int, device: torch.device, plain_loop_bytes: int
) -> dict:
    """One line of the table: bytes at the peak of loss and gradients, above states and weights.

    Args:
        rows: of each exit.
        plain_loop_bytes: the plain loop is not run where all its logits together take more.
    """
    states = torch.randn(rows * exits, hidden, device=device, requires_grad=True)
    weight = torch.randn(vocabulary, hidden, device=device).mul_(0.02).requires_grad_()
    labels = torch.randint(0, vocabulary, (rows * exits,), device=device)
    logits_bytes = rows * exits * vocabulary * states.element_size()
    plain = None
    if logits_bytes <= plain_loop_bytes:
        plain = peak_bytes(lambda: _plain_loop(states, weight, labels, exits), device)
    return {
        "vocabulary": vocabulary,
        "head_loss_bytes": peak_bytes(lambda: _head_loss(states, weight, labels), device),
        "plain_loop_bytes": plain,
        "all_logits_bytes": logits_bytes,
    }


def _head_loss(states: Tensor, weight: Tensor, labels: Tensor) -> None:
    row_weights = torch.full(labels.shape, 1 / len(labels), device=states.device)
    loss, _ = head_loss(states, weight, None, labels, row_weights)
    torch.autograd.grad(loss, (states, weight))


def _plain_loop(states: Tensor, weight: Tensor, labels: Tensor, exits: int) -> None:
    pairs = zip(states.chunk(exits), labels.chunk(exits), strict=True)
    loss = sum(cross_entropy(linear(x, weight), y) for x, y in pairs) / exits
    torch.autograd.grad(loss, (states, weight))
