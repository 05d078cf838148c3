"""Signals that end a command: SIGINT (Ctrl-C), and those by which clusters and containers end a job."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

# SIGUSR1: SLURM sends it so long before the end as `--signal` says. Windows has none.
ENDING = tuple(signal.Signals[name] for name in ("SIGTERM", "SIGUSR1") if name in signal.Signals.__members__)


class Terminated(KeyboardInterrupt):
    """SIGTERM as an exception: it ends a command as Ctrl-C does, with its own exit code."""

    exit_code = 128 + signal.SIGTERM


class UserSignal(Terminated):
    """SIGUSR1 as an exception."""

    exit_code = 128 + ENDING[-1]


def interrupt(signum: int, message: str = "") -> KeyboardInterrupt:
    """Return the exception that a signal raises."""
    kinds = dict(zip(ENDING, (Terminated, UserSignal), strict=False))
    return kinds.get(signum, KeyboardInterrupt)(message)


@contextmanager
def ended_by_signals(message: str) -> Iterator[None]:
    """Make the signals of ENDING raise Terminated inside the context (in the main thread only).

    Args:
        message: of the exception; `{signal}` stands for the signal's name.
    """

    def handler(signum, frame):
        raise interrupt(signum, message.format(signal=signal.Signals(signum).name))

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = {kind: signal.signal(kind, handler) for kind in ENDING}
    try:
        yield
    finally:
        for kind, before in previous.items():
            signal.signal(kind, before)


@contextmanager
def interrupt_explained(message: str) -> Iterator[None]:
    """Give a KeyboardInterrupt, or its subclass for another signal, that is raised inside the context this message."""
    try:
        yield
    except KeyboardInterrupt as pressed:
        raise type(pressed)(message) from None


class FirstSignal:
    """Recorder of the first SIGINT or signal of ENDING, so that a step can be finished and saved; the second raises.

    Attributes:
        signum: the first signal; None before it.
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        self._previous: dict = {}
        self._says = True

    def listen(self, says: bool = True) -> None:
        """Start recording signals; does nothing outside the main thread.

        Args:
            says: whether the first one is announced: of many processes, which all get Ctrl-C, by one.
        """
        self.signum, self._says = None, says
        if threading.current_thread() is threading.main_thread():
            self._previous = {kind: signal.signal(kind, self._note) for kind in (signal.SIGINT, *ENDING)}

    def _note(self, signum: int, frame) -> None:
        if self.signum is not None:
            raise interrupt(signum)
        self.signum = signum
        if self._says:
            name = "Ctrl-C" if signum == signal.SIGINT else signal.Signals(signum).name
            print(f"\n{name}: finishing this step and saving; once more to stop at once", flush=True)

    def ignore(self) -> None:
        """Restore the handlers from before `listen`."""
        for kind, handler in self._previous.items():
            signal.signal(kind, handler)
        self._previous = {}
