"""Rows of a source become documents: checked, de-duplicated by content, split by the hash of content or group."""

import hashlib
import json
from collections.abc import Iterable, Iterator

from datasets import Dataset, Features, Value

from lskip.data.sources import first_line

SPLITS = ("val", "test", "train")  # in the order of the hash
COLUMNS = {"chat": ("messages",), "pairs": ("prompt", "completion"), "text": ("text",)}
PLACE = 16  # hex digits of a sha256 that decide on the split
CONTENT = 64  # hex digits of a digest that come from the content; those of a group's place follow
VERSION = 2  # raise it when a change here makes cached documents differ


def first_row(rows: Iterable[dict], source: str) -> dict:
    """ValueError when there is none, or when the source cannot be read."""
    try:
        first = next(iter(rows), None)
    except Exception as error:  # the readers of each format raise their own unrelated types
        raise ValueError(f"source: cannot read '{source}': {first_line(error)}") from error
    if first is None:
        raise ValueError(f"source: '{source}' holds no documents")
    return first


def record_kind(columns: Iterable[str], text_column: str | None, source: str) -> str:
    """ "chat", "pairs" or "text", by the columns of the source; a named `text_column` decides for "text".

    Raises:
        ValueError: none of the known sets of columns is there.
    """
    columns = list(columns)
    if text_column is not None and text_column in columns:
        return "text"
    if text_column is None:
        for kind, needed in COLUMNS.items():
            if set(needed) <= set(columns):
                return kind
    wanted = f"the text_column '{text_column}'" if text_column else "text, or prompt and completion, or messages"
    raise ValueError(f"source: '{source}' has the columns {columns}; needed: {wanted}")


def read_records(rows: Iterable[dict], kind: str, text_column: str | None) -> Iterator[dict]:
    """Documents with their `digest` (of `document_digest`), strings only; empty rows are left out.

    The columns are those of `COLUMNS[kind]`; `messages` is kept as JSON text, since the fields of a message
    differ from row to row. The content is the text itself, for the other kinds the JSON list of columns.
    """
    for number, row in enumerate(rows):
        content = [row[text_column or "text"]] if kind == "text" else [row[name] for name in COLUMNS[kind]]
        if content[-1] in (None, "", []):
            continue
        if kind == "chat":
            content = [messages_json(content[0], number)]
        check_strings(content, kind, number)
        if content[-1].strip():
            yield dict(zip(COLUMNS[kind], content, strict=True), digest=document_digest(content, row))


def document_features(kind: str) -> Features:
    return Features({name: Value("string") for name in (*COLUMNS[kind], "digest")})


def document_digest(content: list[str], row: dict) -> str:
    """Hex sha256 of a single text, or of the JSON list of several; where rows have groups, then the group's place.

    A row that is in no group (null) is one by itself.
    """
    digest = text_digest(content[0] if len(content) == 1 else json.dumps(content, ensure_ascii=False))
    if "group" not in row:
        return digest
    return digest + (digest if row["group"] is None else text_digest(str(row["group"])))[:PLACE]


def text_digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", errors="surrogatepass")).hexdigest()


def has_group(digest: str) -> bool:
    return len(digest) > CONTENT


def check_strings(content: list, kind: str, number: int) -> None:
    for name, value in zip(COLUMNS[kind], content, strict=True):
        if not isinstance(value, str):
            raise ValueError(f"source: row {number}: '{name}' must be text, not {type(value).__name__}")


def messages_json(messages: list, number: int) -> str:
    """Canonical JSON of one conversation: keys sorted, keys without a value left out."""
    if not isinstance(messages, list) or not all(is_message(message) for message in messages):
        raise ValueError(f"source: row {number}: 'messages' must be a list of {{role, content}} with text in both")
    present = [{key: value for key, value in message.items() if value is not None} for message in messages]
    return json.dumps(present, ensure_ascii=False, sort_keys=True)


def is_message(message) -> bool:
    return isinstance(message, dict) and all(isinstance(message.get(key), str) for key in ("role", "content"))


def unique(records: Iterable[dict]) -> Iterator[dict]:
    seen = set()
    for record in records:
        key = bytes.fromhex(record["digest"][:CONTENT])
        if key not in seen:
            seen.add(key)
            yield record


def fraction_of(digest: str) -> float:
    """The place of a digest in [0, 1): the first 64 bits of its group's hash, else of its own, as a binary fraction."""
    return int(digest[CONTENT:] or digest[:PLACE], 16) / 2**64


def split_of(digest: str, val_fraction: float, test_fraction: float) -> str:
    """ "val" for the first `val_fraction` of [0, 1), "test" for the next `test_fraction`, "train" for the rest."""
    place = fraction_of(digest)
    if place < val_fraction:
        return "val"
    return "test" if place < val_fraction + test_fraction else "train"


def texts_of(documents: Dataset) -> Iterator[str]:
    """Everything that is written in each document, for the tokenizer's training."""
    for row in documents:
        yield "\n".join(row[name] for name in documents.column_names if name != "digest")


def content_key(*parts) -> str:
    """A short name for anything determined by `parts` (plain types) and, for Datasets, by their digests."""
    total = hashlib.sha256(str(VERSION).encode())
    for part in parts:
        if isinstance(part, Dataset):
            for batch in part.select_columns("digest").iter(10_000):
                total.update("".join(batch["digest"]).encode())
        else:
            total.update(repr(part).encode())
    return total.hexdigest()[:32]
