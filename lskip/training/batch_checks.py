"""Checks of the batches that a user's own DataModule may send."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lskip.models.scored import NOT_SCORED


def check_batch(batch: Any, vocab_size: int) -> None:
    """Raise ValueError, naming the key and what is allowed, for a batch that would train something else, or fail late.

    Args:
        batch: {"input_ids" [B, S], "labels" [B, S] or absent, …} of a user's own DataModule.
        vocab_size: of the model.
    """
    ids = batch.get("input_ids") if isinstance(batch, Mapping) else None
    if not isinstance(ids, Tensor):
        raise ValueError(f"data: a batch is a {type(batch).__name__} without input_ids, not a mapping that has them")
    _check_tokens("input_ids", ids, vocab_size)
    if not ids.numel():
        advice = "with nothing to learn from, send a row with labels of -100"  # other devices wait for its blocks
        raise ValueError(f"input_ids: a batch has them of shape {list(ids.shape)}; {advice}")
    labels = batch.get("labels")
    if labels is not None:
        _check_tokens("labels", labels, vocab_size, NOT_SCORED)
        if labels.shape != ids.shape:
            shapes = f"{list(labels.shape)}, and input_ids of {list(ids.shape)}"
            raise ValueError(f"labels: a batch has them of shape {shapes}; they are aligned, as in transformers")
    mask, positions = batch.get("attention_mask"), batch.get("position_ids")
    if mask is not None and bool((mask[:, 1:] > mask[:, :-1]).any()):
        raise ValueError("attention_mask: a row has padding before its text; pad at the right")
    if positions is not None:
        _check_positions(positions, ids)


def _check_positions(positions: Any, ids: Tensor) -> None:
    if not isinstance(positions, Tensor) or positions.shape not in (ids.shape, (1, ids.shape[1])):
        found = list(positions.shape) if isinstance(positions, Tensor) else type(positions).__name__
        raise ValueError(f"position_ids: a batch has them as {found}, and input_ids of {list(ids.shape)}")
    goes_on = positions[:, 1:] == positions[:, :-1] + 1
    if not bool((goes_on | (positions[:, 1:] == 0)).all() and (positions[:, 0] == 0).all()):
        raise ValueError("position_ids: a row's positions are not 0, 1, 2 …, from 0 again where a document begins")


def _check_tokens(name: str, tokens: Any, vocab_size: int, also: int | None = None) -> None:
    if not isinstance(tokens, Tensor) or tokens.dim() != 2 or tokens.dtype != torch.long:
        found = f"{list(tokens.shape)} of {tokens.dtype}" if isinstance(tokens, Tensor) else type(tokens).__name__
        raise ValueError(f"{name}: a batch has them as {found}, not as [B, S] of torch.int64")
    wrong = tokens[(tokens < 0) | (tokens >= vocab_size)]
    wrong = wrong if also is None else wrong[wrong != also]
    if len(wrong):
        besides = "" if also is None else f", or {also} where nothing is scored"
        raise ValueError(f"{name}: a batch has {int(wrong[0])}, allowed are 0 to {vocab_size - 1}{besides}")
