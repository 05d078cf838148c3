"""Documents from the rows of a source: checked, de-duplicated by content, split by the hash of content or group."""

import hashlib
import json
from collections import deque
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import NamedTuple

from datasets import Dataset, Features, Value
from lightning.pytorch.utilities import rank_zero_warn

from lskip.data.corpora import PLACE
from lskip.data.formats import COLUMNS, content_of

SPLITS = ("val", "test", "train")  # in the order of the hash
NOT_CONTENT = ("digest", "place")  # columns of a document
LOOKED_AT = 100  # rows whose columns are collected, since a row may lack some
GROUP = 16  # hex digits of a sha256 that decide the split
CONTENT = 64  # hex digits of a digest from the content; GROUP digits of the group's hash follow
VERSION = 3  # increase it when a change makes cached documents differ


def first_columns(rows: Iterable[dict], source: str) -> list[str]:
    """Return the columns of the first rows; raise ValueError when there are none."""
    columns = {name: None for row in islice(iter(rows), LOOKED_AT) for name in row}
    if not columns:
        raise ValueError(f"source: '{source}' holds no documents")
    return list(columns)


def read_records(rows: Iterable[dict], kind: str, text_column: str | None) -> Iterator[dict]:
    """Yield documents with the columns of `COLUMNS[kind]`, `digest` (see `document_digest`) and `place`, all strings.

    Empty rows are left out, those without the last column with a warning.
    """
    without, example, cut = 0, "", False
    for number, row in enumerate(rows):
        place = row.get(PLACE) or f"row {number}"
        content = content_of(row, kind, text_column, place)
        if content[-1] is None:
            without, example = without + 1, example or place
            cut = cut or (kind == "chat" and row.get("messages") is not None)  # of the answer that is missing
        if content[-1] in (None, "", []):
            continue
        check_strings(content, kind, place)
        if content[-1].strip():
            yield dict(zip(COLUMNS[kind], content, strict=True), digest=document_digest(content, row), place=place)
    if without:
        name = "completion" if cut else text_column or COLUMNS[kind][-1]
        rank_zero_warn(f"source: {without} rows have no '{name}' and are left out, such as {example}")


def document_features(kind: str) -> Features:
    return Features({name: Value("string") for name in (*COLUMNS[kind], *NOT_CONTENT)})


def document_digest(content: list[str], row: dict) -> str:
    """Return the hex sha256 of a text, or of the JSON list of several columns; then, with groups, the group's digits.

    A row without a group (null) is a group of its own.
    """
    digest = text_digest(content[0] if len(content) == 1 else json.dumps(content, ensure_ascii=False))
    if "group" not in row:
        return digest
    return digest + (digest if row["group"] is None else text_digest(str(row["group"])))[:GROUP]


def text_digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", errors="surrogatepass")).hexdigest()


def check_strings(content: list, kind: str, place: str) -> None:
    for name, value in zip(COLUMNS[kind], content, strict=True):
        if not isinstance(value, str):
            raise ValueError(f"source: {place}: '{name}' must be text, not {type(value).__name__}")
        try:
            value.encode()
        except UnicodeEncodeError as error:
            half = f"U+{ord(value[error.start]):04X}"
            raise ValueError(f"source: {place}: '{name}' holds half a character ({half}), which is no text") from error


def unique(records: Iterable[dict]) -> Iterator[dict]:
    seen = set()
    for record in records:
        key = bytes.fromhex(record["digest"][:CONTENT])
        if key not in seen:
            seen.add(key)
            yield record


class SplitRule(NamedTuple):
    """What is held out: shares of documents, or of groups where documents have some.

    Attributes:
        val_within_groups: validation is documents of the groups of training, in the place of groups of its own.
    """

    val_fraction: float
    test_fraction: float
    val_within_groups: bool = False


def fraction_of(digest: str) -> float:
    """Return the first 64 bits of a digest's group hash, or else of its own, as a fraction in [0, 1)."""
    return int(digest[CONTENT:] or digest[:GROUP], 16) / 2**64


def split_of(digest: str, val_fraction: float, test_fraction: float, val_within_groups: bool = False) -> str:
    """Return "val" for the first `val_fraction` of [0, 1), "test" for the next `test_fraction`, else "train".

    With `val_within_groups` the document's own hash decides about "val"; "test" is the same documents with either.
    """
    place = fraction_of(digest)
    if val_fraction <= place < val_fraction + test_fraction:
        return "test"
    return "val" if (fraction_of(digest[:CONTENT]) if val_within_groups else place) < val_fraction else "train"


def texts_of(documents: Dataset) -> Iterator[str]:
    """Yield the content of each document as one text, to train a tokenizer on."""
    for row in documents:
        yield "\n".join(row[name] for name in documents.column_names if name not in NOT_CONTENT)


def in_turns(texts: Iterable[Iterable[str]]) -> Iterator[str]:
    """Yield one text of each source, then the next one of each, until all have ended."""
    waiting = deque(map(iter, texts))
    while waiting:
        source = waiting.popleft()
        for text in islice(source, 1):
            yield text
            waiting.append(source)


def content_key(*parts) -> str:
    """Return a cache key of `parts`: plain types by their repr, Datasets by their digests."""
    total = hashlib.sha256(str(VERSION).encode())
    for part in parts:
        if isinstance(part, Dataset):
            for batch in part.select_columns("digest").iter(10_000):
                total.update("".join(batch["digest"]).encode())
        else:
            total.update(repr(part).encode())
    return total.hexdigest()[:32]
