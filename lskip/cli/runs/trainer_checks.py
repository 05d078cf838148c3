"""Early checks of the Trainer's arguments, which Lightning accepts silently or refuses with a traceback."""

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from numbers import Real
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import BatchSizeFinder, EarlyStopping, LearningRateFinder
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lskip.callbacks.layer_metrics import LayerMetrics
from lskip.cli.runs.device_checks import check_sharded
from lskip.models.readout import NUM_SPECULATIONS
from lskip.utils.checks import is_whole

Rule = tuple[str, Callable[[Any], bool]]


def _whole_from(lowest: int, but: int | None = None) -> Rule:
    also = "" if but is None else f", or {but}"
    return (
        f"a whole number from {lowest} up{also}",
        lambda value: is_whole(value) and (value >= lowest or value == but),
    )


def _is_some(value: Any) -> bool:
    return value >= 1 if is_whole(value) else 0 < value <= 1


def _is_device(value: Any) -> bool:
    """Return whether Lightning takes `value` for devices: a number, a list of indices, or auto."""
    if isinstance(value, list | tuple):
        return bool(value) and all(is_whole(each) and each >= 0 for each in value)
    return value == "auto" or bool(re.fullmatch(r"-1|[1-9]\d*|\d+(, *\d+)+", str(value)))


def _is_time(value: Any) -> bool:
    if isinstance(value, str):
        if (parts := re.fullmatch(r"\s*(\d+):(\d\d):(\d\d):(\d\d)\s*", value)) is None:
            return False
        value = dict(zip(("days", "hours", "minutes", "seconds"), map(int, parts.groups()), strict=True))
    try:
        return (timedelta(**value) if isinstance(value, dict) else value) > timedelta()
    except (TypeError, ValueError, OverflowError):  # an unknown unit, or an overflow
        return False


_SOME: Rule = ("a whole number from 1 up, or a share above 0 and at most 1", _is_some)
_SOME_OR_NONE: Rule = ("a whole number from 0 up, or a share from 0 to 1", lambda value: value == 0 or _is_some(value))
# Infinity makes torch measure norms without clipping them.
_FROM_0: Rule = ("a number from 0 up", lambda value: isinstance(value, Real) and value >= 0)
RULES: dict[str, Rule] = {
    "max_steps": _whole_from(1, -1),
    "max_epochs": _whole_from(1, -1),
    "min_steps": _whole_from(0),
    "min_epochs": _whole_from(0),
    "accumulate_grad_batches": _whole_from(1),
    "gradient_clip_val": _FROM_0,
    "log_every_n_steps": _whole_from(0),
    "check_val_every_n_epoch": _whole_from(1),
    "num_sanity_val_steps": _whole_from(0, -1),
    "num_nodes": _whole_from(1),
    "reload_dataloaders_every_n_epochs": _whole_from(0),
    "fast_dev_run": (
        "true, false or a whole number from 0 up",
        lambda value: isinstance(value, bool) or (is_whole(value) and value >= 0),
    ),
    "limit_train_batches": _SOME,
    "limit_val_batches": _SOME_OR_NONE,
    "limit_test_batches": _SOME_OR_NONE,
    "limit_predict_batches": _SOME_OR_NONE,
    "overfit_batches": _SOME_OR_NONE,
    "val_check_interval": _SOME,
    "max_time": ("a time above 0 as DD:HH:MM:SS", _is_time),
    "devices": ("a number of devices, -1 (all), auto, or a list of them", _is_device),
    "gradient_clip_algorithm": ("one of norm, value", lambda value: value in ("norm", "value")),
    "barebones": ("false, as a run has a log and a checkpoint", lambda value: not value),
}


def check_trainer(settings: Mapping[str, Any]) -> None:
    """Raise ValueError, with the field and what is allowed, for an argument that makes no sense.

    Args:
        settings: the Trainer's arguments; None for its defaults.
    """
    for name, (allowed, holds) in RULES.items():
        value = settings.get(name)
        if value is None or (name == "val_check_interval" and isinstance(value, str | dict)):
            continue  # a time interval
        if not holds(value):
            raise ValueError(f"trainer.{name}: {value!r} is not {allowed}")


@contextmanager
def settings_named(settings: Mapping[str, Any]) -> Iterator[None]:
    """Prefix errors that Lightning raises inside with the name of the setting they are about."""
    try:
        yield
    except (MisconfigurationException, ValueError) as error:
        raise ValueError(_with_name(settings, str(error))) from error


def _with_name(settings: Mapping[str, Any], words: str) -> str:
    given = {name: value for name, value in settings.items() if isinstance(value, str) and value != "auto"}
    of_value = [name for name, value in given.items() if value.lower() in words.lower()]
    of_name = [name for name in given if f"`{name}`" in words]
    for name in of_value + of_name:
        return f"trainer.{name}: {given[name]!r}: {words}"
    return f"trainer: {words}"


# They train before the run begins, and set attributes that lskip's modules do not have.
_FINDERS = ((LearningRateFinder, "optimizer.lr"), (BatchSizeFinder, "data.batch_size"))


def check_callbacks(trainer: Trainer, module: LightningModule) -> None:
    """Raise ValueError for callbacks that do not work with lskip, with this strategy or with the model's layers."""
    for kind, name in _FINDERS:
        if any(isinstance(callback, kind) for callback in trainer.callbacks):
            raise ValueError(f"trainer.callbacks: {kind.__name__} is not supported; set {name}")
    check_sharded(trainer)
    for callback in trainer.callbacks:
        if hasattr(callback, "check_layers"):
            callback.check_layers(module)


def check_monitors(trainer: Trainer, module: LightningModule) -> None:
    """Raise ValueError if a callback monitors a metric that nothing logs.

    Also makes EarlyStopping check after validation or after a training epoch, by where its metric comes from.
    """
    watching = [each for each in trainer.callbacks if isinstance(getattr(each, "monitor", None), str)]
    known = _logged(trainer, module)
    for callback in watching:
        name, split = callback.monitor, callback.monitor.partition("/")[0]
        if isinstance(callback, EarlyStopping) and callback._check_on_train_epoch_end is None:
            # Metrics of validation do not exist when training ends before the first validation.
            callback._check_on_train_epoch_end = split != "val"
        where = f"trainer.callbacks: {type(callback).__name__} watches {name!r}, but"
        if split == "val" and trainer.limit_val_batches == 0:
            raise ValueError(f"{where} trainer.limit_val_batches is 0")
        if name not in known and not any(_may_log(each) for each in trainer.callbacks):
            raise ValueError(f"{where} there are only {_shortened(known)}")


def _logged(trainer: Trainer, module: LightningModule) -> list[str]:
    layers = [f"layer_{layer:02d}" for layer in range(1, module.decoder.num_layers + 1)]
    names = ["train/loss", "train/loss_last_layer", "val/loss"]
    if any(isinstance(each, LayerMetrics) for each in trainer.callbacks):
        kinds = ["ppl", "agreement", *(f"tokens_per_round_{d}" for d in NUM_SPECULATIONS)]
        names += ["val/layers_needed", *(f"val/{kind}/{layer}" for kind in kinds for layer in layers)]
    return names


def _may_log(callback: Callback) -> bool:
    """Return whether it is the user's own callback, which may log any metric."""
    return not type(callback).__module__.startswith(("lskip.", "lightning."))


def _shortened(names: list[str]) -> str:
    shown = [name for name in names if "/layer_" not in name]
    more = [name for name in names if name not in shown]
    return ", ".join([*shown, *([f"{more[0]} … {more[-1]}"] if more else [])])


@contextmanager
def missing_monitor_named() -> Iterator[None]:
    """Turn EarlyStopping's error for a missing metric, which check_monitors may not foresee, into a ValueError."""
    try:
        yield
    except RuntimeError as error:  # EarlyStopping's
        if "conditioned on metric" not in str(error):
            raise
        raise ValueError(f"trainer.callbacks: {error}") from error
