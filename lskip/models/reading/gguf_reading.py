"""What reading a GGUF file through transformers needs beside it."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager


def require_gguf_packages() -> None:
    """ValueError with the command that installs what is missing."""
    missing = [name for name in ("gguf", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"model: to read GGUF, run: pip install {' '.join(missing)}")


@contextmanager
def parsed_once() -> Iterator[None]:
    """Within it, a GGUF file is parsed once: transformers does it for the config, the weights and the tokenizer anew.

    Each time takes seconds, and so do the names of all tensors, which it makes for every module of the model. It shows
    no bar either, which would stand before every answer.
    """
    require_gguf_packages()
    import gguf
    from transformers import modeling_gguf_pytorch_utils as reading

    slow = {name: getattr(gguf, name) for name in ("GGUFReader", "get_tensor_name_map")}
    bar = reading.tqdm
    try:
        for name, original in slow.items():
            setattr(gguf, name, functools.cache(original))
        reading.tqdm = lambda tensors, **_: tensors
        yield
    finally:
        reading.tqdm = bar
        for name, original in slow.items():
            setattr(gguf, name, original)
