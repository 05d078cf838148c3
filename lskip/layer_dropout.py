"""Layer dropout (arXiv 2404.16710, section 4.1): rows out, block, rows back."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from lskip.models.decoder import BlockInputs
from lskip.utils.devices import to_device


def draw_dropped(seed: int, micro_batch: int, block: int, batch_size: int, drop_rate: float) -> Tensor:
    """Which sequences skip this block: bool [batch_size] on the CPU, true with probability `drop_rate` each.

    A pure function of its arguments: every rank draws the same, a resumed run draws what the uninterrupted one
    would have, and nobody else's random stream moves. On the CPU, so that the number of rows that are left is
    known without waiting for an accelerator.
    """
    draws = np.random.default_rng([seed, micro_batch, block]).random(batch_size)
    return torch.from_numpy(draws < drop_rate)


def run_kept_rows(
    block: Callable[[Tensor, BlockInputs], Tensor], x: Tensor, inputs: BlockInputs, dropped: Tensor
) -> Tensor:
    """x_{l+1} = x_l + M f_l(x_l), computed for the kept rows only.

    Args:
        block: (states, inputs) -> states, the residual included.
        x: [B, S, D].
        inputs: what the block receives besides; cut with the rows.
        dropped: bool [B] on the CPU, as `draw_dropped` gives it.

    Returns:
        [B, S, D]. Dropped rows are x's own. A block that no row is left for still runs one, times 0: it stays
        in the autograd graph (DDP waits for every gradient) and in sharded all-gathers.
    """
    kept = (~dropped).nonzero().squeeze(1)
    if len(kept) == len(x):
        return block(x, inputs)
    if len(kept) == 0:
        first = torch.zeros(1, dtype=torch.long, device=x.device)
        return x + 0 * block(x[:1], inputs.rows(first, len(x)))
    kept = to_device(kept, x.device)
    computed = block(x.index_select(0, kept), inputs.rows(kept, len(x)))
    return x.index_copy(0, kept, computed.to(x.dtype))
