"""Streamed corpora, larger than the disk: documents are read, tokenized and packed during training."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from datasets import Dataset, IterableDataset
from datasets.distributed import split_dataset_by_node
from torch.utils.data import get_worker_info

from lskip.data.documents import SPLITS, SplitRule, document_features, read_records, split_of, unique
from lskip.data.encoders import READ_AHEAD, Encoder
from lskip.data.formats import COLUMNS
from lskip.data.loading import ResumableLoader
from lskip.data.rows import RowMaker
from lskip.data.tokenizer import TRAINING_CHARACTERS

SHUFFLE_BUFFER = 1000  # documents in the shuffle buffer
CHARACTERS_PER_TOKEN = 4  # an estimate, to stop reading held-out text


@dataclass
class StreamedCorpus:
    """The documents of a streamed source, read anew at each iteration.

    Of a held-out split, documents for `held_out_rows` rows are read; for plain text by an estimate.
    """

    rows: IterableDataset
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

    def records(self, rows: IterableDataset, split: str) -> Iterator[dict]:
        for record in read_records(plain_rows(rows), self.kind, self.text_column):
            if split_of(record["digest"], *self.rule) == split:
                yield record


def documents_of(records: list[dict], kind: str) -> Dataset:
    features = document_features(kind)
    return Dataset.from_dict({name: [record[name] for record in records] for name in features}, features=features)


def plain_rows(rows: IterableDataset) -> Iterator[dict]:
    """Yield the rows one by one; in a loader's worker `iter(rows)` would split them among the workers once more."""
    for batch in rows.iter(READ_AHEAD):
        for values in zip(*batch.values(), strict=True):
            yield dict(zip(batch, values, strict=True))


class StreamedBlocks(torch.utils.data.IterableDataset):
    """Endless training rows: after the last document the stream begins again, in another order.

    With W workers batch n is made by the worker of role n % W, each with its own share of the documents. A loader
    always begins with worker 0; so that a run resumed at batch `first` continues exactly, worker 0 then takes the role
    `first` % W, and each worker skips the rows that its role has already yielded.
    """

    def __init__(
        self,
        corpus: StreamedCorpus,
        make_encoder: Callable[[], Encoder],
        block_size: int,
        batch_size: int,
        seed: int,
        num_replicas: int = 1,
        rank: int = 0,
    ):
        self.corpus = corpus
        self.make_encoder = make_encoder
        self.block_size = block_size
        self.batch_size = batch_size
        self.seed = seed
        self.num_replicas = num_replicas
        self.rank = rank
        self.first = 0

    def __iter__(self) -> Iterator[dict]:
        worker = get_worker_info()
        workers, index = (worker.num_workers, worker.id) if worker else (1, 0)
        role = (index + self.first) % workers
        given = (self.first - role + workers - 1) // workers * self.batch_size
        rows = self.rows(shard=self.rank * workers + role, shards=self.num_replicas * workers)
        for _ in range(given):
            next(rows)
        yield from rows

    def rows(self, shard: int, shards: int) -> Iterator[dict]:
        """Yield encoded rows of one share of the training documents, without end."""
        maker, epoch = RowMaker(self.make_encoder(), self.block_size), 0
        shuffled = self.corpus.rows.shuffle(seed=self.seed, buffer_size=SHUFFLE_BUFFER)
        share = split_dataset_by_node(shuffled, rank=shard, world_size=shards)
        while True:
            share.set_epoch(epoch)
            count = 0
            for row in maker.rows(self.corpus.records(share, "train")):
                count += 1
                yield row
            if count == 0:
                raise ValueError(f"source: share {shard + 1} of {shards} of the stream holds no training block")
            epoch += 1


class StreamLoader(ResumableLoader):
    """A loader that sets where its StreamedBlocks begin, before workers copy them."""

    position: Callable[[], int] = staticmethod(lambda: 0)

    def __iter__(self):
        self.dataset.first = self.position()
        return super().__iter__()
