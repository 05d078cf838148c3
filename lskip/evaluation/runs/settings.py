"""The settings of a run as flat names and plain values, for TensorBoard's hparams and `lskip compare`."""

from __future__ import annotations

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
    return dict(_flat("", chosen))


def _flat(name: str, value: Any) -> Iterator[tuple[str, str | float | int | bool]]:
    if isinstance(value, Mapping):
        if "class_path" in value:
            yield name, printable(str(value["class_path"]).rpartition(".")[2], keep="")
            arguments = value.get("init_args")
            value = arguments if isinstance(arguments, Mapping) else {}
        for key, part in value.items():
            yield from _flat(f"{name}.{key}" if name else key, part)
    elif isinstance(value, list | tuple):
        yield name, printable(", ".join(map(str, value)), keep="")
    elif value is not None:
        yield name, value if isinstance(value, bool | int | float) else printable(str(value), keep="")
