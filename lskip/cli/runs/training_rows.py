"""What a run keeps of its training rows for decoding: the tokens of its answers, and the form of its prompts."""

from pathlib import Path

import numpy as np
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from lskip.data import TextData
from lskip.models.draft_tokens import SMALLEST_VOCABULARY, few_tokens, keep_draft_tokens
from lskip.models.prompt_form import keep_form
from lskip.models.scored import NOT_SCORED

MOST_POSITIONS = 2**22  # of the training split that are counted: about a second
MOST_PROMPTS = 1000


class KeepTrainingRows(Callback):
    """Writes draft_tokens.json when training begins, where the answers have few of the vocabulary's tokens.

    Notes the form of the prompts in the tokenizer that the checkpoint holds.

    Args:
        folder: of the run's checkpoints.
    """

    def __init__(self, folder: Path):
        self.folder = folder

    @rank_zero_only
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.fast_dev_run:
            return
        data = trainer.datamodule
        keep_draft_tokens(self.folder, tokens_of(data))
        if isinstance(data, TextData) and data.training_documents and pl_module.tokenizer is not None:
            kind = data.training_documents["kind"]
            if kind != "text":
                keep_form(pl_module.tokenizer, prompts_of(data) if kind == "pairs" else None)


def tokens_of(data: LightningDataModule | None) -> list[int] | None:
    """Return the tokens that are scored in training, the most frequent first; None: they are many, or not known."""
    if not isinstance(data, TextData) or data.streaming or len(data.tokenizer) < SMALLEST_VOCABULARY:
        return None  # before anything is counted
    return few_tokens(token_counts(data, max(1, MOST_POSITIONS // data.block_size)))


def token_counts(data: TextData, most_rows: int) -> np.ndarray:
    """Return how often each token is a target, in so many training rows at most; int64 [len(tokenizer)]."""
    counts = np.zeros(len(data.tokenizer), np.int64)
    for rows in data.blocks("train").in_parts(most_rows):
        targets = rows.get("labels", rows["input_ids"])[:, 1:]
        counts += np.bincount(targets[targets != NOT_SCORED], minlength=len(counts))
    return counts


def prompts_of(data: TextData) -> list[list[int]]:
    """Return the token ids of the prompts of some training pairs, evenly spaced."""
    blocks = data.blocks("train")
    some = blocks[:: -(-len(blocks) // MOST_PROMPTS)]
    firsts = (some["labels"] != NOT_SCORED).argmax(1)
    return [ids[:first].tolist() for ids, first in zip(some["input_ids"], firsts, strict=True)]
