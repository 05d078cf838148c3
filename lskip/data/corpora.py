"""Plain text on this machine: the embedded corpora, and the documents of text files."""

import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_warn

from lskip.data.files import LONGEST, NotTextError, files_below, numbered_lines, suffix_of

SKIPPED_FOLDERS = ("site-packages", "dist-packages", "test", "tests", "testing", "idle_test", "__pycache__")
PROSE_DOCUMENT = 4000  # characters after which a long .txt is cut at the next blank line
LINES, BLANK_LINES, EMPTY_LINES = range(3)
PLACE = "lskip: place"  # column: position of a row in its file


def standard_library_files() -> list[Path]:
    """Return the .py files of the standard library (about 12 MB), without tests and without pydoc_data.

    pydoc_data is prose in a .py file, kept out of training to evaluate on unseen prose.
    """
    skipped = (*SKIPPED_FOLDERS, "pydoc_data")
    return files_below(Path(sysconfig.get_path("stdlib")), suffix=".py", skipped=skipped)


def installed_package_files() -> list[Path]:
    """Return the .py files of all installed packages (torch, transformers, numpy …), without tests."""
    folders = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    return sorted(
        path for folder in folders for path in files_below(Path(folder), suffix=".py", skipped=SKIPPED_FOLDERS)
    )


EMBEDDED = {"stdlib": standard_library_files, "packages": installed_package_files}


def read_texts(paths: list[str], lone: bool = False) -> Iterator[dict]:
    """Yield {"text": ...} for each document; a .txt file is split, any other is one document.

    Of several files, those that are not UTF-8 text (an image, an old encoding) are left out with a warning.

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
    """Return the separator of a file's documents: EMPTY_LINES, else BLANK_LINES (of spaces), else LINES.

    Blank lines before and after all text do not count. The whole file is read, which also checks its encoding.
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
    """Yield the number of the first line and the text of each document.

    A .txt is split after the first empty line beyond `size` characters (a book is one file, but a split by document
    needs many), or after a line of spaces where none is empty. A lone .txt with neither has one document for each line.
    Any other file is one document.
    """
    is_txt, by_line = suffix_of(path) == ".txt", lone and separator == LINES
    begin, document, length = 1, [], 0
    for number, line in lines:
        if is_txt and by_line:
            if line.strip():
                yield number, line.rstrip("\r\n")
            continue
        ends = line == "\n" if separator == EMPTY_LINES else not line.strip()
        is_whole = is_txt and ends and length > size
        document.append(line)
        length += len(line)
        if length > LONGEST:
            raise ValueError(f"source: '{path}': a document of more than {LONGEST:,} characters (line {begin}), cut it")
        if is_whole:
            yield begin, "".join(document)
            begin, document, length = number + 1, [], 0
    if document:
        yield begin, "".join(document)
