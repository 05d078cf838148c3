"""Where an exit adapter's training begins: its join gives its blocks what they know, as well as a linear map can."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lskip.adapters.answers import AnswerRow
from lskip.adapters.unroll import one_later
from lskip.models.decoder import Decoder
from lskip.models.exit_adapter import ExitAdapter, side_by_side

ANSWERS = 128  # that it is fitted on: so many if there are, and less than twice as many
RIDGE = 0.05  # against an input's mean square, which is about 1


@torch.inference_mode()
def fit_join(adapter: ExitAdapter, model: PreTrainedModel, rows: Sequence[AnswerRow]) -> None:
    """Sets the join to the ridge regression, on what is joined, of the states that the copied blocks take in the model.

    The adapter's blocks are copies of the model's last ones. Those get states of another size and other directions than
    an early exit's; given what they are used to, they say at once some of what the last layer says.

    Args:
        adapter: at its beginning.
        model: the frozen model.
        rows: answers to train on.
    """
    size, width = adapter.join.in_features + 1, adapter.join.out_features
    gram, product = torch.zeros(size, size, dtype=torch.float64), torch.zeros(size, width, dtype=torch.float64)
    count = 0
    for joined, wanted in _regression(adapter, model, rows[:: max(1, len(rows) // ANSWERS)]):
        joined = torch.cat([joined, joined.new_ones(len(joined), 1)], 1)  # the last column is the bias's
        gram += joined.T @ joined
        product += joined.T @ wanted
        count += len(joined)
    solved = torch.linalg.solve(gram + RIDGE * count * torch.eye(size, dtype=torch.float64), product)
    adapter.join.weight.copy_(solved[:-1].T)
    adapter.join.bias.copy_(solved[-1])


def _regression(
    adapter: ExitAdapter, model: PreTrainedModel, rows: Sequence[AnswerRow]
) -> Iterator[tuple[Tensor, Tensor]]:
    """For each answer, at its scored positions, what the join gets [N, in] and should give [N, D], in float64."""
    decoder, shape = Decoder(model), adapter.shape
    for row in rows:
        x = decoder.embed(torch.tensor([row.token_ids], device=decoder.device))
        inputs = decoder.block_inputs(x)
        before = [x]  # each block's input, and what the last one makes
        for block in range(decoder.num_layers):
            before.append(decoder.block(block, before[-1], inputs))
        exit_states, wanted = before[shape.exit_layer], before[decoder.num_layers - shape.num_blocks]
        previous = one_later(decoder.norm(before[-1])) if shape.joins_last_state else None
        scored = slice(row.prompt_length - 1, len(row.token_ids) - 1)
        parts = side_by_side(exit_states, previous)[0, scored], wanted[0, scored]
        yield tuple(part.to("cpu", torch.float64) for part in parts)
