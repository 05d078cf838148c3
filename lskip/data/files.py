"""Files of a source: selection by kind, with a warning for those left out, and reading line by line."""

import codecs
import io
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count, islice
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_warn

from lskip.utils.foreign import first_line

TABLES = {
    **{".jsonl": "json", ".ndjson": "json", ".json": "json", ".parquet": "parquet"},
    **{".csv": "csv", ".tsv": "csv"},
}
CODECS = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd"}  # of pyarrow, behind the suffix of what is compressed
PACKED = (".xz", ".lz4", ".zip", ".tar", ".tgz", ".7z", ".rar")
# Kinds that are not read; other binary files are recognized by their content.
NOT_READ = (*PACKED, ".xls", ".xlsx", ".arrow", ".feather", ".pdf", ".rtf", ".doc", ".docx", ".odt")
READ = ".txt, .jsonl, .ndjson, .json, .csv, .tsv (or these as .gz, .bz2, .zst), .parquet or any file of UTF-8 text"
# Files that describe a data set cloned from a hub.
CARDS = ("readme", "license", "licence", "citation", "dataset_info", "dataset_infos", "dataset_dict", "state")
HELD_OUT = re.compile(r"(test|validation|valid|val|dev|eval)\b", re.ASCII)  # names of other splits' files
BOMS = {  # UTF-32 first: its mark begins with that of UTF-16
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
LONGEST = 2**28  # characters of a document, or of a line
LFS_POINTER = "version https://git-lfs.github.com/spec/"


class NotTextError(ValueError):
    """A file whose content is not UTF-8 text, nor text in the encoding of its byte order mark."""


def suffix_of(path: Path) -> str:
    """Return the suffix that says what a file holds, in small letters: of a.JSONL.gz it is .jsonl."""
    return (Path(path.stem) if path.suffix.lower() in CODECS else path).suffix.lower()


def kind_of(path: Path) -> str | None:
    """Return "json", "csv", "parquet" or "text" by the file's suffix; None for a kind that is not read."""
    suffix = suffix_of(path)
    if suffix in NOT_READ or (suffix == ".parquet" and suffix != path.suffix.lower()):
        return None
    return TABLES.get(suffix, "text")


def check_is_read(path: Path) -> None:
    if not path.is_file():
        raise ValueError(f"source: '{path}' is neither a file nor a folder")
    if kind_of(path) is None:
        suffix = suffix_of(path)
        if suffix == ".parquet":
            raise ValueError(f"source: '{path}': a .parquet file is compressed inside; unpack it first")
        advice = "unpack it first" if suffix in PACKED else f"give {READ}"
        raise ValueError(f"source: '{path}': a {suffix} file is not read; {advice}")


def files_below(folder: Path, suffix: str = "", skipped: tuple[str, ...] = (), follow: bool = False) -> list[Path]:
    """Return the sorted files under `folder` whose names end in `suffix`, without hidden files and `skipped` folders.

    With `follow`, links to folders are followed, each folder only once.
    """
    found, seen = [], set()
    for parent, folders, names in os.walk(folder, followlinks=follow):
        place = os.path.realpath(parent)
        if place in seen:
            folders.clear()
            continue
        seen.add(place)
        folders[:] = sorted(name for name in folders if name not in skipped and not name.startswith("."))
        found += [Path(parent, name) for name in names if name.endswith(suffix) and not name.startswith(".")]
    return sorted(found)


def folder_files(folder: Path) -> tuple[list[Path], str]:
    """Return the files of a folder to read, and their kind: rows, unless more files are text.

    A .json file beside text counts as rows if it begins with some, else as text. Files left out are named in a warning.

    Raises:
        ValueError: no files to read, or rows of different kinds.
    """
    files = files_below(folder, skipped=("__pycache__",), follow=True)
    kinds = {file: kind_of(file) if file.is_file() or file.is_symlink() else None for file in files}
    cards = {file for file in files if file.name.lower().split(".")[0] in CARDS}
    texts = [file for file in files if kinds[file] == "text" and file not in cards]
    rows = [file for file in files if kinds[file] in ("json", "csv", "parquet") and file not in cards]
    if texts:
        rows = [file for file in rows if suffix_of(file) != ".json" or begins_as_rows(file)]
    if rows and len(rows) >= len(texts):
        check_one_kind(folder, rows)
        kept, kind = rows, kinds[rows[0]]
    else:
        kept, kind = [file for file in files if kinds[file] == "text" or suffix_of(file) == ".json"], "text"
        warn(folder, "files of rows are read as text", set(kept) & set(rows))
    if set(kept) <= cards and None in kinds.values():
        kept = []  # only what save_to_disk writes beside its .arrow files
    left_out = set(files) - set(kept)
    if not kept:
        raise ValueError(f"source: '{folder}' holds no text files{an_example(left_out)}")
    warn(folder, "files left out", left_out)
    if any(file.name.startswith("train") for file in kept):
        warn(folder, "files of other splits are read as well", {file for file in kept if HELD_OUT.match(file.name)})
    return kept, kind


def check_one_kind(folder: Path, rows: list[Path]) -> None:
    if len({kind_of(file) for file in rows}) > 1:
        suffixes = " and ".join(sorted({suffix_of(file) for file in rows}))
        raise ValueError(f"source: folder '{folder}' holds {suffixes} files; name a folder with one kind")


def warn(folder: Path, what: str, files: set[Path]) -> None:
    if files:
        rank_zero_warn(f"source: folder '{folder}': {len(files)} {what}{an_example(files)}")


def an_example(files: set[Path]) -> str:
    return f", such as {min(files).name}" if files else ""


def begins_as_rows(path: Path) -> bool:
    """Return whether a .json file begins with a list of objects, or with an object on each of two lines."""
    try:
        first, second = ([line.strip() for _, line in islice(numbered_lines(path), 2)] + ["", ""])[:2]
        if first.startswith("["):
            return (first[1:].strip() or second).startswith("{")
        return second.startswith("{") and isinstance(json.loads(first), dict)
    except (NotTextError, json.JSONDecodeError, RecursionError):
        return False


def open_bytes(path: Path) -> io.BufferedReader:
    """Open a file to read; a compressed one is unpacked as it is read."""
    codec = CODECS.get(path.suffix.lower())
    if codec is None:
        return path.open("rb")
    import pyarrow  # slow import: only when needed

    return io.BufferedReader(pyarrow.input_stream(str(path), compression=codec))


def encoding_of(path: Path) -> str:
    with open_bytes(path) as file:
        begin = file.read(4)
    return next((encoding for mark, encoding in BOMS.items() if begin.startswith(mark)), "utf-8")


@contextmanager
def opened(path: Path) -> Iterator[io.TextIOWrapper]:
    """Open a text file whose lines end in "\\n" alone; raise ValueError if it cannot be read."""
    try:
        with io.TextIOWrapper(open_bytes(path), encoding_of(path), newline="\n") as file:
            yield file
    except OSError as error:  # without strerror: a compressed file that is damaged
        raise ValueError(f"source: cannot read '{path}' ({error.strerror or first_line(error)})") from error


def numbered_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the number (1-based) and the text of each line, with its line break.

    Raises:
        NotTextError: a line is not text. ValueError: a line is too long.
    """
    with opened(path) as file:
        read = in_bytes if file.encoding.startswith("utf-8") else in_characters
        if file.encoding == "utf-8-sig":
            file.buffer.read(len(codecs.BOM_UTF8))
        for number in count(1):
            try:
                line, is_long = read(file, LONGEST + 1)
            except UnicodeError as error:
                raise NotTextError(f"source: '{path}' is not UTF-8 text (line {number})") from error
            if "\0" in line:
                raise NotTextError(f"source: '{path}' is not text (NUL bytes in line {number})")
            if is_long:
                raise ValueError(f"source: '{path}': line {number} is longer than {LONGEST:,} characters, cut it first")
            if number == 1 and line.startswith(LFS_POINTER):
                raise ValueError(f"source: '{path}' is not here, only Git LFS's note of it; run: git lfs pull")
            if not line:
                return
            yield number, line


def in_characters(file: io.TextIOWrapper, limit: int) -> tuple[str, bool]:
    """Return a line, at most `limit` characters of it, and whether it is longer."""
    line = file.readline(limit)
    return line, len(line) >= limit


def in_bytes(file: io.TextIOWrapper, limit: int) -> tuple[str, bool]:
    """Return the same as `in_characters`, but decode only this line, so that a decoding error is of this line."""
    line = file.buffer.readline(limit)
    is_long = len(line) >= limit  # then the cut may be inside a character
    return line.decode("utf-8", errors="ignore" if is_long else "strict"), is_long
