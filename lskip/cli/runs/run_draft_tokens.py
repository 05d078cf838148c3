"""The tokens of a run's training answers, kept beside its checkpoint for drafts to choose among."""

from pathlib import Path

from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from lskip.data import TextData
from lskip.models.draft_tokens import SMALLEST_VOCABULARY, few_tokens, keep_draft_tokens

MOST_POSITIONS = 2**22  # of the training split that are counted: about a second


class RunDraftTokens(Callback):
    """Writes draft_tokens.json when training begins, where the answers have few of the vocabulary's tokens.

    Args:
        folder: of the run's checkpoints.
    """

    def __init__(self, folder: Path):
        self.folder = folder

    @rank_zero_only
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.fast_dev_run:
            keep_draft_tokens(self.folder, tokens_of(trainer.datamodule))


def tokens_of(data: LightningDataModule | None) -> list[int] | None:
    """Return the tokens that are scored in training, the most frequent first; None: they are many, or not known."""
    if not isinstance(data, TextData) or data.streaming or len(data.tokenizer) < SMALLEST_VOCABULARY:
        return None  # before anything is counted
    return few_tokens(data.token_counts("train", max(1, MOST_POSITIONS // data.block_size)))
