"""The documents of a source on disk: each once, ordered by the hash of their content, split by it or by group."""

from bisect import bisect_left
from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from datasets import Dataset, NamedSplit, load_from_disk
from datasets.exceptions import DatasetGenerationError

from lskip.data.cache import cached_folder
from lskip.data.documents import SPLITS, content_key, document_features, has_group, read_records, split_of, unique


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
        fractions: tuple[float, float],
        cache: Path,
    ):
        self.kind = kind
        documents = store_documents(rows, kind, text_column, cache / content_key(key, kind, text_column))
        self.size = len(documents)
        self._splits = split_documents(documents, *fractions)

    def documents(self, split: str) -> Dataset:
        return self._splits[split]

    def training_sample(self) -> Dataset:
        """Documents that a tokenizer may be trained on: all training documents."""
        return self._splits["train"]


def store_documents(rows: Iterable[dict], kind: str, text_column: str | None, folder: Path) -> Dataset:
    """All documents of `rows`, each once, ordered by digest; kept in `folder` and read from there if it exists.

    The order by digest makes everything after it (packing, a capped validation split) independent of the
    order of files on this machine.
    """

    def write(target: Path) -> None:
        with TemporaryDirectory(dir=target.parent) as building:
            documents = generate_documents(rows, kind, text_column, building)
            by_digest = np.argsort(np.array(documents["digest"][:]))
            documents.select(by_digest, keep_in_memory=True).save_to_disk(target)

    return load_from_disk(cached_folder(folder, write))


def generate_documents(rows: Iterable[dict], kind: str, text_column: str | None, folder: str) -> Dataset:
    if next(read_records(rows, kind, text_column), None) is None:
        raise ValueError("source: every row is empty")
    try:
        return Dataset.from_generator(
            lambda: unique(read_records(rows, kind, text_column)),
            features=document_features(kind),
            cache_dir=folder,
            split=NamedSplit("documents"),  # what the progress bar says it generates
            fingerprint="documents",
        )
    except DatasetGenerationError as error:
        raise error.__cause__ or error from None


def split_documents(documents: Dataset, val_fraction: float, test_fraction: float) -> dict[str, Dataset]:
    """The three splits of documents ordered by digest, as `split_of` says; found by bisection where no groups are."""
    if has_group(documents[0]["digest"]):
        splits = np.array([split_of(digest, val_fraction, test_fraction) for digest in documents["digest"][:]])
        return {split: documents.select(np.flatnonzero(splits == split)) for split in SPLITS}
    order = {split: rank for rank, split in enumerate(SPLITS)}

    def rank(row: int) -> int:
        return order[split_of(documents[row]["digest"], val_fraction, test_fraction)]

    starts = [bisect_left(range(len(documents)), order[split], key=rank) for split in SPLITS]
    ends = [*starts[1:], len(documents)]
    return {s: documents.select(range(a, b)) for s, a, b in zip(SPLITS, starts, ends, strict=True)}
