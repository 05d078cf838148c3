"""What every training here asks of Lightning: fewer words, and an interruption after which one can go on."""

from __future__ import annotations

import logging
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from lightning.pytorch import Trainer


def quiet_lightning() -> None:
    """Not its tips and lists of accelerators; what a profiler found is asked for."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("lightning.pytorch.profilers").setLevel(logging.INFO)


@contextmanager
def interruptible(trainer: Trainer, advice: Callable[[], str]) -> Iterator[None]:
    """Around what a Trainer does: a signal does not end the process with Lightning's exit code, and without a word.

    Args:
        advice: what is said then: how to go on.

    Raises:
        KeyboardInterrupt: of the kind that interrupted it, with the advice.
    """
    handler = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit as end:
        if not trainer.interrupted:
            raise
        kind = type(end.__context__) if isinstance(end.__context__, KeyboardInterrupt) else KeyboardInterrupt
        raise kind(advice()) from None
    finally:
        signal.signal(signal.SIGINT, handler)


def how_to_go_on(trainer: Trainer, checkpoint: Path, flag: str) -> str:
    """Return the step that training was interrupted at, the step that is saved, and the advice.

    Args:
        checkpoint: what the run goes on from, if it is there.
        flag: how the command is told to.
    """
    step = trainer.global_step
    place = f"after step {step}" if step else "before the first step"
    if not checkpoint.is_file():
        return f" {place}; nothing was saved yet"
    saved = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)["global_step"]
    which = "which is saved" if saved == step else f"saved is step {saved}"
    return f" {place}, {which}; go on with the same command and {flag}"
