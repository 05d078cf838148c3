"""The initial weights of an exit adapter's join, fitted by ridge regression."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lskip.adapters.answers import AnswerRow
from lskip.adapters.unroll import one_later
from lskip.models.decoder import Decoder
from lskip.models.exit_adapter import ExitAdapter, side_by_side

ANSWERS = 128  # to fit on: at least so many if there are, and fewer than twice as many
RIDGE = 0.05  # relative to the mean square of an input, about 1


@torch.inference_mode()
def fit_join(adapter: ExitAdapter, model: PreTrainedModel, rows: Sequence[AnswerRow]) -> None:
    """Set the join to the ridge regression from its inputs to the inputs that the copied blocks have in the model.

    The adapter's blocks are copies of the model's last ones, whose inputs differ from an early exit's states in size
    and direction. With a fitted join the adapter predicts part of what the last layer does before any training.

    Args:
        adapter: untrained.
        model: the frozen model.
        rows: answers to fit on.
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
    """Yield for each answer the join's inputs [N, in] and targets [N, D] at its N scored positions, in float64."""
    decoder, shape = Decoder(model), adapter.shape
    for row in rows:
        x = decoder.embed(torch.tensor([row.token_ids], device=decoder.device))
        inputs = decoder.block_inputs(x)
        before = [x]  # the input of each block, and the last one's output
        for block in range(decoder.num_layers):
            before.append(decoder.block(block, before[-1], inputs))
        exit_states, wanted = before[shape.exit_layer], before[decoder.num_layers - shape.num_blocks]
        previous = one_later(decoder.norm(before[-1])) if shape.joins_last_state else None
        scored = slice(row.prompt_length - 1, len(row.token_ids) - 1)
        parts = side_by_side(exit_states, previous)[0, scored], wanted[0, scored]
        yield tuple(part.to("cpu", torch.float64) for part in parts)
