"""Training data with odd rows, columns, chat messages and folders, also under inspect, validate and test."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Iterator
from pathlib import Path
from random import Random

from benchmarks.bad_input.data import (
    DOCUMENTS,
    FIT,
    GOOD,
    READ_OR_NAMED,
    case,
    lines,
    of_bytes,
    parquet,
    table,
    trained_on,
)
from benchmarks.bad_input.verdict import Case, done, either, refused


def cases(random: Random) -> Iterator[Case]:
    yield from odd_rows()
    yield from odd_values()
    yield from odd_columns()
    yield from odd_shapes()
    yield from conversations()
    yield from folders()
    yield from links_in_folders()
    yield from elsewhere(random)


ROWS = [{"text": text} for text in DOCUMENTS]


def odd_rows() -> Iterator[Case]:
    """Yield one odd row among good ones."""
    odd = {
        "a number for a text": {"text": 5},
        "true for a text": {"text": True},
        "a list for a text": {"text": ["a"]},
        "an object for a text": {"text": {"a": "b"}},
        "a row that is a list": ["text"],
        "a row that is a number": 5,
        "a lone surrogate": {"text": "a \ud83d b " * 9},
    }
    for what, row in odd.items():
        at_end, at_first = [*ROWS, row], [row, *ROWS]
        for place, data in (("last", lines(at_end)), ("first", lines(at_first))):
            yield of_bytes("rows", f"{what}, {place}", refused("source|text"), data, "d.jsonl")
    kept = {
        "a null": {"text": None},
        "an empty text": {"text": ""},
        "blanks alone": {"text": " \n "},
        "another column": {"text": DOCUMENTS[0], "meta": "x"},
        "the row twice": ROWS[0],
        "the key twice": None,
    }
    for what, row in kept.items():
        line = b'{"text": "zzz", "text": ' + json.dumps(DOCUMENTS[0]).encode() + b"}\n" if row is None else lines([row])
        yield of_bytes("rows", what, READ_OR_NAMED, lines(ROWS) + line, "d.jsonl")


def odd_values() -> Iterator[Case]:
    """Yield values that a reader could take for another type or for a token."""
    mixed = [
        {"text": text, "meta": value} for text, value in zip(DOCUMENTS, [None, 1, "a", [1], {"a": 1}] * 8, strict=True)
    ]
    yield of_bytes("rows", "a column of many types beside the text", GOOD, lines(mixed), "d.jsonl")
    late = [{"text": text * 300, "meta": None} for text in DOCUMENTS] + [{"text": "x", "meta": "late"}]
    yield of_bytes(
        "rows",
        "null for 1 MB, then a text",
        done(trained_on([each["text"] for each in late], share=0)),
        lines(late),
        "d.jsonl",
        "--trainer.max_steps=3",
    )
    dates = [f"2024-01-{i % 28 + 1:02d}" for i in range(40)]
    yield of_bytes(
        "rows", "dates as texts", done(trained_on(dates, share=0)), lines([{"text": each} for each in dates]), "d.jsonl"
    )
    times = [{"prompt": f"day {i} is ", "completion": f"2024-01-{i % 28 + 1:02d}T0{i % 9}:00:00Z"} for i in range(40)]
    right = done(trained_on([], [each["completion"] for each in times]))
    yield of_bytes("rows", "times as completions", right, lines(times), "d.jsonl", "--data.block_size=64")
    ends = [f"a{END_INSIDE}b{i} " * 4 for i in range(40)]
    pieces = [piece for text in ends for piece in text.split(END_INSIDE)]
    yield of_bytes(
        "rows",
        "end of text spelled in a text",
        done(trained_on([*ends, *pieces], share=0)),
        lines([{"text": each} for each in ends]),
        "d.jsonl",
    )


def odd_columns() -> Iterator[Case]:
    """Yield rows without the columns of any kind of data."""
    for what, columns in COLUMNS.items():
        yield of_bytes("columns", what, refused("source|text_column|messages|prompt"), lines([columns] * 40), "d.jsonl")


def odd_shapes() -> Iterator[Case]:
    """Yield files of unusual form, nesting or size."""
    yield of_bytes("rows", "a list of objects in .json", GOOD, json.dumps(ROWS).encode(), "d.json")
    yield of_bytes(
        "rows", "one object in .json", refused("source|val_fraction|rows"), json.dumps(ROWS[0]).encode(), "d.json"
    )
    yield of_bytes(
        "rows", "a text of 5000 digits", refused("source"), lines(ROWS) + b'{"text": ' + b"9" * 5000 + b"}\n", "d.jsonl"
    )
    yield of_bytes(
        "rows",
        "nested 5000 deep",
        refused("source"),
        lines(ROWS) + b'{"text": ' + b"[" * 5000 + b"]" * 5000 + b"}\n",
        "d.jsonl",
    )
    yield of_bytes(
        "rows",
        "a document of 6 MB",
        either(done(), refused("source")),
        lines([*ROWS, {"text": "ab " * 2_000_000}]),
        "d.jsonl",
        "--trainer.max_steps=3",
    )


END_INSIDE = "<|endoftext|>"
COLUMNS = {
    "content": {"content": "a b c"},
    "Text": {"Text": "a b c"},
    "nothing": {},
    "prompt alone": {"prompt": "a"},
    "completion alone": {"completion": "a"},
    "prompt and response": {"prompt": "a", "response": "b"},
}


def conversations() -> Iterator[Case]:
    """Yield chat messages, for a model with a chat template."""

    def talk(i: int) -> list[dict]:
        return [{"role": "user", "content": f"say {i}"}, {"role": "assistant", "content": f"it is {i} and {i * i}"}]

    good = [{"messages": talk(i)} for i in range(40)]
    more = ("--model={place}/chat", "--data.block_size=64")
    said = [f"it is {i} and {i * i}\n" for i in range(40)]
    two = [f"{said[0]}{said[1]}"]  # scored in one row
    right = done(trained_on([], [*said, *two]))
    yield of_bytes("messages", "good", right, lines(good), "d.jsonl", *more)
    odd = {
        "a role of 5": [{"role": 5, "content": "a"}],
        "no content": [{"role": "user"}],
        "content a list": [{"role": "user", "content": ["a"]}],
        "content null": [*talk(0), {"role": "assistant", "content": None}],
        "a text": "messages",
        "an object": {"role": "user", "content": "a"},
        "a surrogate": [{"role": "user", "content": "\ud800"}, {"role": "assistant", "content": "a"}],
        "texts": ["a", "b"],
    }
    for what, messages in odd.items():
        yield of_bytes(
            "messages", what, refused("source|messages"), lines([*good, {"messages": messages}]), "d.jsonl", *more
        )
    kept = {
        "no messages": [],
        "user alone": talk(0)[:1],
        "the assistant opens": [{"role": "assistant", "content": "it is 0 and 0"}, *talk(1)],
    }
    for what, messages in kept.items():
        yield of_bytes(
            "messages",
            what,
            either(right, refused("source|messages")),
            lines([*good, {"messages": messages}]),
            "d.jsonl",
            *more,
        )
    yield of_bytes(
        "messages",
        "nobody answers",
        refused("source|messages|block_size|rows"),
        lines([{"messages": talk(0)[:1]}] * 40),
        "d.jsonl",
        *more,
    )
    yield of_bytes("messages", "no template", refused("template"), lines(good), "d.jsonl")


TEXTS = {f"{i}.txt": text for i, text in enumerate(DOCUMENTS)}
READ = done(trained_on(DOCUMENTS))
READ_OR_REFUSED = either(READ, refused("source"))


def folders() -> Iterator[Case]:
    """Yield folders of several files."""
    jsonl, texts, plain, told = {"train.jsonl": lines()}, TEXTS, READ, READ_OR_REFUSED
    kinds = {
        "texts": (plain, texts),
        "texts, one in Latin-1": (told, {**texts, "z.txt": "é".encode("latin-1") * 30}),
        "texts and a picture": (told, {**texts, "z.png": b"\x89PNG\r\n\x1a\n\0\0"}),
        "texts and an empty one": (plain, {**texts, "z.txt": ""}),
        "texts with marks": (plain, {name: b"\xef\xbb\xbf" + text.encode() for name, text in texts.items()}),
        "a jsonl and README.md": (told, {**jsonl, "README.md": "# readme\n"}),
        "a jsonl, README.md, LICENSE, .gitattributes": (
            told,
            {**jsonl, "README.md": "# readme\n", "LICENSE": "free\n", ".gitattributes": "x"},
        ),
        "a jsonl and dataset_info.json": (told, {**jsonl, "dataset_info.json": '{"splits": 1}'}),
        "one .json of a list": (told, {"train.json": json.dumps([{"text": text} for text in DOCUMENTS])}),
        "a .JSONL": (told, {"train.JSONL": lines()}),
        "a .ndjson": (told, {"train.ndjson": lines()}),
        "a .csv": (READ, {"train.csv": table(DOCUMENTS)}),
        "a .csv.gz": (READ, {"train.csv.gz": gzip.compress(table(DOCUMENTS).encode())}),
        "a .csv with a row cut": (refused("source"), {"train.csv": "a,text\n" + table(DOCUMENTS)}),
        "a .xlsx": (refused("source"), {"train.xlsx": "text\na\nb\n"}),
        "a .jsonl.gz": (refused("source"), {"train.jsonl.gz": b"\x1f\x8b\x08\0\0"}),
        "jsonl and parquet": (refused("source"), {**jsonl, "train.parquet": parquet({"text": DOCUMENTS})}),
        "two jsonl, one empty": (told, {**jsonl, "more.jsonl": b""}),
        "two jsonl, one cut": (refused("source"), {**jsonl, "more.jsonl": b'{"text": "a'}),
        "jsonl of other columns": (told, {**jsonl, "more.jsonl": b'{"content": "a"}\n'}),
        "nothing": (refused("source"), {}),
        "hidden files": (refused("source"), {".a.txt": "a"}),
        "a tokenizer beside a jsonl": (told, {**jsonl, "tokenizer.json": "{}", "config.json": "{}"}),
    }
    for what, (right, content) in kinds.items():
        yield case("folder", what, right, lambda here, content=content: write(here / "d", content), "d")


def links_in_folders() -> Iterator[Case]:
    """Yield folders of texts and an entry that is not a plain file, and a link to a folder."""
    texts, plain, told = TEXTS, READ, READ_OR_REFUSED
    links = {
        "a link to nothing": "nothing",
        "a link to itself": "z.txt",
        "a link to the folder": ".",
        "a link to /dev/zero": "/dev/zero",
    }
    for what, target in links.items():
        yield case(
            "folder",
            f"texts and {what}",
            told,
            lambda here, target=target: (write(here / "d", texts), (here / "d" / "z.txt").symlink_to(target)),
            "d",
        )
    yield case(
        "folder",
        "texts and a pipe",
        told,
        lambda here: (write(here / "d", texts), os.mkfifo(here / "d" / "z.txt")),
        "d",
    )
    yield case(
        "folder",
        "a link to a folder",
        plain,
        lambda here: (write(here / "e", texts), (here / "d").symlink_to("e")),
        "d",
    )
    yield case(
        "folder",
        "a name that is no UTF-8",
        told,
        lambda here: (write(here / "d", texts), (here / "d" / os.fsdecode(b"\xff.txt")).write_text(DOCUMENTS[0])),
        "d",
    )


def write(folder: Path, content: dict[str, str | bytes]) -> None:
    folder.mkdir()
    for name, data in content.items():
        (folder / name).write_bytes(data if isinstance(data, bytes) else data.encode())


def elsewhere(random: Random) -> Iterator[Case]:
    """Yield bad data for inspect, validate and test."""
    data = lines()
    bad = {
        "cut": data[: random.randrange(len(data) // 2)] + b'{"text',
        "utf-16": data.decode().encode("utf-16"),
        "noise": random.randbytes(2000),
        "empty": b"",
        "blank": b"\n\n",
        "other columns": lines([{"content": "a"}] * 9),
        "a number": lines([{"text": 5}] * 9),
        "5000 digits": b'{"text": ' + b"9" * 5000 + b"}\n",
        "a list": b"[1, 2]\n",
    }
    for what, content in bad.items():
        prepare = lambda here, content=content: (here / "d.jsonl").write_bytes(content)  # noqa: E731
        named = either(done(), refused("data")) if what == "utf-16" else refused("data")
        inspected = ("--model={place}/llama", "--output={here}/out", "--data={here}/d.jsonl", "--block_size=16")
        yield Case("inspect", "data file", what, inspected, named, prepare)
        for command in ("validate", "test"):
            arguments = (
                *(each for each in FIT if "callbacks" not in each),
                "--data.source={here}/d.jsonl",
                "--data.test_fraction=0.3",
            )
            right = either(done(), refused("source")) if what == "utf-16" else refused("source")
            yield Case(command, "data file", what, arguments, right, prepare)
