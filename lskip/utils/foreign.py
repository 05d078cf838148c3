"""Calls into transformers and tokenizers with untrusted files: their exceptions and their output."""

from collections.abc import Iterator
from contextlib import contextmanager

from transformers.utils import logging as transformers_logging

LONGEST = 100  # characters of an exception's message


@contextmanager
def foreign(where: str) -> Iterator[None]:
    """Turn whatever the libraries called inside raise into a ValueError that begins with `where`.

    Each reader fails on a broken file in its own way; all of them mean that it cannot be read.
    """
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and not is_panic(error):
            raise
        raise ValueError(f"{where} could not be read ({first_line(error)})") from error


def is_panic(error: BaseException) -> bool:
    """Return whether `error` is the panic of a library written in Rust (tokenizers), which is no Exception."""
    return type(error).__name__ == "PanicException"


@contextmanager
def quietly() -> Iterator[None]:
    """Silence transformers' progress bars and reports while weights are read: errors are raised as one sentence."""
    bars, level = transformers_logging.is_progress_bar_enabled(), transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()


def first_line(error: BaseException) -> str:
    """Return the first line of an exception's message, cut to LONGEST characters."""
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    return line if len(line) <= LONGEST else line[: LONGEST - 1] + "…"
