"""Parsing of exit layers as a user writes them: 8,16,last."""

from collections.abc import Iterable

from lskip.models.families import family_of
from lskip.models.pretrained import load_config


def layers_of(model: str) -> int:
    """Return the number of layers of a model, its weights unread.

    Raises:
        ValueError, FileNotFoundError: there is no such model, or its family is not supported.
    """
    config = load_config(model)
    family_of(config)  # first: the config of another family may have no such field
    return config.num_hidden_layers


def exit_names(exits: str) -> list[str]:
    """Return the names in a list: ["8", "16", "last"] for "8,16,last".

    Raises:
        ValueError: a name that is neither a number nor last.
    """
    names = [name.strip() for name in exits.split(",")]
    for name in names:
        if name != "last" and not (name.isdecimal() and len(name) < 10):
            raise ValueError(f"exits: {name[:40]!r} is not a layer's number or last; write them like 8,16,last")
    return names


def exit_layers_of(names: Iterable[str], num_layers: int) -> list[int]:
    """Return exit layers, ascending and each once: [8, 30] for ["last", "8"] in a model of 30 layers.

    Raises:
        ValueError: a layer that the model does not have.
    """
    layers = sorted({num_layers if name == "last" else int(name) for name in names})
    for layer in layers:
        if not 1 <= layer <= num_layers:
            raise ValueError(
                f"exits: {layer} is not a whole number from 1 to {num_layers}, the model's layers, or last"
            )
    return layers
