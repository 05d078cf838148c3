"""Which exceptions are the user's to mend, and the one line that is said of them."""

from __future__ import annotations

import re

from lskip.untrusted import printable

# By name, since importing these libraries would make `generate` wait for all of them. Each is raised only by what
# somebody handed over: a template, a file, a setting. What lskip itself gets wrong (KeyError, AttributeError,
# TypeError …) is not among them and shows its traceback.
_NAMES = {
    "MisconfigurationException",  # Lightning
    "TemplateError",  # jinja2
    "YAMLError",
    "SafetensorError",
    "ArrowInvalid",
    "DatasetGenerationError",
}
_NO_MEMORY = re.compile(r"can't allocate memory|not enough memory|out of memory|alloc_cpu|Unable to allocate", re.I)


def is_users_mistake(error: BaseException) -> bool:
    """Return whether one sentence says what the user can do about `error`."""
    names = {kind.__name__ for kind in type(error).__mro__}
    return isinstance(error, ValueError | OSError) or _lacks_memory(error) or not names.isdisjoint(_NAMES)


def one_line(error: BaseException, limit: int = 290) -> str:
    """Return what `error` says, on one line of at most `limit` characters that no terminal acts on."""
    if _lacks_memory(error):
        return "memory: not enough for this; take a smaller model, batch_size, block_size or num_workers"
    if isinstance(error, OSError) and error.strerror and error.filename:
        text = f"{error.filename}: {error.strerror}"
    else:
        text = " ".join(str(error).split()) or type(error).__name__
    return printable(text if len(text) <= limit else text[: limit - 1] + "…", keep="")


def _lacks_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and bool(_NO_MEMORY.search(str(error)))
