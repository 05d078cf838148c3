"""Signals that end a command: Ctrl-C (SIGINT), and SIGTERM, by which clusters and containers end a process."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Terminated(KeyboardInterrupt):
    """SIGTERM, which ends a command as Ctrl-C does, with an exit code of its own."""

    exit_code = 128 + signal.SIGTERM


def interrupt(signum: int, message: str = "") -> KeyboardInterrupt:
    """Return the exception by which a signal ends a command."""
    return Terminated(message) if signum == signal.SIGTERM else KeyboardInterrupt(message)


@contextmanager
def ended_by_sigterm(message: str) -> Iterator[None]:
    """Within, SIGTERM raises Terminated(message) where it otherwise would end the process without a word."""

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


class FirstSignal:
    """Notes the first Ctrl-C or SIGTERM, so that a step can be finished and saved; the second one ends at once.

    Attributes:
        signum: of the first; None while there was none.
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        self._previous: dict = {}

    def listen(self) -> None:
        """From here on signals are noted. (Only the main thread of a process can.)"""
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
        """Signals do again what they did before `listen`."""
        for kind, handler in self._previous.items():
            signal.signal(kind, handler)
        self._previous = {}
