"""Gradients of an optimizer step over micro-batches and devices with unequal numbers of scored tokens."""

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

Part = tuple[str, int]


class StepGradients:
    """Sums that make the gradients of a step those of the mean over all of its scored tokens, on all devices.

    Lightning adds the gradients of A micro-batches, each divided by A, and takes the mean of W devices: such a mean of
    means would weight tokens of short micro-batches more. What the others have is unknown while a loss is
    differentiated. So each loss is weighted by its tokens relative to a reference, and the gradients are scaled once,
    before the optimizer's step. On one device the reference is the first micro-batch's count, so that with equal
    micro-batches both factors are exactly 1. On several it is a power of two, which all have and which changes no bit.

    Args:
        world_size: W.
        device: of the sums.
        all_reduce: (tensor) -> its sum over the devices; not called with one.
    """

    def __init__(self, world_size: int, device: torch.device, all_reduce: Callable[[Tensor], Tensor]):
        self.world_size = world_size
        self._all_reduce = all_reduce
        self._zeros = torch.zeros(3, dtype=torch.float32, device=device)
        self._begin()
        self._shared: float | None = None

    def _begin(self) -> None:
        self._counts: list[int] = []
        self._sums = self._zeros.clone()  # of this device: scored tokens, and the sums of both losses

    def weight(self, scored: int, loss: Tensor, last_loss: Tensor) -> float:
        """Return the factor of a micro-batch's loss, which is a mean over its `scored` tokens.

        Args:
            loss, last_loss: means over the micro-batch's tokens; their means over the step come of `finish`.
        """
        self._counts.append(scored)
        means = torch.stack([torch.ones_like(loss), loss, last_loss]).detach()
        self._sums = torch.addcmul(self._sums, means.to(self._sums.dtype), torch.full_like(self._sums, scored))
        return scored / self._reference

    @property
    def _reference(self) -> float:
        if self.world_size == 1:
            return max(self._counts[0], 1)
        if self._shared is None:  # once a run: the one time that a step waits for it
            total = self._all_reduce(self._zeros[0] + self._counts[0]).item()
            self._shared = 2.0 ** round(math.log2(max(total / self.world_size, 1)))
        return self._shared

    def finish(self, parameters: Iterable[Tensor], accumulate_grad_batches: int) -> tuple[Tensor, Tensor]:
        """Scale the step's gradients, in place, and return its mean losses (`loss`, `last_loss`), the same everywhere.

        Args:
            accumulate_grad_batches: A, by which every loss was divided; an epoch's last step may have fewer.
        """
        reference = self._reference
        if self.world_size == 1:
            factor, sums = accumulate_grad_batches * reference / max(sum(self._counts), 1), self._sums
        else:
            sums = self._all_reduce(self._sums)
            factor = self.world_size * accumulate_grad_batches * reference / sums[0].clamp(min=1)
        gradients = [local(parameter.grad) for parameter in parameters if parameter.grad is not None]
        if gradients and (self.world_size > 1 or factor != 1):
            torch._foreach_mul_(gradients, factor)
        loss, last_loss = sums[1:] / sums[0].clamp(min=1)
        self._begin()
        return loss, last_loss


class TookPart:
    """Record of the parts of a module (blocks, exits, the classifier) that a step used, by a key for each.

    Attributes:
        now: those in this micro-batch's graph.
        used, skipped: used by the step so far on any device, and passed over by layer dropout in a micro-batch of it.
    """

    def __init__(self) -> None:
        self.begin_step()

    def begin_step(self) -> None:
        self.now: set[Part] = set()
        self.used: set[Part] = set()
        self.skipped: set[Part] = set()

    def begin_micro_batch(self) -> None:
        self.now = set()

    def add(self, part: Part, in_graph: bool = True) -> None:
        self.used.add(part)
        if in_graph:
            self.now.add(part)

    def skip(self, part: Part) -> None:
        self.skipped.add(part)


def local(tensor: Tensor) -> Tensor:
    """Return this device's part of a sharded tensor; another as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def zero_of(parameters: Iterable[Tensor]) -> Tensor | float:
    """Return 0, which gives the parameters gradients of zero in backward."""
    return sum(0 * parameter.flatten()[0] for parameter in parameters)


def settle_gradients(parts: Iterable[tuple[Part, nn.Module]], took_part: TookPart) -> None:
    """Give a step's gradients to parts that it left out: zeros to blocks that layer dropout skipped, none to others.

    Layer dropout drops what a block adds, not its weight decay and momentum. DDP made gradients of zero for all.
    """
    for part, module in parts:
        for parameter in () if part in took_part.used else module.parameters():
            if part not in took_part.skipped:
                parameter.grad = None
            elif parameter.requires_grad and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
