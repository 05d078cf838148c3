"""Corpora larger than the disk: documents are read, tokenized and packed while training."""

from collections.abc import Callable, Iterator

import torch
from datasets import Dataset, IterableDataset
from datasets.distributed import split_dataset_by_node
from torch.utils.data import get_worker_info

from lskip.data.documents import SPLITS, document_features, read_records, split_of, unique
from lskip.data.formats import COLUMNS
from lskip.data.loading import ResumableLoader
from lskip.data.packing import READ_AHEAD, encoded_rows
from lskip.data.tokenizer import TRAINING_CHARACTERS

SHUFFLE_BUFFER = 1000  # documents among which the next one is drawn
CHARACTERS_PER_TOKEN = 4  # a guess, to stop reading when enough held-out text is there


class StreamedCorpus:
    """The documents of a streamed source, read anew each time.

    Of a held-out split documents for `held_out_rows` rows are read; for plain text that is a guess.
    """

    size = None  # nobody has counted

    def __init__(
        self,
        rows: IterableDataset,
        kind: str,
        text_column: str | None,
        fractions: tuple[float, float],
        held_out_rows: int,
        block_size: int,
    ):
        self.rows = rows
        self.kind = kind
        self.text_column = text_column
        self.fractions = fractions
        self.held_out_rows = held_out_rows
        self.block_size = block_size
        self._held_out: dict[str, Dataset] = {}

    def documents(self, split: str) -> Dataset:
        """The first documents of "val" or "test", each once, ordered by digest."""
        if split == "train":
            raise ValueError("split: 'train' is kept nowhere with streaming")
        if split not in self._held_out:
            rows, characters = self.held_out_rows, None
            if self.kind == "text":
                rows, characters = None, self.held_out_rows * self.block_size * CHARACTERS_PER_TOKEN
            self._held_out[split] = self.first(split, rows, characters)
        return self._held_out[split]

    def training_sample(self) -> Dataset:
        """Documents that a tokenizer may be trained on: the first of the stream."""
        return self.first("train", None, TRAINING_CHARACTERS)

    def first(self, split: str, rows: int | None, characters: int | None) -> Dataset:
        """The first documents of `split`, until there are so many rows or characters of them."""
        found, read = [], 0
        if split != "train" and not self.fractions[SPLITS.index(split)]:
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
            if split_of(record["digest"], *self.fractions) == split:
                yield record


def documents_of(records: list[dict], kind: str) -> Dataset:
    features = document_features(kind)
    return Dataset.from_dict({name: [record[name] for record in records] for name in features}, features=features)


def plain_rows(rows: IterableDataset) -> Iterator[dict]:
    """The rows one by one. In a loader's worker `iter(rows)` would share them out among the workers once more."""
    for batch in rows.iter(READ_AHEAD):
        for values in zip(*batch.values(), strict=True):
            yield dict(zip(batch, values, strict=True))


class StreamedBlocks(torch.utils.data.IterableDataset):
    """Training rows without end: after the last document the stream begins again, shuffled anew.

    With W workers batch n is made by the worker of role n % W, each with its own share of the documents. A
    loader always asks worker 0 first; so that a run resumed at batch `first` goes on exactly, worker 0 then
    takes the role `first` % W, and each skips what its role has given already.
    """

    def __init__(
        self,
        corpus: StreamedCorpus,
        make_encoder: Callable,
        batch_size: int,
        seed: int,
        num_replicas: int = 1,
        rank: int = 0,
    ):
        self.corpus = corpus
        self.make_encoder = make_encoder
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
        """Encoded rows of one share of the training documents, for ever."""
        encoder, epoch = self.make_encoder(), 0
        shuffled = self.corpus.rows.shuffle(seed=self.seed, buffer_size=SHUFFLE_BUFFER)
        share = split_dataset_by_node(shuffled, rank=shard, world_size=shards)
        while True:
            share.set_epoch(epoch)
            count = 0
            for row in encoded_rows(encoder, self.corpus.records(share, "train")):
                count += 1
                yield row
            if count == 0:
                raise ValueError(f"source: share {shard + 1} of {shards} of the stream holds no training block")
            epoch += 1


class StreamLoader(ResumableLoader):
    """Tells its StreamedBlocks where to begin, before the workers get their copies of it."""

    position: Callable[[], int] = staticmethod(lambda: 0)

    def __iter__(self):
        self.dataset.first = self.position()
        return super().__iter__()
