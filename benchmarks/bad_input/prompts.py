"""Bad prompt files: cut, corrupted, in other encodings, with missing keys, wrong types or other names; and links.

This module's own reader decides whether a file is valid and what it holds.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from random import Random

from benchmarks.bad_input.checks import answers, numbered
from benchmarks.bad_input.fixtures import PROMPTS
from benchmarks.bad_input.verdict import Case, Right, done, either, refused

WRITTEN = ("line", "text", "tokens", "seconds", "acceptance_rate", "tokens_per_round", "finish_reason", "seed")
BOM = b"\xef\xbb\xbf"
LINES = [
    {"prompt": "def f(x):", "id": 1},
    {"prompt": "for i in range", "tags": ["ä", "🙂"], "nested": {"a": None}},
    {"prompt": "import os, sys"},
    {"prompt": "x = 1\n", "kind": "text with its newline"},
]
GOOD = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in LINES)


def read(data: bytes) -> tuple[list[dict] | None, str]:
    """Return the rows of a .jsonl file, or None and the words of the error."""
    try:
        lines = data.decode("utf-8-sig").split("\n")
    except UnicodeDecodeError:
        return None, "UTF-8"
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
        except (ValueError, RecursionError):
            return None, f"line {number}"
        if not is_prompt(fields):
            return None, f"line {number}"
        rows.append({**fields, "line": number})
    return (rows, "") if rows else (None, "prompt")


def is_prompt(fields) -> bool:
    """Return whether it is an object with either prompt or messages, valid UTF-8, and no key that predict writes."""
    if not isinstance(fields, dict) or ("prompt" in fields) == ("messages" in fields):
        return False
    if any(name in fields for name in WRITTEN):
        return False
    try:
        json.dumps(fields, ensure_ascii=False, allow_nan=False).encode("utf-8")
    except ValueError:  # a lone surrogate, or NaN, which is no JSON
        return False
    if "prompt" in fields:
        return isinstance(fields["prompt"], str) and bool(fields["prompt"].strip())
    return False  # the model of these cases has no chat template


def cases(random: Random) -> Iterator[Case]:
    for what, data in [*mutations(random), *by_hand()]:
        yield of_file("jsonl", what, data)
    for what, data, prompts in text_files(random):
        right = refused("prompts", prompts) if isinstance(prompts, str) else done(answers(prompts))
        yield case("txt", what, right, writes("p.txt", data), "{here}/p.txt")
    yield from names()
    yield from outputs(random)


def of_file(kind: str, what: str, data: bytes) -> Case:
    rows, named = read(data)
    right = done(answers(rows)) if rows is not None else refused("prompts", named)
    if what == "the same key twice":
        right = either(right, refused("prompts", "line 1"))
    return case(kind, what, right, writes("p.jsonl", data), "{here}/p.jsonl")


def case(kind: str, what: str, right: Right, prepare: Callable[[Path], object], file: str, *more: str) -> Case:
    arguments = (f"--prompts={file}", "--model={place}/llama", "--max_new_tokens=4", "--device=cpu")
    return Case(
        "predict", kind, what, (*arguments, "--output={here}/out.jsonl", *more), right, prepare, makes=("out.jsonl",)
    )


def writes(name: str, data: bytes) -> Callable[[Path], object]:
    return lambda here: (here / name).write_bytes(data)


def mutations(random: Random) -> Iterator[tuple[str, bytes]]:
    """Yield the good file with one change each."""
    data = GOOD.encode()
    for _ in range(8):
        cut = random.randrange(len(data))
        yield f"cut at byte {cut}", data[:cut]
    for _ in range(10):
        place, bits = random.randrange(len(data)), random.randrange(1, 256)
        yield f"byte {place} xor {bits}", data[:place] + bytes([data[place] ^ bits]) + data[place + 1 :]
    for _ in range(6):
        place, more = (
            random.randrange(len(data)),
            random.choice([b"\0", b"\x1b[2J", b"\r", b"\x85", b"\xe2\x80\xa8", b"\xff"]),
        )
        yield f"{more!r} at byte {place}", data[:place] + more + data[place:]
    for _ in range(14):
        row, value = random.randrange(len(LINES)), random.choice(VALUES)
        key = random.choice(["prompt", "prompt", "id", "messages", "line", "text", "seed", "🙂", "", "prompt "])
        changed = [{**line, key: value} if index == row else line for index, line in enumerate(LINES)]
        yield (
            f"line {row + 1}: {key}: {str(value)[:30]!r}",
            "".join(json.dumps(line) + "\n" for line in changed).encode(),
        )


VALUES = [
    *(None, True, 5, -1.5, [], {}, "", " ", "\n", "\ud83d", "\0", "\u202e", ["a"], {"a": 1}, "🙂" * 20),
    *(10**30, float("nan"), float("inf"), [{"role": "user", "content": "x"}], [{"role": 5, "content": "x"}]),
    *([{"role": "user"}], [[]], "\x1b]0;x\x07"),
]


def by_hand() -> Iterator[tuple[str, bytes]]:
    good = GOOD.encode()
    yield "byte order mark", BOM + good
    yield "two byte order marks", BOM + BOM + good
    yield "CRLF", good.replace(b"\n", b"\r\n")
    yield "blank lines, no newline at the end", b"\n\n  \n" + good.replace(b"\n", b"\n\n").rstrip()
    for encoding in ("utf-16", "utf-32-le", "latin-1", "cp1252", "gb18030"):
        yield encoding, GOOD.replace("🙂", "ö").encode(encoding)
    yield "empty", b""
    yield "one list", json.dumps(LINES).encode()
    yield "indented", json.dumps(LINES[0], indent=1).encode()
    yield "5000 digits", good + b'{"prompt": "a", "n": ' + b"9" * 5000 + b"}\n"
    yield "nested 100,000 deep", good + b'{"prompt": "a", "n": ' + b"[" * 100_000 + b"]" * 100_000 + b"}\n"
    yield "nested 900 deep", b'{"prompt": "a", "n": ' + b"[" * 900 + b"]" * 900 + b"}\n"
    yield "NaN in a carried field", b'{"prompt": "a", "n": NaN}\n'
    yield "1e999 in a carried field", b'{"prompt": "a", "n": 1e999}\n'
    yield "the same key twice", b'{"prompt": "a", "prompt": "b"}\n'
    yield "surrogate as a key", b'{"prompt": "a", "\\ud800": 1}\n'
    yield "surrogate in a list", good + b'{"prompt": "a", "x": ["\\udfff"]}\n'
    yield "two surrogates that are a pair", b'{"prompt": "\\ud83d\\ude42"}\n'
    yield "single quotes", b"{'prompt': 'a'}\n"
    yield "a comma too many", b'{"prompt": "a",}\n'
    yield "comments", b'# prompts\n{"prompt": "a"}\n'
    yield "gzip", __import__("gzip").compress(good)
    yield "random bytes", bytes(Random(0).randrange(256) for _ in range(2000))


def text_files(random: Random) -> Iterator[tuple[str, bytes, list[dict] | str]]:
    """Yield (description, content, expected rows or words of the error)."""
    lines = "\n".join(PROMPTS)
    yield "byte order mark", BOM + lines.encode(), numbered(PROMPTS)
    yield "CRLF", lines.replace("\n", "\r\n").encode(), numbered(PROMPTS)
    yield "rare line ends", "a\u2028b\x0bc\x85d\x1ce".encode(), numbered(["a\u2028b\x0bc\x85d\x1ce"])
    yield "blank lines", b"\n\n \ndef f(x):\n\t\n", [{"prompt": "def f(x):", "line": 4}]
    yield "JSON in a text", b'{"prompt": "a"}\n', numbered(['{"prompt": "a"}'])
    yield "utf-16", lines.encode("utf-16"), "UTF-8"
    yield "latin-1", "café\n".encode("latin-1"), "UTF-8"
    yield "nothing but blanks", b" \n\t\n\n", "prompt"
    yield "empty but for a mark", BOM, "prompt"
    yield "too long for the context", ("x y " * 500).encode(), "line 1"
    yield "a line of 5 MB", b"def f\n" + b"ab " * 1_700_000, "line 2"
    data = "caf\u00e9 \u65e5\u672c\n".encode() * 3
    for _ in range(4):
        cut = random.randrange(1, len(data))
        try:
            whole = data[:cut].decode()
            yield f"cut at byte {cut}", data[:cut], numbered([line for line in whole.split("\n") if line.strip()])
        except UnicodeDecodeError:
            yield f"cut at byte {cut}", data[:cut], "UTF-8"


def names() -> Iterator[Case]:
    """Yield other file names, folders and links."""
    good = GOOD.encode()
    whole = done(answers(read(good)[0]))
    for name in ("P.JSONL", "p.ndjson", "p.json", "p.csv", "p.md", "p", "p.jsonl.gz", "p.txt.bak", ".jsonl", "p.TXT"):
        right = either(whole, done(answers(numbered(GOOD.split("\n")[:-1]))), refused("prompts"))
        if name == "P.JSONL":
            right = either(whole, refused("prompts"))
        yield case("name", name, right, writes(name, good), f"{{here}}/{name}")
    yield case(
        "link",
        "to a good file",
        whole,
        lambda here: (writes("a", good)(here), (here / "p.jsonl").symlink_to("a")),
        "{here}/p.jsonl",
    )
    for name, make in {
        "a folder": lambda path: path.mkdir(),
        "a link to itself": lambda path: path.symlink_to(path),
        "a link to nothing": lambda path: path.symlink_to("nothing"),
        "a link to /dev/zero": lambda path: path.symlink_to("/dev/zero"),
        "a pipe": lambda path: __import__("os").mkfifo(path),
    }.items():
        yield case("link", name, refused("prompts"), lambda here, make=make: make(here / "p.jsonl"), "{here}/p.jsonl")
    yield case(
        "link", "output = prompts", refused("output"), writes("out.jsonl", good), "{here}/out.jsonl", "--overwrite=true"
    )
    yield case(
        "link",
        "output a link to prompts",
        refused("output"),
        lambda here: (writes("p.jsonl", good)(here), (here / "out.jsonl").symlink_to("p.jsonl")),
        "{here}/p.jsonl",
        "--overwrite=true",
    )


def outputs(random: Random) -> Iterator[Case]:
    """Yield unfinished outputs: --resume continues complete lines and refuses those of other prompts."""
    rows = [
        {
            "prompt": text,
            "line": line,
            "text": "x",
            "tokens": 1,
            "seconds": 0.1,
            "acceptance_rate": None,
            "tokens_per_round": None,
            "finish_reason": "length",
            "seed": line - 1,
        }
        for line, text in enumerate(PROMPTS, 1)
    ]
    first, second = (json.dumps(row) + "\n" for row in rows[:2])
    found = {
        "a line of another prompt": json.dumps({**rows[0], "prompt": "other"}) + "\n",
        "the same line twice": first + first,
        "a line beyond the prompts": json.dumps({**rows[0], "line": 9}) + "\n",
        "line is a text": json.dumps({**rows[0], "line": "1"}) + "\n",
        "line is true": json.dumps({**rows[0], "line": True}) + "\n",
        "line is 1.0": json.dumps({**rows[0], "line": 1.0}) + "\n",
        "no JSON before the end": "{\n" + first,
        "a list": "[1]\n",
        "nested 100,000 deep": "[" * 100_000 + "\n",
        "5000 digits": '{"line": ' + "9" * 5000 + "}\n",
        "binary": "\0\x01\x02\n",
    }
    for what, text in found.items():
        yield case(
            "resume",
            what,
            refused("output"),
            writes("out.jsonl", text.encode()),
            "{place}/prompts.txt",
            "--resume=true",
        )
    for _ in range(4):
        text = (first + second).encode()
        cut = random.randrange(1, len(text))
        whole = text[: text.rfind(b"\n", 0, cut) + 1]  # half a line at the end is nobody's answer, and goes
        stays = lambda seen, w=whole: None if (seen.here / "out.jsonl").read_bytes() == w else "lines are lost"  # noqa: E731
        right = either(refused("output|resume", check=stays), done(answers(numbered(PROMPTS), model=None)))
        begun = writes("out.jsonl", text[:cut])
        found = case("resume", f"cut at byte {cut}", right, begun, "{place}/prompts.txt", "--resume=true")
        yield replace(found, leaves=("out.jsonl",))
