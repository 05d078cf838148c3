"""Plain text on this machine: the embedded corpora and folders of text files."""

import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path

SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "testing", "idle_test", "__pycache__"}
PROSE_DOCUMENT = 4000  # characters after which a long .txt is cut at the next blank line


def standard_library_files() -> list[Path]:
    """The running interpreter's own .py files, without its tests and `pydoc`'s manual (about 12 MB).

    The manual is prose inside a .py file; kept out of training, it is what held-out prose is read on.
    """
    skipped = SKIPPED_FOLDERS | {"pydoc_data"}
    return files_below(Path(sysconfig.get_path("stdlib")), suffix=".py", skipped=skipped)


def installed_package_files() -> list[Path]:
    """The .py files of everything installed beside lskip (torch, transformers, numpy ...), without tests."""
    folders = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    return sorted(path for folder in folders for path in files_below(Path(folder), suffix=".py"))


EMBEDDED = {"stdlib": standard_library_files, "packages": installed_package_files}


def files_below(folder: Path, suffix: str = "", skipped: set[str] = SKIPPED_FOLDERS) -> list[Path]:
    """Sorted files under `folder` whose name ends in `suffix`; hidden files and `skipped` folders left out."""
    found = []
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if name not in skipped and not name.startswith(".")]
        found += [Path(parent, name) for name in names if name.endswith(suffix) and not name.startswith(".")]
    return sorted(found)


def read_texts(paths: list[str]) -> Iterator[dict]:
    """One {"text": ...} a document: a .txt is cut at blank lines, any other file is one document.

    A file that is not UTF-8 text (an image, an old encoding) is left out.
    """
    for path in paths:
        text = read_text(path)
        if text is None:
            continue
        for piece in cut_text(text) if path.endswith(".txt") else [text]:
            yield {"text": piece}


def read_text(path: str) -> str | None:
    data = Path(path).read_bytes()
    if b"\0" in data:
        return None
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return None


def cut_text(text: str, size: int = PROSE_DOCUMENT) -> Iterator[str]:
    """Pieces of at least `size` characters that end at a blank line; joined they are `text` again.

    A book is one file, but a split by document needs many.
    """
    start = 0
    while start < len(text):
        blank = text.find("\n\n", start + size)
        end = len(text) if blank < 0 else blank + 2
        yield text[start:end]
        start = end
