"""The positions of a batch that are scored, and the tokens that they predict."""

import torch
from torch import Tensor

NOT_SCORED = -100  # a label, as in transformers


def scored_positions(input_ids: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the positions whose states predict a scored token, and those tokens.

    Args:
        input_ids: [B, S].
        labels: [B, S] aligned with input_ids as in transformers, -100 where not scored; None: all are.

    Returns:
        Indices [N] into the B*S flattened positions, and the target tokens [N].
    """
    labels = input_ids if labels is None else labels
    targets = torch.full_like(labels, NOT_SCORED)
    targets[:, :-1] = labels[:, 1:]  # the state at s predicts token s + 1; the last predicts nothing known
    targets = targets.flatten()
    positions = (targets != NOT_SCORED).nonzero().squeeze(1)
    return positions, targets[positions]


def with_scored(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a batch {"input_ids", "labels" or not} with what `scored_positions` says of it besides.

    Made where a batch is collated, so that a training step need not wait for its device to count them.
    """
    positions, tokens = scored_positions(batch["input_ids"], batch.get("labels"))
    return {**batch, "scored_positions": positions, "scored_tokens": tokens}


def scored_of(batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return the scored positions [N] and tokens [N] of a batch, found now where its collation has not."""
    batch = batch if "scored_positions" in batch else with_scored(batch)
    return batch["scored_positions"], batch["scored_tokens"]
