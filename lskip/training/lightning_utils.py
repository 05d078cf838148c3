"""Lightning's messages and interrupts in every training of lskip."""

import logging
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy


def quiet_lightning() -> None:
    """Hide Lightning's tips and lists of accelerators, but not the reports of profilers."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("lightning.pytorch.profilers").setLevel(logging.INFO)


def waits_for_all_gradients(trainer: Trainer) -> bool:
    """Return whether backward hangs, or fails, where a trained parameter has no gradient: under DDP."""
    return trainer.world_size > 1 and isinstance(trainer.strategy, DDPStrategy)


def leave_signals_to_lskip(trainer: Trainer) -> None:
    """Keep Lightning from handling SIGTERM, which it does by a broadcast in the handler, and by one in every batch.

    The first hangs where the other processes are within an operation of their own; for the second each batch waits.
    """
    trainer._signal_connector.register_signal_handlers = lambda: None
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None


@contextmanager
def interruptible(trainer: Trainer, advice: Callable[[], str]) -> Iterator[None]:
    """Raise KeyboardInterrupt with advice where Lightning, after a signal, would exit without a message.

    Args:
        advice: returns how to resume.

    Raises:
        KeyboardInterrupt: of the class that interrupted training, with the advice.
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
    """Return the message after an interrupt: the step, the saved step, and how to resume.

    Args:
        checkpoint: from which the run resumes, if it exists.
        flag: the option that resumes.
    """
    step = trainer.global_step
    place = f"after step {step}" if step else "before the first step"
    if not checkpoint.is_file():
        return f" {place}; nothing was saved yet"
    saved = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)["global_step"]
    which = "which is saved" if saved == step else f"saved is step {saved}"
    return f" {place}, {which}; go on with the same command and {flag}"
