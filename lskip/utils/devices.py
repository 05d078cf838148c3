"""Moving small tensors to a device, and giving freed memory back to the system."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """Return `values` of the CPU on the device, without waiting for what the device is doing."""
    if device.type == "cuda":  # a copy from pageable memory would wait
        return values.pin_memory().to(device, non_blocking=True)
    return values.to(device)


def trim_heap() -> None:
    """Give freed memory back to the system, where the C library is glibc.

    It keeps what was freed between pieces in use: after a model's conversion hundreds of MiB, which look as if lskip
    needed them and are nobody else's.
    """
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # another C library, or Windows, where None names none
        return
    trim(ctypes.c_size_t(0))
