"""What a checkpoint holds besides weights: the model's config and tokenizer, and the random state. Plain types only."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase


def pack_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> dict:
    """{"config", "generation_config", "tokenizer": {file name: text}}: all that rebuilds the model but its weights.

    Plain strings and numbers, so that a checkpoint loads with `weights_only` and works away from its folder.
    """
    generation = model.generation_config
    return {
        "config": json.loads(model.config.to_json_string(use_diff=False)),
        "generation_config": {} if generation is None else json.loads(generation.to_json_string()),
        "tokenizer": {} if tokenizer is None else _pack_tokenizer(tokenizer),
    }


def _pack_tokenizer(tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        return {path.name: path.read_text(encoding="utf-8") for path in sorted(Path(folder).iterdir())}


def random_state() -> dict:
    """Torch's random states of this process: what dropout inside a model draws from."""
    devices = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"cpu": torch.get_rng_state(), "cuda": devices}


def restore_random_state(state: dict) -> None:
    """Continue the streams that `random_state` saved; accelerators only where their number is the same."""
    torch.set_rng_state(state["cpu"].cpu())
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([device.cpu() for device in state["cuda"]])
