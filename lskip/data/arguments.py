"""Checks of TextData's arguments; each raises ValueError with the argument, its value and what is allowed."""

import os
from collections.abc import Mapping
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from lskip.data.mixture import WINDOW
from lskip.data.sources import NAMES, check_packages, local_path
from lskip.data.tokenizer import SMALLEST_VOCABULARY
from lskip.utils.checks import check_real, check_whole
from lskip.utils.user_paths import user_path

MOST_WORKERS = 128  # processes: thousands would start, one after another, before any error
MOST_TOKENS = 2**24  # in a row, and rows in a batch


def check_source(source: str) -> None:
    if not isinstance(source, str) or not source.strip() or "\0" in source:
        raise ValueError(f"source: {source!r} names no text; give {', '.join(NAMES)}, a file, a folder or a hub name")
    if source.lstrip()[:1] in ("[", "{"):
        raise ValueError(f"source: {source!r} is no list such as [{{source: a.jsonl, weight: 3}}, {{source: b}}]")
    check_packages(source)
    local_path(source)


def check_tokenizer_source(tokenizer) -> None:
    if isinstance(tokenizer, str) and tokenizer.strip():
        return
    if tokenizer is not None and not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise ValueError(f"tokenizer: {tokenizer!r} is neither a name, nor a folder, nor a tokenizer, nor null")


def check_sizes(vocab_size: int, block_size: int, batch_size: int, num_workers: int | None, seed: int) -> None:
    check_whole("vocab_size", vocab_size, SMALLEST_VOCABULARY, MOST_TOKENS)
    check_whole("block_size", block_size, 2, MOST_TOKENS)
    check_whole("batch_size", batch_size, 1, MOST_TOKENS)
    if num_workers is not None:
        check_whole("num_workers", num_workers, 0, MOST_WORKERS)
    check_whole("seed", seed, 0, 2**63 - 1)


def named_sources(source) -> list[tuple[str, float]]:
    """Return the sources that `data.source` names, each with its weight.

    Raises:
        ValueError, FileNotFoundError: one is no source, or no weight.
    """
    if not isinstance(source, list | tuple):
        check_source(source)
        return [(source, 1.0)]
    if not source:
        raise ValueError("source: [] names no text")
    found = []
    for entry in source:
        if isinstance(entry, Mapping) and not {"source"} <= set(entry) <= {"source", "weight"}:
            raise ValueError(f"source: an entry {dict(entry)!r}; each has source and, unless it is 1, weight")
        name, weight = (entry["source"], entry.get("weight", 1.0)) if isinstance(entry, Mapping) else (entry, 1.0)
        check_source(name)
        check_real(f"source: weight of {name}", weight, "above 0", lambda value: value > 0)
        found.append((name, float(weight)))
    total = sum(weight for _, weight in found)
    for name, weight in found:
        if weight * WINDOW < total:
            raise ValueError(f"source: weight of {name}: {weight:g} of {total:g} in all is less than 1 row in {WINDOW}")
    return found


def check_limits(max_val_blocks: int | None, streaming: bool, group_by_length: bool, pack: bool, sources: int) -> None:
    if max_val_blocks is not None:
        check_whole("max_val_blocks", max_val_blocks, 1)
    elif streaming:
        raise ValueError("max_val_blocks: null, but with streaming there must be a limit")
    if streaming and group_by_length:
        raise ValueError("group_by_length: true, but with streaming the lengths to come are not known; there is pack")
    if sources > 1 and group_by_length:
        raise ValueError("group_by_length: true, but rows of several sources come in turn; there is pack")
    if group_by_length and pack:
        raise ValueError("group_by_length: true, but with pack: true all rows are as long; leave one of them out")


def check_fractions(val_fraction: float, test_fraction: float) -> None:
    for name, value in (("val_fraction", val_fraction), ("test_fraction", test_fraction)):
        check_real(name, value, "from 0 and below 1", lambda share: 0 <= share < 1)
    if val_fraction + test_fraction >= 1:
        raise ValueError(f"val_fraction + test_fraction: {val_fraction} + {test_fraction} leaves nothing to train on")


def check_text_column(text_column) -> None:
    if text_column is not None and (not isinstance(text_column, str) or not text_column):
        raise ValueError(f"text_column: {text_column!r} is no column's name, nor null")


def check_cache(cache_dir) -> Path:
    """Return the folder for caches, not made yet; raise ValueError if it cannot be one or cannot be written."""
    if cache_dir is not None and (not isinstance(cache_dir, str | os.PathLike)):
        raise ValueError(f"cache_dir: {cache_dir!r} is no folder, nor null")
    folder = user_path(cache_dir or "~/.cache/lskip", "cache_dir").absolute()
    there = next(place for place in (folder, *folder.parents) if os.path.lexists(place))
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(f"cache_dir: cannot write '{folder}' ('{there}' is no folder that can be written)")
    return folder
