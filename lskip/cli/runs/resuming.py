"""Checks of a resumed run: which settings may change, and which must be those of the checkpoint."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from lskip.cli.runs.run_data import OF_EARLIER_RUNS
from lskip.cli.runs.run_folder import CONFIG_FILE
from lskip.data.tokenizer import same_tokens
from lskip.evaluation.runs.settings import flatten
from lskip.models.pretrained import load_tokenizer
from lskip.training.run_module import RunModule
from lskip.utils.untrusted import parse_yaml, read_text

KEPT = "a run that goes on keeps its data, tokenizer, model and optimizer; for another one there is --run_folder"
# Of the data only these may change: sizes of batches and rows, the cache, and validation.
_DATA_MAY_CHANGE = ("batch_size", "block_size", "num_workers", "cache_dir", "max_val_blocks")
_KEPT = ("optimizer", "data", "exit_heads", "learned_exit")
_PATHS = ("model", "data.source", "data.tokenizer")
# The Trainer's arguments that change what is learned.
_TRAINER = (
    *("max_steps", "max_epochs", "max_time", "min_steps", "min_epochs", "limit_train_batches", "overfit_batches"),
    *("accelerator", "strategy", "devices", "num_nodes"),
    *("precision", "accumulate_grad_batches", "gradient_clip_val", "gradient_clip_algorithm"),
)
_ELSEWHERE = ("run_folder", "checkpoint", "ckpt_path", "config", "verbose")
# Fields of a model's config that lskip or transformers set when saving, or that change only how it computes.
_NO_SHAPE = ("eos_token_id", "transformers_version", "dtype", "architectures", "use_cache", "_name_or_path")


def settings_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config.yaml flattened to {"optimizer.lr": 3e-4 …}, as a checkpoint stores the settings of its run.

    A class_path is the value of its own key, with the class's arguments below. Output paths are left out.
    """
    plain = json.loads(json.dumps(dict(config), default=str))
    named = flatten({key: value for key, value in plain.items() if key not in _ELSEWHERE})
    settings = {name: value for name, value, _ in named}
    chosen = {f"trainer.{name}" for name in _TRAINER}
    return {key: value for key, value in settings.items() if not key.startswith("trainer.") or key in chosen}


def settings_before(checkpoint: dict, path: Path) -> dict[str, Any]:
    """Return the settings of the run that made a checkpoint: those stored in it, else of its folder's config.yaml.

    Those that are not known are left out, but for what rows held before these options had names.
    """
    earlier = {f"data.{name}": value for name, value in OF_EARLIER_RUNS.items()}
    return {**earlier, **_known_settings(checkpoint, path)}


def _known_settings(checkpoint: dict, path: Path) -> dict[str, Any]:
    if "settings" in checkpoint["lskip"]:
        return checkpoint["lskip"]["settings"]
    config = path.parent.parent / CONFIG_FILE
    said = parse_yaml(read_text(config, "ckpt_path"), f"ckpt_path: '{config}'") if config.is_file() else None
    return settings_of(said) if isinstance(said, dict) else {}


def changed_settings(before: dict[str, Any], now: dict[str, Any], checkpoint: dict) -> list[str]:
    """Return the changes of a resumed run's settings, as "optimizer.lr 1e-05 (was 0.001)".

    Raises:
        ValueError: a setting has changed that may not.
    """
    differing = {key for key in before.keys() & now.keys() if not _same(key, before[key], now[key])}
    changes = []
    for key in sorted(differing):
        if key.startswith("model."):
            continue  # check_same_model compares the resulting configs
        if _is_kept(key) or (key == "model" and now.get("anchor_weight") is not None):
            raise ValueError(f"{key}: {now[key]!r}, but this run has {before[key]!r}; {KEPT}")
        if key in ("data.batch_size", "data.block_size") and "rows" not in checkpoint["lskip"]:
            advice = "an older lskip did not note how far it had read"
            raise ValueError(f"{key}: {now[key]!r}, but the checkpoint is of a run with {before[key]!r}; {advice}")
        changes.append(f"{key} {now[key]} (was {before[key]})")
    return changes


def _is_kept(key: str) -> bool:
    part, _, name = key.partition(".")
    return key in _KEPT or part == "low_rank" or (part == "data" and name not in _DATA_MAY_CHANGE)


def _same(key: str, before: Any, now: Any) -> bool:
    if key in _PATHS and isinstance(before, str) and isinstance(now, str):
        return os.path.abspath(os.path.expanduser(before)) == os.path.abspath(os.path.expanduser(now))
    return before == now


def resume_message(step: int, changes: list[str], max_steps: int) -> str:
    """Return the sentence that a resumed run prints first."""
    if 0 < max_steps <= step:
        return f"the run is at step {step} already, of trainer.max_steps {max_steps}: there is nothing to train"
    otherwise = f" with {', '.join(changes)}" if changes else ""
    return f"goes on after step {step}{otherwise}"


def check_resumable(checkpoint: dict, module: RunModule, path: str) -> None:
    """Check that a module can resume from a checkpoint, and give it the checkpoint's tokenizer if it has none.

    Raises:
        ValueError: the checkpoint is of another model, or has another tokenizer.
    """
    check_weights_fit(checkpoint, module, path)
    check_same_model(checkpoint, module.model.config)
    if not checkpoint["lskip"]["tokenizer"]:
        return
    tokenizer = load_tokenizer(path, "ckpt_path")
    if module.tokenizer is None:
        module.adopt_tokenizer(tokenizer)
    else:
        check_same_tokenizer(tokenizer, module.tokenizer)


def check_same_model(checkpoint: dict, config: PreTrainedConfig) -> None:
    """Raise ValueError if the model's config differs from the checkpoint's."""
    before, now = checkpoint["lskip"]["config"], json.loads(config.to_json_string(use_diff=False))
    for key in sorted(before.keys() & now.keys() - set(_NO_SHAPE)):
        if before[key] != now[key]:
            raise ValueError(f"model.{key}: {now[key]!r}, but this run has {before[key]!r}; {KEPT}")


def check_same_tokenizer(before: PreTrainedTokenizerBase, now: PreTrainedTokenizerBase) -> None:
    """Raise ValueError if the model's tokenizer differs from the run's."""
    if (differing := same_tokens(now, before)) is not None:
        raise ValueError(f"model: the tokenizer in {now.name_or_path!r} is not this run's ({differing}); {KEPT}")


def check_weights_fit(checkpoint: dict, module: nn.Module, path: str) -> None:
    """Raise ValueError unless names and shapes of a checkpoint's weights are those of the module."""
    saved, own = checkpoint["state_dict"], module.state_dict()
    for name in sorted(saved.keys() | own.keys()):
        shapes = [tuple(weights[name].shape) if name in weights else "absent" for weights in (saved, own)]
        if shapes[0] != shapes[1]:
            raise ValueError(f"ckpt_path: {path!r} is of another model: {name} is {shapes[0]} there, {shapes[1]} here")
