"""Streamed corpora, larger than the disk: documents are read and tokenized during training."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import ClassVar

from datasets import Dataset, IterableDataset

from lskip.data.documents import (
    SPLITS,
    SplitRule,
    document_features,
    read_records,
    split_of,
    unique,
)
from lskip.data.formats import COLUMNS
from lskip.data.tokenizer import TRAINING_CHARACTERS

CHARACTERS_PER_TOKEN = 4  # an estimate, to stop reading held-out text


@dataclass
class StreamedCorpus:
    """The documents of a streamed source, read anew at each iteration.

    Of a held-out split, documents for `held_out_rows` rows are read; for plain text by an estimate.
    """

    rows: IterableDataset
    key: str
    kind: str
    text_column: str | None
    rule: SplitRule
    held_out_rows: int
    block_size: int
    size: ClassVar[None] = None  # unknown
    _held_out: dict[str, Dataset] = field(default_factory=dict)

    def documents(self, split: str) -> Dataset:
        """Return the first documents of "val" or "test", de-duplicated and ordered by digest."""
        if split == "train":
            raise ValueError("split: 'train' is kept nowhere with streaming")
        if split not in self._held_out:
            rows, characters = self.held_out_rows, None
            if self.kind == "text":
                rows, characters = None, self.held_out_rows * self.block_size * CHARACTERS_PER_TOKEN
            self._held_out[split] = self.first(split, rows, characters)
        return self._held_out[split]

    def training_sample(self) -> Dataset:
        """Return the documents to train a tokenizer on: the first of the stream."""
        return self.first("train", None, TRAINING_CHARACTERS)

    def first(self, split: str, rows: int | None, characters: int | None) -> Dataset:
        """Return the first documents of `split`, until `rows` or `characters` are reached."""
        found, read = [], 0
        if split != "train" and not self.rule[SPLITS.index(split)]:
            return documents_of(found, self.kind)
        for record in unique(self.records(self.rows, split)):
            found.append(record)
            read += sum(len(record[name]) for name in COLUMNS[self.kind])
            if len(found) == rows or (characters is not None and read >= characters):
                break
        found.sort(key=lambda record: record["digest"])
        return documents_of(found, self.kind)

    def records(self, rows: Iterable[dict], split: str) -> Iterator[dict]:
        """Yield the documents of a split that are in some rows of the source."""
        for record in read_records(rows, self.kind, self.text_column):
            if split_of(record["digest"], *self.rule) == split:
                yield record


def documents_of(records: list[dict], kind: str) -> Dataset:
    features = document_features(kind)
    return Dataset.from_dict({name: [record[name] for record in records] for name in features}, features=features)
