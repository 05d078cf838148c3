"""Checks of arguments; the ValueError names the argument, its value and what is allowed."""

import sys
from numbers import Real


def check_whole(name: str, value, lowest: int, highest: int | None = None) -> None:
    """Raise ValueError unless `value` is a whole number from `lowest` up, or to `highest`."""
    if not is_whole(value) or value < lowest or (highest is not None and value > highest):
        end = "up" if highest is None else f"to {highest}"
        raise ValueError(f"{name}: {value!r} is not a whole number from {lowest} {end}")


def is_whole(value) -> bool:
    """Return whether `value` is an int and not a bool."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_real(value) -> bool:
    """Return whether `value` is a finite number in the range of a float (not every int is)."""
    return isinstance(value, Real) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def check_real(name: str, value, allowed: str, holds) -> None:
    """Raise ValueError unless `value` is a finite number for which `holds` is true."""
    if not is_real(value) or not holds(value):
        raise ValueError(f"{name}: {value!r} is not a number {allowed}")


def check_choice(name: str, value, choices: tuple[str, ...]) -> None:
    """Raise ValueError unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name}: {value!r} is not one of {', '.join(choices)}")


def check_texts(name: str, value) -> None:
    """Raise ValueError unless `value` is a list or tuple of non-empty strings."""
    texts = value if isinstance(value, list | tuple) else [None]
    if not all(isinstance(text, str) and text for text in texts):
        raise ValueError(f"{name}: {value!r} is not a list of texts, none of them empty")


def check_unicode(name: str, text: str) -> None:
    """Raise ValueError if `text` holds a lone surrogate (half a character), which UTF-8 cannot encode."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        half = ascii(text[error.start])
        raise ValueError(f"{name}: holds {half}, half a character, which is no text") from error


def check_parts(name: str, value, methods: tuple[str, ...], kind: str) -> None:
    """Raise ValueError unless `value` is None or has these methods (importing its class would be a cycle)."""
    has_them = all(callable(getattr(value, method, None)) for method in methods)
    if value is not None and (isinstance(value, type) or not has_them):
        raise ValueError(f"{name}: {value!r} is not {kind}, or null")
