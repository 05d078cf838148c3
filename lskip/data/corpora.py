"""Plain text on this machine: the embedded corpora, and documents out of files of text."""

import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_warn

from lskip.data.files import LONGEST, NotTextError, files_below, numbered_lines

SKIPPED_FOLDERS = ("site-packages", "dist-packages", "test", "tests", "testing", "idle_test", "__pycache__")
PROSE_DOCUMENT = 4000  # characters after which a long .txt is cut at the next blank line
LINES, BLANK_LINES, EMPTY_LINES = range(3)
PLACE = "lskip: place"  # the column of a row that says where it stands in its file


def standard_library_files() -> list[Path]:
    """The running interpreter's own .py files, without its tests and `pydoc`'s manual (about 12 MB).

    The manual is prose inside a .py file; kept out of training, it is what held-out prose is read on.
    """
    skipped = (*SKIPPED_FOLDERS, "pydoc_data")
    return files_below(Path(sysconfig.get_path("stdlib")), suffix=".py", skipped=skipped)


def installed_package_files() -> list[Path]:
    """The .py files of everything installed beside lskip (torch, transformers, numpy ...), without tests."""
    folders = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    return sorted(
        path for folder in folders for path in files_below(Path(folder), suffix=".py", skipped=SKIPPED_FOLDERS)
    )


EMBEDDED = {"stdlib": standard_library_files, "packages": installed_package_files}


def read_texts(paths: list[str], lone: bool = False) -> Iterator[dict]:
    """Yield {"text": ...} for each document: a .txt is cut, any other file is one document.

    Of several files those that are not UTF-8 text (an image, an old encoding) are left out, with a warning.

    Raises:
        ValueError: a file cannot be read, or a `lone` one is not text.
    """
    left_out = []
    for path in map(Path, paths):
        try:
            separator = separator_of(path)
        except NotTextError:
            if lone:
                raise
            left_out.append(path)
            continue
        for number, text in cut_lines(numbered_lines(path), path, separator, lone):
            yield {"text": text, PLACE: f"line {number}" if lone else f"'{path}' line {number}"}
    if left_out:
        rank_zero_warn(f"source: {len(left_out)} files are not UTF-8 text and are left out, such as {left_out[0]}")


def separator_of(path: Path) -> int:
    """Return what stands between a file's documents: EMPTY_LINES, else BLANK_LINES (of spaces), else LINES end them.

    What is blank before and behind all text separates nothing. The whole file is looked at: none is read in half.
    """
    found = between = LINES
    begun = False
    for _, line in numbered_lines(path):
        if line.strip():
            found, between, begun = max(found, between), LINES, True
        elif begun:
            between = max(between, EMPTY_LINES if line == "\n" else BLANK_LINES)
    return found


def cut_lines(
    lines: Iterable[tuple[int, str]], path: Path, separator: int, lone: bool, size: int = PROSE_DOCUMENT
) -> Iterator[tuple[int, str]]:
    """Yield the number of its first line and the text of each document.

    A .txt is cut behind the first empty line after `size` characters (a book is one file, but a split by document
    needs many), or behind one of spaces where none is empty. A lone .txt without either has a document a line.
    Any other file is one document.
    """
    is_txt, by_line = path.suffix.lower() == ".txt", lone and separator == LINES
    begin, held, length = 1, [], 0
    for number, line in lines:
        if is_txt and by_line:
            if line.strip():
                yield number, line.rstrip("\r\n")
            continue
        ends = line == "\n" if separator == EMPTY_LINES else not line.strip()
        is_whole = is_txt and ends and length > size
        held.append(line)
        length += len(line)
        if length > LONGEST:
            raise ValueError(f"source: '{path}': a document of more than {LONGEST:,} characters (line {begin}), cut it")
        if is_whole:
            yield begin, "".join(held)
            begin, held, length = number + 1, [], 0
    if held:
        yield begin, "".join(held)
