"""Copies of small tensors to a device, and freed memory given back to the system."""

import ctypes
from typing import Literal, get_args

import torch
from torch import Tensor

DType = Literal["float32", "bfloat16", "float16"]  # of weights, in the options of commands
DTYPES = get_args(DType)


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """Return a CPU tensor's copy on the device, without waiting for the work queued there."""
    if device.type == "cuda":  # a copy from pageable memory would synchronize
        return values.pin_memory().to(device, non_blocking=True)
    return values.to(device)


def trim_heap() -> None:
    """Give freed heap memory back to the system, where the C library is glibc.

    glibc keeps freed memory that lies between blocks in use: hundreds of MiB after a model's weights were converted.
    """
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # another C library, or Windows, where CDLL(None) fails
        return
    trim(ctypes.c_size_t(0))
