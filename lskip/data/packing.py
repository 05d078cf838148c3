"""Encoding of documents into rows of exactly `block_size` tokens.

Labels follow transformers: aligned with the inputs, shifted inside the model, -100 where a token is not scored.
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from datasets import Dataset, Features, List, Value
from datasets.utils import tqdm
from lightning.pytorch.utilities import rank_zero_warn
from transformers import PreTrainedTokenizerBase

from lskip.data.cache import cached_folder
from lskip.data.chat import conversation_tokens
from lskip.data.stored_rows import grouped, open_rows, write_rows
from lskip.data.text_tokens import PIECE, special_pattern, text_runs
from lskip.models.encoding import added_around
from lskip.models.scored import with_scored

NOT_SCORED = -100
READ_AHEAD = 64  # the most documents that are tokenized together
BLOCKS = "blocks.arrow"
DOCUMENTS = ("joined", "separate")  # how several lie in one row


class Encoder:
    """Base of the encoders: a tokenizer, and a warning about special tokens spelled in texts."""

    columns: tuple[str, ...] = ()

    def __init__(self, tokenizer: PreTrainedTokenizerBase, block_size: int):
        self.tokenizer = tokenizer
        self.block_size = block_size
        self.before, _ = added_around(tokenizer)
        self.special = special_pattern(tokenizer)
        self.noticed = self.special is None

    def rows(self, batch: dict[str, list[str]]) -> Iterator[dict[str, np.ndarray]]:
        """Yield the rows of some documents."""
        raise NotImplementedError

    def __call__(self, batch: dict[str, list[str]]) -> dict[str, list]:
        """Return all rows of some documents, in columns."""
        rows = list(self.rows(batch))
        return {name: [row[name] for row in rows] for name in self.columns}

    def look_for_special(self, batch: dict[str, list[str]], *columns: str) -> None:
        """Warn of the first special token that a text spells."""
        for name in () if self.noticed else columns:
            for number, text in enumerate(batch[name]):
                spelled = self.special.search(text)
                if spelled:
                    place = batch["place"][number] if "place" in batch else "a document"
                    rank_zero_warn(
                        f"source: {place} spells the special token {spelled[0]!r}: like any that a text spells, it is "
                        "plain text (conversations belong in a column 'messages')"
                    )
                    self.noticed = True
                    return


class TextPacker(Encoder):
    """Encoder of texts: joined, with the end-of-text token after each, and cut into blocks.

    Tokens that do not fill a block are kept for the next call, so that only the last ones are lost.
    """

    columns = ("input_ids",)

    def __init__(self, tokenizer: PreTrainedTokenizerBase, block_size: int):
        super().__init__(tokenizer, block_size)
        self.rest: list[int] = []

    def rows(self, batch: dict[str, list[str]]) -> Iterator[dict[str, np.ndarray]]:
        self.look_for_special(batch, "text")
        begins = True
        for ids, is_last in text_runs(self.tokenizer, batch["text"]):
            self.rest += [*self.before, *ids] if begins else ids
            if is_last:
                self.rest.append(self.tokenizer.eos_token_id)
            begins = is_last
            count = len(self.rest) // self.block_size
            full, self.rest = self.rest[: count * self.block_size], self.rest[count * self.block_size :]
            for block in np.array(full, np.int32).reshape(count, self.block_size):
                yield {"input_ids": block}


class PairEncoder(Encoder):
    """Encoder of pairs, one row each: the completion and the end of text are scored, the prompt is not."""

    columns = ("input_ids", "labels")

    def __init__(self, tokenizer: PreTrainedTokenizerBase, block_size: int):
        super().__init__(tokenizer, block_size)
        self.pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id

    def rows(self, batch: dict[str, list[str]]) -> Iterator[dict[str, np.ndarray]]:
        for example in self.examples(batch):
            ids, labels = padded(*example, self.block_size, self.pad)
            if (labels[1:] != NOT_SCORED).any():  # the first label has no input before it
                yield {"input_ids": ids, "labels": labels}

    def examples(self, batch: dict[str, list[str]]) -> Iterator[tuple[list[int], list[bool]]]:
        """Yield the tokens of each example, at least the first block_size, and which of them are scored."""
        self.look_for_special(batch, "prompt", "completion")
        for prompt, completion in zip(self._first(batch["prompt"]), self._first(batch["completion"]), strict=True):
            prompt, answer = [*self.before, *prompt], [*completion, self.tokenizer.eos_token_id]
            yield prompt + answer, [False] * len(prompt) + [True] * len(answer)

    def _first(self, texts: list[str]) -> Iterator[list[int]]:
        """Yield the tokens of each text, or at least the first block_size of them."""
        ids = []
        for more, is_last in text_runs(self.tokenizer, texts, self.block_size):
            ids += more
            if is_last:
                yield ids
                ids = []


class ChatEncoder(PairEncoder):
    """Encoder of conversations, one row each, by the chat template: every assistant turn is scored."""

    def examples(self, batch: dict[str, list[str]]) -> Iterator[tuple[list[int], list[bool]]]:
        self.look_for_special(batch, "messages")
        for number, text in enumerate(batch["messages"]):
            place = batch["place"][number] if "place" in batch else "a conversation"
            stored = json.loads(text)
            messages, tools = (stored["messages"], stored["tools"]) if isinstance(stored, dict) else (stored, None)
            yield conversation_tokens(self.tokenizer, messages, tools, place, self.special, self.block_size)


ENCODERS = {"text": TextPacker, "pairs": PairEncoder, "chat": ChatEncoder}


def padded(ids: list[int], scored: list[bool], size: int, pad: int) -> tuple[np.ndarray, np.ndarray]:
    """Return input_ids [size] and labels [size], cut or padded at the right."""
    input_ids, labels = np.full(size, pad, np.int32), np.full(size, NOT_SCORED, np.int32)
    count = min(len(ids), size)
    input_ids[:count] = ids[:count]
    labels[:count] = np.where(scored[:count], ids[:count], NOT_SCORED)
    return input_ids, labels


def scored_lengths(blocks: Dataset) -> np.ndarray | None:
    """Return the columns that each row needs, up to its last scored token, int [rows]; None for text, which has all."""
    if "labels" not in blocks.column_names:
        return None
    places = np.arange(1, len(blocks[0]["labels"]) + 1)
    return np.concatenate([((rows["labels"] != NOT_SCORED) * places).max(1) for rows in blocks.iter(10_000)])


def encode_documents(documents: Dataset, encoder: Encoder, folder: Path, split: str) -> Dataset:
    """Return all rows of `documents`, from `folder` where they are cached, else tokenized and written there."""
    row = List(Value("int32"), length=encoder.block_size)
    features = Features({name: row for name in encoder.columns})

    def write(target: Path) -> None:
        write_rows(
            target / BLOCKS, features, encoded_rows(encoder, tqdm(documents, desc=f"Tokenizing {split}", unit=""))
        )

    return open_rows(cached_folder(folder, write) / BLOCKS).with_format("numpy")


def encoded_rows(encoder: Encoder, documents: Iterable[dict]) -> Iterator[dict[str, np.ndarray]]:
    """Yield the rows that an encoder makes of documents."""
    for columns in batches(documents):
        yield from encoder.rows(columns)


def batches(documents: Iterable[dict]) -> Iterator[dict[str, list[str]]]:
    """Yield documents in groups, in columns, as the encoders take them."""
    for group in grouped(documents, READ_AHEAD, PIECE):
        yield {name: [row[name] for row in group] for name in group[0]}


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
    batch = {name: torch.from_numpy(np.stack([row[name] for row in rows]).astype(np.int64)) for name in rows[0]}
    if "labels" not in batch:
        joined = {"input_ids": batch["input_ids"], "labels": batch["input_ids"].clone()}
        return with_scored(joined if border is None else kept_apart(joined, border))
    scored = (batch["labels"] != NOT_SCORED).any(0)
    size = len(scored) - int(scored.flip(0).int().argmax())  # block_size where nothing is scored
    return with_scored({name: part[:, :size] for name, part in batch.items()})
