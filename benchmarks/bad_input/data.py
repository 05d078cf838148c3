"""Training data for `fit`: files and folders that are cut, corrupted, in other encodings or with other names.

If data are accepted, a callback records the text of every row that the run was trained on: each piece of it must be in
the documents that this module's own reader finds, and most of these must occur.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from random import Random

import pyarrow
import pyarrow.parquet

from benchmarks.bad_input.verdict import Case, Check, Right, Seen, done, either, refused

END = "<|endoftext|>"
DOCUMENTS = [f"def f{i}(x):\n    return x * {i} + {i % 7}\n" * 3 for i in range(40)]
FIT = (
    "--model={place}/llama",
    "--run_folder={here}/out",
    "--data.cache_dir={here}/cache",
    "--data.block_size=16",
    "--data.batch_size=4",
    "--data.test_fraction=0",
    "--data.val_fraction=0.1",
    "--trainer.max_epochs=1",
    "--trainer.limit_val_batches=0",
    "--trainer.accelerator=cpu",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
    "--trainer.callbacks={class_path: benchmarks.bad_input.probe.SeenText, init_args: {path: '{here}/seen'}}",
)
Prepare = Callable[[Path], object]


def trained_on(documents: list[str], scored: list[str] | None = None, share: float = 0.5) -> Check:
    """Check that the run was trained on these documents only, and on at least this share of them.

    Args:
        scored: texts that may be scored; None: all.
    """

    def check(seen: Seen) -> str | None:
        path = seen.here / "seen"
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
        met = set()
        for row in rows:
            pieces = row["text"].split(END) if scored is None else [row["scored"].removesuffix(END)]
            for piece in (each.strip("\ufffd") for each in pieces):
                of = {text for text in (documents if scored is None else scored) if piece in text}
                if not of:
                    return f"trained on {piece!r}"
                met |= of if len(piece) > 2 else set()
        wanted = set(documents if scored is None else scored)
        return None if len(met) >= share * len(wanted) else f"trained on {len(met)} of {len(wanted)} documents"

    return check


def lines(rows: list[dict] | None = None) -> bytes:
    rows = [{"text": text} for text in DOCUMENTS] if rows is None else rows
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


GOOD = done(trained_on(DOCUMENTS))
READ_OR_NAMED = either(GOOD, refused("source"))


def cases(random: Random) -> Iterator[Case]:
    yield from files(random)
    yield from tables(random)


def case(kind: str, what: str, right: Right, prepare: Prepare, name: str, *more: str) -> Case:
    arguments = (*FIT, f"--data.source={{here}}/{name}", *more)
    return Case("fit", kind, what, arguments, right, prepare, makes=("out", "seen"))


def of_bytes(kind: str, what: str, right: Right, data: bytes, name: str, *more: str) -> Case:
    return case(kind, what, right, lambda here: (here / name).write_bytes(data), name, *more)


def files(random: Random) -> Iterator[Case]:
    """Yield single files with odd names, encodings and cuts."""
    data = lines()
    yield of_bytes("data file", "jsonl", GOOD, data, "d.jsonl")
    for name in (
        "d.ndjson",
        "d.JSONL",
        "d.Json",
        "d.jsonl.gz",
        "d.csv",
        "d.csv.zst",
        "d.tsv",
        "d.gz",
        "d.zip",
        "d.xlsx",
        "d.pdf",
    ):
        yield of_bytes("data name", name, READ_OR_NAMED, data, name)
    for name in ("d.jsonl.gz", "d.txt.gz", "d.jsonl"):
        yield of_bytes("data name", f"compressed {name}", READ_OR_NAMED, gzip.compress(data), name)
    yield of_bytes("data encoding", "jsonl with a byte order mark", GOOD, b"\xef\xbb\xbf" + data, "d.jsonl")
    yield of_bytes("data encoding", "jsonl with CRLF", GOOD, data.replace(b"\n", b"\r\n"), "d.jsonl")
    texts = [f"é {text}" for text in DOCUMENTS]
    rows, prose = (
        "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts),
        "\n\n".join(texts * 9),
    )
    for encoding in ("utf-16", "utf-32", "latin-1"):  # the first two begin with a mark, by which they can be read
        of_rows, of_prose = (trained_on([text], share=0) for text in ("\0".join(texts), prose))
        named = refused("source")
        read = (
            (either(done(of_rows), named), either(done(of_prose), named)) if encoding != "latin-1" else (named, named)
        )
        yield of_bytes("data encoding", f"jsonl in {encoding}", read[0], rows.encode(encoding), "d.jsonl")
        few = "--trainer.max_steps=20"
        yield of_bytes("data encoding", f"txt in {encoding}", read[1], prose.encode(encoding), "d.txt", few)
    for _ in range(6):
        cut = random.randrange(1, len(data) - 1)
        whole = data[cut - 1 : cut] == b"\n" or data[cut : cut + 1] == b"\n"
        right = done() if whole else refused("source")
        yield of_bytes("data cut", f"jsonl at byte {cut}", right, data[:cut], "d.jsonl")
    for _ in range(8):
        at, bits = random.randrange(len(data)), random.randrange(1, 256)
        flipped = data[:at] + bytes([data[at] ^ bits]) + data[at + 1 :]
        yield of_bytes("data flipped", f"jsonl byte {at} xor {bits}", by_reading(flipped), flipped, "d.jsonl")
    text = "\n\n".join(f"{text}" * 12 for text in DOCUMENTS)
    for what, changed in {
        "blank lines": text,
        "CRLF": text.replace("\n", "\r\n"),
        "a byte order mark": "\ufeff" + text,
        "a document a line": "\n".join(text.replace("\n", " ") for text in DOCUMENTS * 20),
    }.items():
        plain = [changed.removeprefix("\ufeff"), changed.removeprefix("\ufeff").replace("\r\n", "\n")]
        right = done(trained_on([END.join(plain)]))
        yield of_bytes("data file", f"txt with {what}", right, changed.encode(), "d.txt", "--trainer.max_steps=20")
    yield of_bytes("data file", "txt with NUL", refused("source"), b"a\0b\n\n" * 500, "d.txt")
    for name in ("d.jsonl", "d.txt", "d.parquet", "d.json"):
        yield of_bytes("data file", f"empty {name}", refused("source"), b"", name)
        yield of_bytes("data file", f"blank {name}", refused("source"), b"\n \n", name)
        noise = random.randbytes(3000)
        yield of_bytes("data file", f"noise as {name}", refused("source"), noise, name)


def by_reading(data: bytes) -> Right:
    """Return the right outcome for a .jsonl file, from reading it line by line."""
    try:
        found = [json.loads(line) for line in data.decode("utf-8").split("\n") if line.strip()]
        texts = [row["text"] for row in found]
        good = all(isinstance(text, str) and text.encode() for text in texts)
    except (ValueError, KeyError, TypeError):
        good = False
    return done(trained_on(texts)) if good else refused("source")


def tables(random: Random) -> Iterator[Case]:
    """Yield Parquet files."""
    good = parquet({"text": DOCUMENTS})
    yield of_bytes("parquet", "good", GOOD, good, "d.parquet")
    for _ in range(5):
        cut = random.randrange(1, len(good))
        yield of_bytes("parquet", f"cut at byte {cut}", refused("source"), good[:cut], "d.parquet")
    for _ in range(6):
        at, bits = random.randrange(len(good)), random.randrange(1, 256)
        flipped = good[:at] + bytes([good[at] ^ bits]) + good[at + 1 :]
        yield of_bytes("parquet", f"byte {at} xor {bits}", either(done(), refused("source")), flipped, "d.parquet")
    texts = pyarrow.array(DOCUMENTS)
    large, coded = texts.cast(pyarrow.large_string()), texts.dictionary_encode()
    yield of_bytes("parquet", "large strings", GOOD, parquet({"text": large}), "d.parquet")
    yield of_bytes("parquet", "a dictionary of strings", READ_OR_NAMED, parquet({"text": coded}), "d.parquet")
    yield of_bytes(
        "parquet", "no rows", refused("source|train"), parquet({"text": pyarrow.array([], "string")}), "d.parquet"
    )
    yield of_bytes("parquet", "a null", READ_OR_NAMED, parquet({"text": [*DOCUMENTS, None]}), "d.parquet")
    yield of_bytes("parquet", "numbers", refused("text|source"), parquet({"text": list(range(40))}), "d.parquet")
    yield of_bytes("parquet", "bytes", READ_OR_NAMED, parquet({"text": texts.cast("binary")}), "d.parquet")
    yield of_bytes(
        "parquet", "lists", refused("text|source"), parquet({"text": [[text] for text in DOCUMENTS]}), "d.parquet"
    )


def table(texts: list[str]) -> str:
    """Return a .csv of one column."""
    return "\r\n".join(["text", *('"' + text.replace('"', '""') + '"' for text in texts)])


def parquet(columns: dict) -> bytes:
    file = BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), file)
    return file.getvalue()
