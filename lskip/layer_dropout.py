"""Layer dropout (arXiv 2404.16710, section 4.1): a block runs only on the sequences that do not skip it."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from lskip.models.block_inputs import BlockInputs
from lskip.utils.devices import to_device


def draw_dropped(
    seed: int, micro_batch: int, block: int, batch_size: int, drop_rate: float, rank: int | None = None
) -> np.ndarray:
    """Return which sequences skip a block: bool [batch_size], true with probability `drop_rate`.

    Each device draws the same for its own rows, unless its rank is given: then each draws a pattern of its own.

    A pure function of its arguments: a resumed run draws what the uninterrupted one would have, and no global random
    stream is used. Not a tensor, since the number of kept rows must be known without waiting for an accelerator.
    """
    key = [seed, micro_batch, block, *(() if rank is None else (2, rank))]  # 1 is of the sampled positions
    return np.random.default_rng(key).random(batch_size) < drop_rate


def run_kept_rows(
    block: Callable[[Tensor, BlockInputs], Tensor],
    x: Tensor,
    inputs: BlockInputs,
    dropped: np.ndarray,
    scale: float = 1.0,
) -> Tensor:
    """Return x_{l+1} = x_l + M s f_l(x_l), with f_l computed for the kept rows only.

    Args:
        block: (states, inputs) -> states, the residual included.
        x: [B, S, D].
        inputs: the other inputs of the block; their rows are selected too.
        dropped: bool [B], from `draw_dropped`.
        scale: s; 1 in LayerSkip's equation.

    Returns:
        [B, S, D], dropped rows unchanged. Where all are dropped the block is not called: nothing is computed, and
        sharded weights are not gathered. It gets no gradient then (StepGradients).
    """
    kept = np.flatnonzero(~dropped)
    if len(kept) == 0:
        return x
    if len(kept) == len(x):
        return _scaled(x, block(x, inputs), scale)
    kept = to_device(torch.tensor(kept), x.device)
    rows = x.index_select(0, kept)
    computed = _scaled(rows, block(rows, inputs.rows(kept, len(x))), scale)
    return x.index_copy(0, kept, computed.to(x.dtype))


def _scaled(x: Tensor, computed: Tensor, scale: float) -> Tensor:
    """Return x + scale f(x), where `computed` is x + f(x)."""
    return computed if scale == 1 else x + scale * (computed - x)
