"""Paths as a user writes them."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Iterable
from pathlib import Path


def user_path(text: str | os.PathLike, field: str) -> Path:
    """Return the path that `text` means, with the home folder in place of ~ or ~name. Nothing needs to be there.

    Raises:
        ValueError: nothing can be there: nobody has that home, a name is too long, links lead in a ring.
    """
    text = os.fspath(text)
    shown = repr(text if len(text) <= 80 else f"{text[:79]}…")
    if not text:
        raise ValueError(f"{field}: is empty, where a file or a folder is named")
    home = os.path.expanduser(text)  # not Path's, for which ./~ is a home too
    if home == text and text.startswith("~") and not os.path.lexists(text):
        raise ValueError(f"{field}: {shown} is no path: nobody has that home")
    try:
        os.stat(home)
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:
        raise ValueError(f"{field}: {shown} is no path here ({error.strerror})") from error
    except ValueError as error:  # a NUL
        raise ValueError(f"{field}: {shown} is no path ({error})") from error
    # Below Lightning zip::x would be read as a chain of file systems, and nothing written; a whole path is a path.
    return Path(home).absolute() if "::" in home else Path(home)


def near(path: Path, others: Iterable[str], holds: Callable[[Path], bool] = lambda entry: True) -> str:
    """Return a hint at the name that was meant: what lies in the same folder, or one of `others`, which are no paths.

    Args:
        holds: whether what lies there can be meant.
    """
    names = list(others) if path.parent == Path() else []
    if path.parent.is_dir():
        names += [entry.name for entry in path.parent.iterdir() if holds(entry)]
    close = difflib.get_close_matches(path.name, names, 1)
    return f"; did you mean '{path.with_name(close[0])}'?" if close else ""
