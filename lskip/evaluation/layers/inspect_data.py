"""The data of `lskip inspect`: the first blocks of tokens of a source."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pydoc_data.topics import topics
from typing import Literal

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lskip.data.arguments import check_source
from lskip.data.chat import check_chat_template
from lskip.data.collation import collate
from lskip.data.documents import first_columns, read_records, split_of
from lskip.data.encoders import ENCODERS
from lskip.data.formats import record_kind
from lskip.data.rows import RowMaker
from lskip.data.sources import open_source
from lskip.data.tokenizer import check_tokenizer
from lskip.utils.checks import check_whole

TOPICS = "topics"  # Python's own help topics: English prose on every machine
USUAL_BLOCK = 512
HELD_OUT = (0.05, 0.05)  # default shares of val and test in `fit`


@dataclass(frozen=True)
class DataOptions:
    """Options that choose the data and its blocks.

    Attributes:
        data: topics (English prose that comes with Python), or what --data.source of fit takes: stdlib, packages,
            home_assistant, a file, a folder, a hub data set.
        split: only what fit, by default, would train on or hold out of the data: train, val or test; null: all of it.
        block_size: tokens in a block; null: 512, or as many as the model can read.
        num_blocks: blocks that are read, at most: the first ones of the data.
        batch_size: blocks that go through the model together.

    Raises:
        ValueError: a number out of its range.
    """

    data: str = TOPICS
    split: Literal["train", "val", "test"] | None = None
    block_size: int | None = None
    num_blocks: int = 8
    batch_size: int = 4

    def __post_init__(self):
        sizes = {"num_blocks": 1, "batch_size": 1, **({} if self.block_size is None else {"block_size": 2})}
        for name, lowest in sizes.items():
            check_whole(name, getattr(self, name), lowest)

    @property
    def name(self) -> str:
        return self.data if self.split is None else f"{self.data} ({self.split})"

    def open(self) -> Documents:
        """Open the data; ValueError or FileNotFoundError if it cannot be read."""
        if self.data == TOPICS:
            return Documents("text", [{"text": "\n\n".join(topics[name] for name in sorted(topics))}], self.split)
        with _named_data():
            check_source(self.data)
            rows, _ = open_source(self.data, streaming=True)
            return Documents(record_kind(first_columns(rows, self.data), None, self.data), rows, self.split)


@contextmanager
def _named_data() -> Iterator[None]:
    """Make errors raised inside name the option "data", which is called "source" in `fit`."""
    try:
        yield
    except (ValueError, FileNotFoundError) as error:
        raise type(error)(f"data: {str(error).removeprefix('source: ')}") from error


@dataclass(frozen=True)
class Documents:
    """Documents of a source, read lazily and in its order.

    Attributes:
        kind: text, pairs or chat, by the columns of the source.
        rows: the rows of the source.
        split: train, val or test, as `fit` splits by default; None: all.
    """

    kind: str
    rows: Iterable[dict]
    split: str | None

    def batches(self, tokenizer: PreTrainedTokenizerBase, options: DataOptions) -> list[dict[str, Tensor]]:
        """Return the first num_blocks blocks, or all if there are fewer, in batches.

        Returns:
            {"input_ids", "labels"}, each int64 [B, block_size] with B up to batch_size, labels as in transformers.

        Raises:
            ValueError: not one block can be filled, or the tokenizer lacks a chat template for chat data.
        """
        if self.kind == "chat":
            check_chat_template(tokenizer)
        encoder = ENCODERS[self.kind](check_tokenizer(tokenizer), options.block_size)
        with _named_data():
            rows = list(islice(RowMaker(encoder, options.block_size).rows(self._records()), options.num_blocks))
        if not rows:
            raise ValueError(f"data: {options.name} does not fill one block_size of {options.block_size} tokens")
        size = options.batch_size
        return [collate(rows[start : start + size]) for start in range(0, len(rows), size)]

    def _records(self) -> Iterator[dict]:
        for record in read_records(self.rows, self.kind, None):
            if self.split is None or split_of(record["digest"], *HELD_OUT) == self.split:
                yield record
