"""Memory of a training on each device, by part, at the moment when it is the most."""

from __future__ import annotations

from math import ceil, prod

import torch
from torch import nn

from lskip.module import LayerSkipModule
from lskip.planning.simulation import BACKWARD, FORWARD, STEP, Simulated

# Parts as they are printed, in this order.
PARTS = {
    "weights": "weights",
    "gradients": "gradients",
    "optimizer": "optimizer states",
    "buckets": "buckets of gradients (DDP)",
    "gathered": "gathered weights and gradients (FSDP2)",
    "anchor": "the anchor's copy",
    "casts": "weights in 16 bits (autocast)",
    "blocks": "activations of the blocks",
    "exits": "embedding, exits, head and logits",
    "workspace": "workspace of backward",
    "stepping": "workspace of the optimizer's step",
}
SINGLE, DDP, FSDP2 = "one device", "ddp", "fsdp2"
# What a process on a CPU takes for each byte of tensors, with the gaps that glibc's malloc leaves: 1.15 to 1.32 in four
# trainings (benchmarks.scale.memory).
GLIBC_GAPS = 1.2
# Blocks whole at a time under FSDP2: the one that runs, the next one and the buffer that it comes in; gradients of the
# block that ran, and the buffer that they leave in.
WHOLE_BLOCKS, WHOLE_GRADIENTS = 3, 2


def peak_memory(
    module: LayerSkipModule,
    simulated: Simulated,
    strategy: str,
    devices: int,
    kept_share: float = 1.0,
    held: float = 1.0,
) -> dict[str, float]:
    """Return the bytes of each part on one device at its peak, by the names of PARTS.

    Exact for weights, gradients and states; of activations all that the step's operators return. What the device's
    libraries take does not count, nor the gaps that an allocator leaves.

    Args:
        simulated: of this module.
        strategy: SINGLE, DDP or FSDP2.
        kept_share: of the rows that blocks run on at most, by layer dropout.
        held: times as many bytes as simulated of what a device holds: its shares, where FSDP2 gathers them in 16 bits.
    """
    sharded = strategy == FSDP2
    shares = _Shares(simulated, devices if sharded else 1, kept_share, held)
    extra = {phase: {"optimizer": simulated.states_estimated / shares.devices} for phase in (FORWARD, BACKWARD, STEP)}
    extra[FORWARD]["exits"] = simulated.workspace
    if sharded:
        extra[FORWARD]["gathered"], extra[BACKWARD]["gathered"] = _gathered(module)
    if strategy == DDP:
        buckets = sum(size for size, trains in _weights(simulated) if trains)
        for parts in extra.values():
            parts["buckets"] = buckets
    found = simulated.record.peak(extra, shares)
    return {name: found[name] for name in PARTS if found.get(name)}


class _Shares:
    """The bytes of a storage that one of several devices holds."""

    def __init__(self, simulated: Simulated, devices: int, kept_share: float, held: float):
        self.devices, self._kept_share, self._held = devices, kept_share, held
        shapes = {number: shape for number, (shape, _) in simulated.parameters.items()}
        # Gradients of several micro-batches are summed whole on each device, and shared out with the last (fsdp2.py).
        gradients = {} if simulated.accumulates else simulated.gradients
        self._shapes = {**shapes, **gradients, **simulated.states}

    def __call__(self, part: str, number: int, size: int) -> float:
        if part == "blocks":
            return size * self._kept_share
        if self.devices == 1:
            return size
        if part in ("stepping", "anchor"):  # as sharded as what it steps, or as the model
            return self._held * size / self.devices
        if part in ("weights", "gradients", "optimizer"):
            shape = self._shapes.get(number)
            return self._held * (size if shape is None else shard_bytes(shape, size, self.devices))
        return size


def shard_bytes(shape: torch.Size, size: int, devices: int) -> float:
    """Return the bytes of a device's share of a tensor, which FSDP2 cuts along its first dimension."""
    if not shape or not shape[0]:  # a number, such as the count of steps: whole everywhere
        return size
    return ceil(shape[0] / devices) * size // shape[0]


def _weights(simulated: Simulated) -> list[tuple[int, bool]]:
    sizes = simulated.record.sizes()
    return [(sizes[number], trains) for number, (_, trains) in simulated.parameters.items()]


def _gathered(module: LayerSkipModule) -> tuple[float, float]:
    """Return the bytes of what FSDP2 holds whole besides the shares: in forward, and in backward."""
    blocks = [_bytes(block) for block in module.decoder.blocks]
    largest = max(total for total, _ in blocks)
    trained = max(part for _, part in blocks)
    rest, rest_trained = (
        whole - sum(parts) for whole, parts in zip(_bytes(module), zip(*blocks, strict=True), strict=True)
    )
    weights = rest + min(WHOLE_BLOCKS, len(blocks)) * largest
    return weights, weights + rest_trained + WHOLE_GRADIENTS * trained


def _bytes(module: nn.Module) -> tuple[int, int]:
    """Return the bytes of a module's weights, and of those that train."""
    sizes = [(prod(each.shape) * each.element_size(), each.requires_grad) for each in module.parameters()]
    return sum(size for size, _ in sizes), sum(size for size, trains in sizes if trains)
