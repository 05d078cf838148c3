"""Paths as the user types them: expansion of ~, checks, and hints for misspelled names."""

import difflib
import os
from collections.abc import Callable, Iterable
from pathlib import Path


def user_path(text: str | os.PathLike, field: str) -> Path:
    """Return `text` as a path with ~ and ~name expanded; the file need not exist.

    Raises:
        ValueError: no file can exist there: an unknown user, a name that is too long, a cycle of links.
    """
    text = os.fspath(text)
    shown = repr(text if len(text) <= 80 else f"{text[:79]}…")
    if not text:
        raise ValueError(f"{field}: is empty, where a file or a folder is named")
    home = os.path.expanduser(text)  # Path.expanduser would expand ./~ too
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
    # Lightning's fsspec would read zip::x as a chain of file systems; an absolute path is taken as it is.
    return Path(home).absolute() if "::" in home else Path(home)


def near(path: Path, others: Iterable[str], holds: Callable[[Path], bool] = lambda entry: True) -> str:
    """Return "; did you mean …?" for the most similar name in the same folder or among `others`, or "".

    Args:
        others: names that are not paths, considered where `path` has no folder.
        holds: whether an entry of the folder is a candidate.
    """
    names = list(others) if path.parent == Path() else []
    if path.parent.is_dir():
        names += [entry.name for entry in path.parent.iterdir() if holds(entry)]
    return did_you_mean(path.name, names, shown=lambda name: f"'{path.with_name(name)}'")


def did_you_mean(name: str, names: Iterable[str], cutoff: float = 0.6, shown: Callable[[str], str] = str) -> str:
    """Return "; did you mean …?" for the most similar of `names`, written as `shown` has it, or ""."""
    close = difflib.get_close_matches(name, list(names), 1, cutoff)
    return f"; did you mean {shown(close[0])}?" if close else ""
