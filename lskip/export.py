"""`lskip export`: what was trained, as a plain transformers folder."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Literal

import torch

from lskip.pretrained import load_model


def export(model: str, output: str, dtype: Literal["float32", "bfloat16", "float16"] = "float32") -> None:
    """Write a model as a transformers folder: safetensors, config, generation_config and tokenizer.

    `AutoModelForCausalLM.from_pretrained` loads it without lskip, and its `generate(assistant_early_exit=E)`
    decodes self-speculatively.

    Args:
        model: a run folder, a checkpoint, a folder, a hub name, a .gguf file, smollm2.
        output: folder to make; it must not exist yet, or be empty.
        dtype: of the weights in the files.

    Raises:
        ValueError: `output` holds something or cannot be written. FileNotFoundError: no such model.
    """
    folder = Path(output)
    partial = _prepare(folder)
    try:
        loaded, tokenizer = load_model(model, dtype=getattr(torch, dtype))
        loaded.save_pretrained(partial)
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
        # Only a whole model ever stands under the name that was asked for.
        os.replace(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _prepare(folder: Path) -> Path:
    """The folder to write into first, beside the one asked for."""
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise ValueError(f"output: '{folder}' exists and is not an empty folder")
    partial = folder.with_name(f".{folder.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    except OSError as error:
        raise ValueError(f"output: cannot write '{folder}' ({error.strerror})") from error
    return partial
