"""Construction of optimizer and schedule from user settings, with one-sentence errors."""

import inspect
import math
import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch.optim import Optimizer, SparseAdam
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR

from lskip.utils.foreign import first_line

OptimizerCallable = Callable[[Iterable], Optimizer]
LRSchedulerCallable = Callable[[Optimizer], LRScheduler]

# Raised by optimizers and schedules for arguments that they do not accept.
_REFUSALS = (ValueError, TypeError, RuntimeError, AssertionError, ArithmeticError)
_ALLOWED = {
    "learning rate": ("lr", "a number from 0 up"),
    "beta": ("betas", "a number from 0 to below 1"),
    "weight_decay": ("weight_decay", "a number from 0 up"),
    "epsilon": ("eps", "a number from 0 up"),
    "momentum": ("momentum", "a number from 0 up"),
}


def make_optimizer(make: OptimizerCallable, groups: list[dict]) -> Optimizer:
    """Return the optimizer of these parameters.

    Raises:
        ValueError: the optimizer refuses its arguments or parameters, or needs a step of another kind.
    """
    try:
        optimizer = make(groups)
    except _REFUSALS as error:
        raise ValueError(f"optimizer{_refused(error)}") from error
    name = type(optimizer).__name__
    for key, value in _numbers(optimizer):
        if not math.isfinite(value):
            raise ValueError(f"optimizer.{key}: {value} is not a finite number")
    if _needed(optimizer.step):
        raise ValueError(f"optimizer: {name} computes the loss several times a step, which is not done here")
    if optimizer.defaults.get("differentiable"):
        raise ValueError("optimizer.differentiable: true is for gradients through a step, which nobody takes here")
    if isinstance(optimizer, SparseAdam):
        raise ValueError(f"optimizer: {name} takes sparse gradients, a language model's are dense")
    return optimizer


def state_of(optimizer: Optimizer) -> set[str]:
    """Return the names of an optimizer's state for a parameter, found by a step of a copy with the same settings.

    Empty where no copy can be made.

    Raises:
        ValueError: the copy cannot make a step.
    """
    group = {key: value for key, value in optimizer.param_groups[0].items() if key != "params"}
    tiny = torch.zeros(2, 2, device=optimizer.param_groups[0]["params"][0].device, requires_grad=True)
    tiny.grad = torch.zeros_like(tiny)
    try:
        twin = type(optimizer)([{**group, "params": [tiny]}])
    except _REFUSALS:  # a class of the user's with more arguments
        return set()
    try:
        twin.step()
    except _REFUSALS as error:
        raise ValueError(f"optimizer: {type(optimizer).__name__} cannot make a step ({first_line(error)})") from error
    return set(twin.state[tiny])


def make_schedule(make: LRSchedulerCallable, optimizer: Optimizer, total_steps: int | None) -> LRScheduler:
    """Return the schedule of an optimizer.

    Args:
        make: makes a schedule for an optimizer.
        optimizer: whose learning rates it sets.
        total_steps: of the run; None: unknown.

    Raises:
        ValueError: the schedule refuses its arguments, needs more than the step, or ends before the run.
    """
    try:
        scheduler = make(optimizer)
    except _REFUSALS as error:
        raise ValueError(f"lr_scheduler{_refused(error)}") from error
    name = type(scheduler).__name__
    if needed := _needed(scheduler.step):
        raise ValueError(f"lr_scheduler: {name} goes by {', '.join(needed)}, here a schedule is told the step alone")
    if isinstance(scheduler, OneCycleLR) and total_steps is not None and scheduler.total_steps < total_steps:
        raise ValueError(f"lr_scheduler.total_steps: {scheduler.total_steps}, but the run has {total_steps} steps")
    return scheduler


def try_step(scheduler: LRScheduler) -> None:
    """Make one step of a schedule that is discarded afterwards; raise ValueError where it fails."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns that the optimizer has not stepped
        try:
            scheduler.step()
        except _REFUSALS as error:
            raise ValueError(f"lr_scheduler: {type(scheduler).__name__} cannot make a step ({error})") from error


def _refused(error: Exception) -> str:
    """Return ": reason", or ".lr: -1 is not …" where the message is one of torch's."""
    text = " ".join(str(error).split())
    value = re.search(r"(?:Invalid|should be).*: *(\S+)$", text)
    for words, (field, allowed) in _ALLOWED.items():
        if value and words in text.lower():
            return f".{field}: {value[1]} is not {allowed}"
    return f".{text}" if re.match(r"\w+: ", text) else f": {text}"


def _numbers(optimizer: Optimizer) -> Iterator[tuple[str, float]]:
    for group in optimizer.param_groups:
        for key, value in group.items():
            values = value if isinstance(value, list | tuple) and key != "params" else [value]
            yield from ((key, each) for each in values if isinstance(each, float))


def _needed(function: Callable) -> list[str]:
    """Return the names of a function's required arguments."""
    parts: dict[str, Any] = dict(inspect.signature(function).parameters)
    plain = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [name for name, part in parts.items() if part.default is part.empty and part.kind in plain]
