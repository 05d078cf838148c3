"""Batches of rows, as a model takes them; documents of a row kept apart."""

from typing import NamedTuple

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from lskip.models.encoding import added_around
from lskip.models.scored import NOT_SCORED, with_scored

DOCUMENTS = ("separate", "joined")  # how several lie in one row


class Border(NamedTuple):
    """Tokens where one packed document ends and the next begins.

    Attributes:
        end: the last of each, which no text spells.
        before: special tokens at the beginning of each.
    """

    end: int
    before: tuple[int, ...] = ()


def border_of(tokenizer: PreTrainedTokenizerBase) -> Border:
    return Border(tokenizer.eos_token_id, tuple(added_around(tokenizer)[0]))


def kept_apart(batch: dict[str, torch.Tensor], border: Border) -> dict[str, torch.Tensor]:
    """Return a batch of packed text with position_ids, where a row holds more than one document."""
    ids = batch["input_ids"]
    begins = ids.new_zeros(ids.shape, dtype=torch.bool)
    begins[:, 1:] = ids[:, :-1] == border.end
    for number, token in enumerate(border.before):  # an end may be one of them: then the next token begins nothing
        begins[:, : ids.shape[1] - number] &= ids[:, number:] == token
    begins[:, 0] = True
    if not begins[:, 1:].any():
        return batch
    places = torch.arange(ids.shape[1]).expand_as(ids)
    first = torch.where(begins, places, 0).cummax(1).values
    return {**batch, "labels": batch["labels"].masked_fill(begins, NOT_SCORED), "position_ids": places - first}


def collate(rows: list[dict[str, np.ndarray]], border: Border | None = None) -> dict[str, torch.Tensor]:
    """Return {"input_ids", "labels"} and what else rows have, int64 [B, S], and `with_scored`.

    Labels of packed text are its input_ids.

    S is block_size for text; batches of pairs and conversations are cut after the last scored token of any row, since
    padding would cost as much as text.

    Args:
        border: of packed documents that are kept apart: "position_ids" [B, S] begin at 0 with each, whose first token
            is not scored, since no token before it tells of it. None: they are joined.
    """
    stacked = {name: np.stack([row[name] for row in rows], dtype=np.int64) for name in rows[0]}
    batch = {name: torch.from_numpy(part) for name, part in stacked.items()}
    if "labels" not in batch:
        joined = {"input_ids": batch["input_ids"], "labels": batch["input_ids"].clone()}
        return with_scored(joined if border is None else kept_apart(joined, border))
    scored = (batch["labels"] != NOT_SCORED).any(0)
    size = len(scored) - int(scored.flip(0).int().argmax())  # block_size where nothing is scored
    return with_scored({name: part[:, :size] for name, part in batch.items()})
