"""Layer dropout (arXiv 2404.16710, section 4.1): a block runs only on the sequences that do not skip it."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from lskip.models.decoder import BlockInputs
from lskip.utils.devices import to_device


def draw_dropped(seed: int, micro_batch: int, block: int, batch_size: int, drop_rate: float) -> Tensor:
    """Return which sequences skip a block: bool [batch_size] on the CPU, true with probability `drop_rate`.

    A pure function of its arguments: a resumed run draws what the uninterrupted one would have, and no global random
    stream is used. On the CPU, since the number of kept rows must be known without waiting for an accelerator.
    """
    draws = np.random.default_rng([seed, micro_batch, block]).random(batch_size)
    return torch.from_numpy(draws < drop_rate)


def run_kept_rows(
    block: Callable[[Tensor, BlockInputs], Tensor],
    x: Tensor,
    inputs: BlockInputs,
    dropped: Tensor | None,
    scale: float = 1.0,
) -> Tensor:
    """Return x_{l+1} = x_l + M s f_l(x_l), with f_l computed for the kept rows only.

    Args:
        block: (states, inputs) -> states, the residual included.
        x: [B, S, D].
        inputs: the other inputs of the block; their rows are selected too.
        dropped: bool [B] on the CPU, from `draw_dropped`; None: no row is.
        scale: s; 1 in LayerSkip's equation.

    Returns:
        [B, S, D], dropped rows unchanged. Where all are dropped the block is not called: nothing is computed, and
        sharded weights are not gathered. It gets no gradient then (StepGradients).
    """
    if dropped is None:
        return _scaled(x, block(x, inputs), scale)
    kept = (~dropped).nonzero().squeeze(1)
    if len(kept) == 0:
        return x
    if len(kept) == len(x):
        return _scaled(x, block(x, inputs), scale)
    kept = to_device(kept, x.device)
    rows = x.index_select(0, kept)
    computed = _scaled(rows, block(rows, inputs.rows(kept, len(x))), scale)
    return x.index_copy(0, kept, computed.to(x.dtype))


def _scaled(x: Tensor, computed: Tensor, scale: float) -> Tensor:
    """Return x + scale f(x), where `computed` is x + f(x)."""
    return computed if scale == 1 else x + scale * (computed - x)
