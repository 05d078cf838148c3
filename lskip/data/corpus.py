"""The stored documents of a source: de-duplicated, ordered by content hash, split by that hash or by group."""

from bisect import bisect_left
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
from datasets import Dataset
from datasets.utils import tqdm

from lskip.data.arrow_rows import open_rows, sort_rows, write_rows
from lskip.data.cache import cached_folder
from lskip.data.documents import (
    CONTENT,
    SPLITS,
    SplitRule,
    content_key,
    document_features,
    read_records,
    split_of,
)

DOCUMENTS = "documents.arrow"


class StoredCorpus:
    """All documents of `rows`, read once into a folder below `cache` that is named by `key`.

    Raises:
        ValueError: no document has any text, or a row is not what its column should hold.
    """

    def __init__(
        self,
        rows: Iterable[dict],
        key: str,
        kind: str,
        text_column: str | None,
        rule: SplitRule,
        cache: Path,
    ):
        self.kind = kind
        documents = store_documents(rows, kind, text_column, cache / content_key(key, kind, text_column))
        self.size = len(documents)
        self._splits = split_documents(documents, rule)

    def documents(self, split: str) -> Dataset:
        return self._splits[split]

    def training_sample(self) -> Dataset:
        """Return the documents to train a tokenizer on: all training documents."""
        return self._splits["train"]


def store_documents(rows: Iterable[dict], kind: str, text_column: str | None, folder: Path) -> Dataset:
    """Return the documents of `rows`, de-duplicated and ordered by digest, stored in or read from `folder`.

    The order by digest makes packing and a capped validation split independent of the order of files.
    """

    def write(target: Path) -> None:
        features, unsorted = document_features(kind), target / "unsorted.arrow"
        records = read_records(rows, kind, text_column)
        write_rows(unsorted, features, tqdm(records, desc="Reading documents", unit=""))
        if not len(open_rows(unsorted)):
            raise ValueError("source: every row is empty")
        sort_rows(unsorted, target / DOCUMENTS, features, by="digest", width=CONTENT)
        unsorted.unlink()

    return open_rows(cached_folder(folder, write) / DOCUMENTS)


def split_documents(documents: Dataset, rule: SplitRule) -> dict[str, Dataset]:
    """Return the three splits by `split_of` of documents ordered by digest; without groups by bisection."""
    if pc.max(pc.binary_length(documents.data["digest"])).as_py() > CONTENT:  # some have a group
        splits = np.array([split_of(digest, *rule) for digest in documents["digest"][:]])
        return {split: documents.select(np.flatnonzero(splits == split)) for split in SPLITS}
    order = {split: rank for rank, split in enumerate(SPLITS)}

    def rank(row: int) -> int:
        return order[split_of(documents[row]["digest"], *rule)]

    starts = [bisect_left(range(len(documents)), order[split], key=rank) for split in SPLITS]
    ends = [*starts[1:], len(documents)]
    # Dataset.select refuses range(n, n) of n rows.
    return {s: documents.select(range(a, b) if a < b else []) for s, a, b in zip(SPLITS, starts, ends, strict=True)}
