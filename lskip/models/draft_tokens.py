"""Tokens that drafts choose among, in place of the whole vocabulary: a JSON file beside a checkpoint, or a user's own.

A draft of a task's tokens alone costs a fraction of a large head (FR-Spec, arXiv 2502.14856). The model verifies among
all tokens, so that its text does not depend on these.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lskip.models.reading.sources import find_source
from lskip.utils.checks import is_whole
from lskip.utils.output_files import write_json
from lskip.utils.untrusted import parse_json, read_text
from lskip.utils.user_paths import user_path

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FILE = "draft_tokens.json"
ALL = "all"
SMALLEST_VOCABULARY = 8192  # beside a smaller head the blocks of an exit take as long
MOST = 1 / 8  # of the vocabulary: more of it saves too little
COVERED = 0.999  # of further text of the kind: each token that is missing is a draft that is refused


def few_tokens(counts: np.ndarray) -> list[int] | None:
    """Return the tokens of a text whose vocabulary is small beside the model's, the most frequent first; else None.

    Args:
        counts: [V], how often each token occurs. The share of tokens that occur once is the chance that the next one is
            new (Good, Biometrika 40, 1953): a short text does not tell.
    """
    if len(counts) < SMALLEST_VOCABULARY or not counts.any():
        return None
    ids = np.argsort(-counts, kind="stable")[: int(MOST * len(counts))]
    ids = ids[counts[ids] > 0]
    return ids.tolist() if counts[ids].sum() - (counts == 1).sum() >= COVERED * counts.sum() else None


def keep_draft_tokens(folder: Path, listed: Sequence[int] | Sequence[str] | None) -> None:
    """Write the tokens into a model's folder, or that of a run's checkpoints; None: remove those of before."""
    if listed is None:
        (folder / FILE).unlink(missing_ok=True)
        return
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / FILE, list(listed))


@dataclass(frozen=True)
class DraftTokens:
    """Tokens that a file lists.

    Attributes:
        path: of the file.
        listed: token ids, or texts whose tokens are meant.
    """

    path: Path
    listed: list[int] | list[str]

    def ids(self, vocab_size: int, tokenizer: PreTrainedTokenizerBase | None) -> list[int]:
        """Return the token ids for a model of this vocabulary.

        Raises:
            ValueError: an id that the vocabulary lacks, or texts for a model without a tokenizer.
        """
        known = self.listed
        if isinstance(known[0], str):
            if tokenizer is None:
                raise ValueError(
                    f"draft_tokens: '{self.path}' holds texts, for which the model has no tokenizer; give ids"
                )
            known = sorted(
                {token for text in known for token in tokenizer(text, add_special_tokens=False)["input_ids"]}
            )
        for token in known:
            if not 0 <= token < vocab_size:
                raise ValueError(f"draft_tokens: '{self.path}' has the token {token}, not from 0 to {vocab_size - 1}")
        return list(known)


def find_draft_tokens(named: str | None, model: str) -> DraftTokens | None:
    """Return the tokens that drafts choose among; None: all tokens.

    Args:
        named: a file; "all"; or None: the file that `fit` kept beside the checkpoint, where there is one.
        model: as `load_model` takes it.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds neither a list of token ids nor one of texts.
    """
    if named == ALL:
        return None
    if named is not None:
        path = user_path(named, "draft_tokens")
        if not path.is_file():
            raise FileNotFoundError(f"draft_tokens: there is no file '{path}'; name a JSON file, or {ALL}")
        return read_draft_tokens(path)
    found = find_source(model)
    folder = {"checkpoint": Path(found.place).parent, "folder": Path(found.place)}.get(found.kind)
    return None if folder is None or not (folder / FILE).is_file() else read_draft_tokens(folder / FILE)


def read_draft_tokens(path: Path) -> DraftTokens:
    """Return what a JSON file lists; ValueError unless that is token ids, or texts."""
    found = parse_json(read_text(path, "draft_tokens"), f"draft_tokens: '{path}'")
    listed = isinstance(found, list) and len(found) > 0
    if not listed or not (all(map(is_whole, found)) or all(isinstance(each, str) and each for each in found)):
        raise ValueError(f"draft_tokens: '{path}' holds no list of token ids, and none of texts")
    return DraftTokens(path, found)
