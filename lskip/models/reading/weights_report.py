"""Checks of the weights that transformers loaded; it fills missing ones with random numbers."""

import logging
import re
from pathlib import Path
from zipfile import is_zipfile

import torch
from safetensors import safe_open
from torch import Tensor
from transformers.modeling_utils import PreTrainedModel

_WRAPPERS = {"_orig_mod.": "torch.compile", "module.": "DataParallel"}  # prefix of names -> the wrapper that saved them
_TABLES = re.compile(r"rotary_emb\.|\.(attn|attention)\.(masked_)?bias$")  # buffers that older versions saved
_WHOLE = (torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64, torch.bool)
_SAFETENSORS = dict(zip(("I8", "U8", "I16", "I32", "I64", "BOOL"), _WHOLE, strict=True))
logger = logging.getLogger(__name__)


def check_report(report: dict, model: PreTrainedModel, place: str) -> None:
    """Raise ValueError unless the files hold every weight of the model, in its shape, and no others inside it.

    Weights outside the language model (such as a value head of reinforcement learning) are ignored with a warning.

    Args:
        report: transformers' `loading_info`.
        place: where the files are, for the message.
    """
    missing, unexpected = sorted(report["missing_keys"]), sorted(report["unexpected_keys"])
    if unexpected and missing:
        for prefix, wrapper in _WRAPPERS.items():
            if all(name.startswith(prefix) for name in unexpected):
                raise ValueError(
                    f"model: the names of the weights in {place!r} begin with {prefix!r}, as {wrapper} has them; "
                    "save the model that it wraps"
                )
    if report["mismatched_keys"]:
        name, saved, own = sorted(report["mismatched_keys"])[0]
        raise ValueError(
            f"model: the weights in {place!r} do not fit its config: {name} is {tuple(saved)}, not {tuple(own)}"
        )
    if missing:
        instead = f"; they hold {first_of(unexpected)}" if unexpected else ""
        raise ValueError(
            f"model: the weights in {place!r} lack {first_of(missing)}, which its config asks for{instead}"
        )
    if report.get("error_msgs"):
        raise ValueError(
            f"model: the weights in {place!r} do not fit its config ({str(report['error_msgs'][0])[:100]})"
        )
    _check_unexpected(unexpected, model, place)


def weights_files(folder: Path) -> list[Path]:
    """Return the files that transformers reads a model's weights from (training_args.bin is not one)."""
    return sorted(folder.glob("model*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))


def types_in(file: Path) -> dict[str, torch.dtype]:
    """Return the dtype of each tensor in a .safetensors or .bin file, by its name."""
    if file.suffix == ".safetensors":
        with safe_open(file, framework="pt") as opened:
            return {name: _SAFETENSORS.get(opened.get_slice(name).get_dtype()) for name in opened.keys()}  # noqa: SIM118
    # Files of torch before 1.6 are not zip files and cannot be mapped.
    saved = torch.load(file, map_location="cpu", weights_only=True, mmap=is_zipfile(file))
    return {name: part.dtype for name, part in saved.items() if isinstance(part, Tensor)}


def check_types(types: dict[str, torch.dtype], place: str) -> None:
    """Raise ValueError for integer weights, which are quantized: transformers would load them as real numbers."""
    for name, dtype in types.items():
        if dtype in _WHOLE and name.endswith((".weight", ".bias")) and not _TABLES.search(name):
            kind = str(dtype).removeprefix("torch.")
            raise ValueError(f"model: the weights in {place!r} are no real numbers: {name} is {kind}")


def _check_unexpected(names: list[str], model: PreTrainedModel, place: str) -> None:
    inside = (f"{model.base_model_prefix}.", "lm_head.", "embed_out.", "layers.", "h.", "embed_tokens.", "norm.")
    own = [name for name in names if name.startswith(inside) and not _TABLES.search(name)]
    if own:
        raise ValueError(f"model: the weights in {place!r} hold {first_of(own)}, which its config leaves out")
    others = [name for name in names if not name.startswith(inside)]
    if others:
        logger.warning("model: %r also holds %s, which is no part of the language model", place, first_of(others))


def first_of(names: list[str]) -> str:
    """Return the first of several names, and how many more there are, for a message."""
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"{names[0]!r}{more}"
