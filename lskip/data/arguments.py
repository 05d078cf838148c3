"""Checks of plain arguments: one sentence that names the argument, its value and what is allowed."""

from lskip.data.documents import SPLITS
from lskip.data.sources import NAMES, check_packages, local_path


def check_source(source: str) -> None:
    if not isinstance(source, str) or not source.strip():
        raise ValueError(f"source: {source!r} names no text; give {', '.join(NAMES)}, a file, a folder or a hub name")
    check_packages(source)
    local_path(source)


def check_at_least(name: str, value: int, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name}: {value!r} is not a whole number of at least {least}")


def check_fractions(val_fraction: float, test_fraction: float) -> None:
    if not is_number(val_fraction) or not 0 < val_fraction < 1:
        raise ValueError(f"val_fraction: {val_fraction!r} is not between 0 and 1 (both excluded)")
    if not is_number(test_fraction) or not 0 <= test_fraction < 1:
        raise ValueError(f"test_fraction: {test_fraction!r} is not in [0, 1)")
    if val_fraction + test_fraction >= 1:
        raise ValueError(f"val_fraction + test_fraction: {val_fraction} + {test_fraction} leaves nothing to train on")


def check_split(split: str) -> None:
    if split not in SPLITS:
        raise ValueError(f"split: '{split}' is not one of train, val, test")


def is_number(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
