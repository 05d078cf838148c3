"""Calls into transformers and tokenizers with files of strangers: what they raise, and what they print."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from transformers.utils import logging as transformers_logging


@contextmanager
def foreign(where: str) -> Iterator[None]:
    """ValueError, which begins with `where`, for whatever the libraries inside raise.

    A file may be broken in as many ways as there are readers below; all of them mean that it cannot be read.
    """
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and not is_panic(error):
            raise
        raise ValueError(f"{where} could not be read ({first_line(error)})") from error


def is_panic(error: BaseException) -> bool:
    """Whether a library that is written in Rust gave up, as tokenizers does: what it raises then is no Exception."""
    return type(error).__name__ == "PanicException"


@contextmanager
def quietly() -> Iterator[None]:
    """No bars and no table of transformers' while weights are read: what is wrong with them is said in a sentence."""
    bars, level = transformers_logging.is_progress_bar_enabled(), transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()


def first_line(error: BaseException, limit: int = 100) -> str:
    """What an exception says, cut."""
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    return line if len(line) <= limit else line[: limit - 1] + "…"
