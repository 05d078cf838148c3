"""Checks of plain arguments: one sentence that names the argument, its value and what is allowed."""

import os
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from lskip.data.documents import SPLITS
from lskip.data.sources import NAMES, check_packages, local_path
from lskip.utils.user_paths import user_path

MOST_WORKERS = 128  # processes; thousands would be started one after the other before anything is said
MOST_TOKENS = 2**24  # in a row, and rows in a batch


def check_source(source: str) -> None:
    if not isinstance(source, str) or not source.strip() or "\0" in source:
        raise ValueError(f"source: {source!r} names no text; give {', '.join(NAMES)}, a file, a folder or a hub name")
    check_packages(source)
    local_path(source)


def check_tokenizer_source(tokenizer) -> None:
    if isinstance(tokenizer, str) and tokenizer.strip():
        return
    if tokenizer is not None and not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise ValueError(f"tokenizer: {tokenizer!r} is neither a name, nor a folder, nor a tokenizer, nor null")


def check_fractions(val_fraction: float, test_fraction: float) -> None:
    for name, value in (("val_fraction", val_fraction), ("test_fraction", test_fraction)):
        if not is_number(value) or not 0 <= value < 1:
            raise ValueError(f"{name}: {value!r} is not in [0, 1)")
    if val_fraction + test_fraction >= 1:
        raise ValueError(f"val_fraction + test_fraction: {val_fraction} + {test_fraction} leaves nothing to train on")


def check_text_column(text_column) -> None:
    if text_column is not None and (not isinstance(text_column, str) or not text_column):
        raise ValueError(f"text_column: {text_column!r} is no column's name, nor null")


def check_cache(cache_dir) -> Path:
    """Return the folder for caches. ValueError if it is none, or could not be written: nothing is made yet."""
    if cache_dir is not None and (not isinstance(cache_dir, str | os.PathLike)):
        raise ValueError(f"cache_dir: {cache_dir!r} is no folder, nor null")
    folder = user_path(cache_dir or "~/.cache/lskip", "cache_dir").absolute()
    there = next(place for place in (folder, *folder.parents) if os.path.lexists(place))
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(f"cache_dir: cannot write '{folder}' ('{there}' is no folder that can be written)")
    return folder


def check_split(split: str) -> None:
    if split not in SPLITS:
        raise ValueError(f"split: '{split}' is not one of train, val, test")


def is_number(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
