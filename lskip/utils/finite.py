"""Checks for NaN and infinity in all tensors of a model or a checkpoint, with one device synchronization."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn


def all_finite(tree: Any) -> bool:
    """Return whether all floats in the tensors of `tree` (nested mappings, lists and tuples) are finite.

    Subclasses of Tensor, such as 8-bit optimizer states, may lack `isfinite` and are skipped.
    """
    flags: dict[torch.device, list[Tensor]] = {}
    for tensor in _tensors(tree):
        tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor  # a DTensor: what this rank holds
        if tensor.is_floating_point() and type(tensor) in (Tensor, nn.Parameter):
            flags.setdefault(tensor.device, []).append(tensor.detach().isfinite().all())
    return all(torch.stack(each).all().item() for each in flags.values())


def _tensors(tree: Any) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, Mapping):
        for part in tree.values():
            yield from _tensors(part)
    elif isinstance(tree, list | tuple):
        for part in tree:
            yield from _tensors(part)


def check_finite_weights(model: nn.Module) -> None:
    """Raise ValueError, naming the weight, if a weight of `model` is NaN or infinite.

    Weights on the meta device, which have no values, pass.
    """
    weights = {name: part for name, part in model.state_dict().items() if part.device.type != "meta"}
    if all_finite(weights):
        return
    name = next(name for name, part in weights.items() if not all_finite(part))
    raise ValueError(f"model: its weights are not finite ({name} holds NaN or infinity), so it says nothing")
