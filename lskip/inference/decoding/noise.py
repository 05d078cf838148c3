"""Random numbers of sampling, which depend on their key alone and on no global generator."""

from enum import IntEnum

import numpy as np
import torch
from torch import Tensor


class Purpose(IntEnum):
    """Purpose of random numbers; those of different purposes are independent."""

    OWN = 0  # the model's own token; with shared noise also the draft's
    DRAFT = 1  # the draft's token in rejection sampling
    ACCEPTANCE = 2  # whether rejection sampling keeps a drafted token


def random_source(seed: int, position: int, purpose: Purpose = Purpose.OWN, index: int = 0) -> np.random.Generator:
    """Return a generator that depends on its arguments alone; other arguments give an independent one."""
    # Philox is a function of key and counter. It counts in the counter's lowest word, so that streams that differ in
    # the other words never meet.
    return np.random.Generator(np.random.Philox(key=seed, counter=[0, index, purpose, position]))


def gumbel_noise(seed: int, position: int, size: int, purpose: Purpose = Purpose.OWN, index: int = 0) -> Tensor:
    """Return float32 [size] on the CPU: argmax(log weights + noise) is an exact draw from the normalized weights."""
    exponential = random_source(seed, position, purpose, index).standard_exponential(size)
    return torch.from_numpy(-np.log(np.maximum(exponential, np.finfo(np.float64).tiny))).float()
