"""The settings of a run as flat names and plain values, for TensorBoard's hparams and `lskip compare`."""

from collections.abc import Iterator, Mapping
from typing import Any

from lskip.utils.untrusted import printable

# The Trainer's arguments that are shown.
_TRAINER = ("max_steps", "max_epochs", "precision", "accumulate_grad_batches", "gradient_clip_val")
_ELSEWHERE = ("run_folder", "checkpoint", "ckpt_path", "config", "verbose", "trainer")


def run_settings(config: Mapping[str, Any]) -> dict[str, str | float | int | bool]:
    """Return {"early_exit_loss.curriculum": "Rotational", "early_exit_loss.curriculum.period": 8 …} for a config.yaml.

    A class name is the value of its own key, with the class's arguments below; null is left out.
    """
    chosen = {key: value for key, value in config.items() if key not in _ELSEWHERE}
    trainer = config.get("trainer")
    trainer = trainer if isinstance(trainer, Mapping) else {}
    chosen["trainer"] = {key: trainer[key] for key in _TRAINER if key in trainer}
    return {name: _shown(value, is_class) for name, value, is_class in flatten(chosen) if value is not None}


def flatten(value: Any, name: str = "") -> Iterator[tuple[str, Any, bool]]:
    """Yield (dotted name, value, whether it is a class path) for all settings below `value`."""
    if not isinstance(value, Mapping) or any(str(key).isdecimal() for key in value):  # {4: 0.3} is one value
        yield name, value, False
        return
    if "class_path" in value:
        yield name, value["class_path"], True
        arguments = value.get("init_args")
        value = arguments if isinstance(arguments, Mapping) else {}
    for key, part in value.items():
        yield from flatten(part, f"{name}.{key}" if name else key)


def _shown(value: Any, is_class: bool) -> str | float | int | bool:
    if isinstance(value, bool | int | float) and not is_class:
        return value
    if isinstance(value, Mapping):
        value = [f"{key}: {part}" for key, part in value.items()]
    text = ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    return printable(text.rpartition(".")[2] if is_class else text, keep="")
