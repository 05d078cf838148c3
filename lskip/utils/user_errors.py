"""Exceptions that the user can fix, and the one line that the command line prints for them."""

import re
import signal
from types import TracebackType

from lskip.utils.untrusted import printable

# By name, since importing these libraries would slow down every command. Each is raised only for user input: a
# template, a file, a setting. Bugs of lskip (KeyError, AttributeError, TypeError …) show their traceback.
_NAMES = {
    "MisconfigurationException",  # Lightning
    "ArgumentError",  # argparse
    "TemplateError",  # jinja2
    "YAMLError",
    "SafetensorError",
    "PanicException",  # of tokenizers and other libraries in Rust; not an Exception
    "ArrowException",
    "DatasetsError",
    "DatasetGenerationError",
    "HTTPError",  # of the hub
    "TransportError",
    "HfHubHTTPError",
    "BadZipFile",
    "UnpicklingError",
    "EOFError",
}
# User errors (a number or a nesting out of bounds) only if one of these libraries raises them, not lskip itself.
_ABROAD = (ArithmeticError, RecursionError)
LONGEST = 290  # characters of a message
_LIBRARIES = {"lightning", "torch", "transformers", "datasets", "jinja2", "yaml", "json", "copy", "jsonargparse"}
# gloo's words for a process that is gone; NCCL waits for it, until its watchdog ends the one that waits.
_LOST = re.compile(r"Connection (closed|reset) by peer|connection .*(closed|aborted)|Broken pipe|Connection refused")
_NO_MEMORY = re.compile(r"can't allocate memory|not enough memory|out of memory|alloc_cpu|Unable to allocate", re.I)


def is_users_mistake(error: BaseException) -> bool:
    """Return whether `error` is caused by user input, so that one sentence is enough."""
    names = {kind.__name__ for kind in type(error).__mro__}
    if isinstance(error, ValueError | OSError) or not names.isdisjoint(_NAMES):
        return True
    if lacks_memory(error) or lost_a_process(error):
        return True
    place = _raised_in(error.__traceback__)
    if isinstance(error, _ABROAD):
        return place.partition(".")[0] in _LIBRARIES
    if isinstance(error, ImportError):
        return place.partition(".")[0] in _LIBRARIES  # an optional package is not installed
    # Lightning's errors for a missing metric to monitor, for devices that do not exist …
    return isinstance(error, RuntimeError | TypeError) and place.startswith(_OF_LIGHTNING)


_OF_LIGHTNING = (
    "lightning.pytorch.callbacks",
    "lightning.pytorch.accelerators",
    "lightning.pytorch.trainer.connectors",
    "lightning.fabric.accelerators",
    "lightning.fabric.utilities.device_parser",
)


def one_line(error: BaseException) -> str:
    """Return the message of `error` on one line of at most LONGEST characters, control characters escaped."""
    if lacks_memory(error):
        return "memory: not enough for this; take a smaller model, batch_size, block_size or num_workers"
    if lost_a_process(error):
        return "another process of this run has ended, and this one with it"
    if isinstance(error, OSError) and error.strerror and error.filename:
        text = f"{error.filename}: {error.strerror}"
    else:
        text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, _ABROAD):
        text = f"a number or a nesting is out of bounds for {_raised_in(error.__traceback__)} ({text})"
    return printable(text if len(text) <= LONGEST else text[: LONGEST - 1] + "…", keep="")


def _raised_in(traceback: TracebackType | None) -> str:
    """Return the name of the module that raised the exception."""
    while traceback is not None and traceback.tb_next is not None:
        traceback = traceback.tb_next
    return "" if traceback is None else str(traceback.tb_frame.f_globals.get("__name__", ""))


def lacks_memory(error: BaseException) -> bool:
    """Return whether `error` is an out-of-memory error of any device."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and bool(_NO_MEMORY.search(str(error)))


def lost_a_process(error: BaseException) -> bool:
    """Return whether `error` says that another process, which trains with this one, is gone."""
    of_torch = type(error).__name__ in ("DistBackendError", "DistNetworkError", "DistStoreError")
    return of_torch or (type(error) is RuntimeError and bool(_LOST.search(str(error))))


def how_it_ended(code: int) -> str:
    """Return how a process ended, by its exit code, which is negative or above 128 after a signal."""
    signum = -code if code < 0 else code - 128
    if signum not in set(signal.Signals):
        return f"ended with exit code {code}"
    killed = " (as where memory is short)" if signum == signal.SIGKILL else ""
    return f"was ended by {signal.Signals(signum).name}{killed}"
