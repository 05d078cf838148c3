"""TorchScript, for runs of small operations that Python would spend longer on than the CPU does.

Between the products of a small model most of a pass is Python's: on two AVX2 cores TorchScript takes 6 % off a pass of
SmolLM2 in float32, 16 to 37 % where its weights take fewer bytes, and changes no bit. torch calls it deprecated, but
what is to follow it wants a C++ compiler, a minute, and that again for every shape; where a torch or a Python no
longer has it, the same functions run as they stand.
"""

import functools
import warnings
from collections.abc import Callable

import torch


@functools.cache
def scripted(function: Callable) -> Callable:
    """Return `function` in TorchScript, made once.

    From Python an operation costs microseconds before it begins, one on a matrix that FBGEMM has packed 30.
    """
    return in_torchscript(function)


def in_torchscript(function: Callable) -> Callable:
    """Return a function or a module in TorchScript; itself where torch no longer has that."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        try:
            return torch.jit.script(function)
        except (AttributeError, OSError, RuntimeError):
            return function


def as_written():
    """Return a context in which TorchScript takes no product apart, which after some calls it would: it rounds then."""
    return torch.jit.optimized_execution(False)
