"""Signals that end a command: SIGINT (Ctrl-C), and SIGTERM, which clusters and containers send."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Terminated(KeyboardInterrupt):
    """SIGTERM as an exception: it ends a command as Ctrl-C does, with its own exit code."""

    exit_code = 128 + signal.SIGTERM


def interrupt(signum: int) -> KeyboardInterrupt:
    """Return the exception that a signal raises."""
    return Terminated() if signum == signal.SIGTERM else KeyboardInterrupt()


@contextmanager
def ended_by_sigterm(message: str) -> Iterator[None]:
    """Make SIGTERM raise Terminated(message) inside the context (in the main thread only)."""

    def handler(signum, frame):
        raise Terminated(message)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGTERM, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


@contextmanager
def interrupt_explained(message: str) -> Iterator[None]:
    """Give a KeyboardInterrupt, or its subclass for SIGTERM, that is raised inside the context this message."""
    try:
        yield
    except KeyboardInterrupt as pressed:
        raise type(pressed)(message) from None


class FirstSignal:
    """Recorder of the first SIGINT or SIGTERM, so that a step can be finished and saved; the second one raises.

    Attributes:
        signum: the first signal; None before it.
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        self._previous: dict = {}

    def listen(self) -> None:
        """Start recording signals; does nothing outside the main thread."""
        self.signum = None
        if threading.current_thread() is threading.main_thread():
            self._previous = {kind: signal.signal(kind, self._note) for kind in (signal.SIGINT, signal.SIGTERM)}

    def _note(self, signum: int, frame) -> None:
        if self.signum is not None:
            raise interrupt(signum)
        self.signum = signum
        name = "Ctrl-C" if signum == signal.SIGINT else "SIGTERM"
        print(f"\n{name}: finishing this step and saving; once more to stop at once", flush=True)

    def ignore(self) -> None:
        """Restore the handlers from before `listen`."""
        for kind, handler in self._previous.items():
            signal.signal(kind, handler)
        self._previous = {}
