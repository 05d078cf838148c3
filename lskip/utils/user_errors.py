"""Which exceptions are the user's to mend, and the one line that is said of them."""

from __future__ import annotations

import re
from types import TracebackType

from lskip.utils.untrusted import printable

# By name, since importing these libraries would make `generate` wait for all of them. Each is raised only by what
# somebody handed over: a template, a file, a setting. What lskip itself gets wrong (KeyError, AttributeError,
# TypeError …) is not among them and shows its traceback.
_NAMES = {
    "MisconfigurationException",  # Lightning
    "ArgumentError",  # argparse
    "TemplateError",  # jinja2
    "YAMLError",
    "SafetensorError",
    "PanicException",  # tokenizers, and all that is written in Rust; no Exception
    "ArrowException",
    "DatasetsError",
    "DatasetGenerationError",
    "HTTPError",  # of the hub, by whichever of its libraries
    "TransportError",
    "HfHubHTTPError",
    "BadZipFile",
    "UnpicklingError",
    "EOFError",
}
# What Python raises where a number or a nesting of the user's is out of all bounds, if one of these libraries raises
# it. A line of lskip that divides by zero is a fault of lskip.
_ABROAD = (ArithmeticError, RecursionError)
_LIBRARIES = {"lightning", "torch", "transformers", "datasets", "jinja2", "yaml", "json", "copy", "jsonargparse"}
_NO_MEMORY = re.compile(r"can't allocate memory|not enough memory|out of memory|alloc_cpu|Unable to allocate", re.I)


def is_users_mistake(error: BaseException) -> bool:
    """Return whether one sentence says what the user can do about `error`."""
    names = {kind.__name__ for kind in type(error).__mro__}
    if isinstance(error, ValueError | OSError) or lacks_memory(error) or not names.isdisjoint(_NAMES):
        return True
    place = _raised_in(error.__traceback__)
    if isinstance(error, _ABROAD):
        return place.partition(".")[0] in _LIBRARIES
    if isinstance(error, ImportError):
        return place.partition(".")[0] in _LIBRARIES  # what a setting needs is not installed
    # How Lightning says that a metric to monitor is missing, that there are no such devices …
    return isinstance(error, RuntimeError | TypeError) and place.startswith(_OF_LIGHTNING)


_OF_LIGHTNING = (
    "lightning.pytorch.callbacks",
    "lightning.pytorch.accelerators",
    "lightning.pytorch.trainer.connectors",
    "lightning.fabric.accelerators",
    "lightning.fabric.utilities.device_parser",
)


def one_line(error: BaseException, limit: int = 290) -> str:
    """Return what `error` says, on one line of at most `limit` characters that no terminal acts on."""
    if lacks_memory(error):
        return "memory: not enough for this; take a smaller model, batch_size, block_size or num_workers"
    if isinstance(error, OSError) and error.strerror and error.filename:
        text = f"{error.filename}: {error.strerror}"
    else:
        text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, _ABROAD):
        text = f"a number or a nesting is out of bounds for {_raised_in(error.__traceback__)} ({text})"
    return printable(text if len(text) <= limit else text[: limit - 1] + "…", keep="")


def _raised_in(traceback: TracebackType | None) -> str:
    """Return the name of the module whose line raised: the innermost."""
    while traceback is not None and traceback.tb_next is not None:
        traceback = traceback.tb_next
    return "" if traceback is None else str(traceback.tb_frame.f_globals.get("__name__", ""))


def lacks_memory(error: BaseException) -> bool:
    """Return whether `error` says that there is no memory left, on whichever device."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and bool(_NO_MEMORY.search(str(error)))
