"""What reading a GGUF file through transformers needs beside it."""

import functools
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from mmap import ACCESS_READ, mmap


def require_gguf_packages() -> None:
    """ValueError with the command that installs what is missing."""
    missing = [name for name in ("gguf", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"model: to read GGUF, run: pip install {' '.join(missing)}")


@contextmanager
def parsed_once() -> Iterator[None]:
    """Within it, a GGUF file is parsed once: transformers does it for the config, the weights and the tokenizer anew.

    Each time takes seconds, and so do the names of all tensors, which it makes for every module of the model.
    """
    require_gguf_packages()
    import gguf

    slow = {name: getattr(gguf, name) for name in ("GGUFReader", "get_tensor_name_map")}
    try:
        for name, original in slow.items():
            setattr(gguf, name, functools.cache(original))
        yield
    finally:
        for name, original in slow.items():
            setattr(gguf, name, original)


def words_of_gguf(path: str) -> str | None:
    """llama.cpp's name for how this file's tokenizer cuts a text into words."""
    # Found by its key, the type of a text (8) and a length: GGUFReader takes seconds, for all 49,152 tokens come too.
    key = b"tokenizer.ggml.pre" + (8).to_bytes(4, "little")
    with open(path, "rb") as file, mmap(file.fileno(), 0, access=ACCESS_READ) as content:
        if (place := content.find(key)) < 0:
            return None
        content.seek(place + len(key))
        return content.read(int.from_bytes(content.read(8), "little")).decode("utf-8")
