"""Small tensors from the CPU to where the model is."""

import torch
from torch import Tensor


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """`values` of the CPU on the device, without waiting for what the device is doing."""
    if device.type == "cuda":  # a copy from pageable memory would wait
        return values.pin_memory().to(device, non_blocking=True)
    return values.to(device)
