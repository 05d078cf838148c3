"""What every training here asks of Lightning: fewer words, and a Ctrl-C after which one can go on."""

from __future__ import annotations

import logging
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lightning.pytorch import Trainer


def quiet_lightning() -> None:
    """Not its tips and lists of accelerators."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)


@contextmanager
def interruptible(trainer: Trainer, checkpoint: Path, flag: str) -> Iterator[None]:
    """Around Trainer.fit: Ctrl-C does not end the process with Lightning's exit code and says how to go on.

    Args:
        checkpoint: what the run goes on from, if it is there.
        flag: how the command is told to.

    Raises:
        KeyboardInterrupt: with the step and the advice.
    """
    handler = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit:
        if not trainer.interrupted:
            raise
        advice = f"go on with the same command and {flag}" if checkpoint.is_file() else "nothing was saved yet"
        raise KeyboardInterrupt(f" after step {trainer.global_step}; {advice}") from None
    finally:
        signal.signal(signal.SIGINT, handler)
