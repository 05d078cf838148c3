"""The checkpoint format: packing of config and tokenizer, reading, checksums, merging of LoRA, random states."""

import json
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lskip.models.reading.shards import SavedTensor, place_tensors
from lskip.utils.foreign import first_line


def pack_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> dict:
    """Return {"config", "generation_config", "tokenizer": {path: content}}, which rebuild a model around its weights.

    These are plain strings and numbers (and bytes, where a tokenizer has a binary file), so that a checkpoint loads
    with `weights_only` and works outside its folder.
    """
    generation = model.generation_config
    return {
        "config": json.loads(model.config.to_json_string(use_diff=False)),
        "generation_config": {} if generation is None else json.loads(generation.to_json_string()),
        "tokenizer": {} if tokenizer is None else _pack_tokenizer(tokenizer),
    }


def _pack_tokenizer(tokenizer: PreTrainedTokenizerBase) -> dict[str, str | bytes]:
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        # With subfolders: additional chat templates lie in one.
        paths = sorted(path for path in Path(folder).rglob("*") if path.is_file())
        return {path.relative_to(folder).as_posix(): _content(path) for path in paths}


def _content(path: Path) -> str | bytes:
    data = path.read_bytes()
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:  # such as sentencepiece's vocabulary
        return data


def unpack_tokenizer(files: dict[str, str | bytes], folder: Path) -> None:
    """Write the tokenizer files that `pack_model` packed into `folder`.

    Raises:
        ValueError: not a mapping of files, or a path that leads out of `folder`.
    """
    if not isinstance(files, dict):
        raise ValueError("is not a mapping of files")
    for name, content in files.items():
        parts = PurePosixPath(name).parts if isinstance(name, str) else ()
        if not parts or ".." in parts or name.startswith("/") or not isinstance(content, str | bytes):
            raise ValueError(f"{name!r} is no file of a tokenizer")
        path = folder.joinpath(*parts)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)


def read_checkpoint(path: Path, field: str = "model", whole: bool = False) -> dict:
    """Return the content of a checkpoint of lskip, its tensors memory-mapped; of a sharded one each is a SavedTensor.

    Args:
        field: the setting that names it, for messages.
        whole: compare every tensor with its checksum, as resuming needs. Otherwise callers use `check_checksums` on the
            tensors that they read, since the optimizer's are twice the size of the weights. A SavedTensor compares
            itself when it is read; of a sharded checkpoint the optimizer's states are there only if this is true.

    Raises:
        ValueError: the file is no checkpoint of lskip, or damaged.
    """
    if path.stat().st_size == 0:
        raise ValueError(f"{field}: {str(path)!r} is not a readable checkpoint (it is empty)")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except PermissionError:
        raise
    except Exception as error:
        # The type of torch's error depends on where the file is damaged.
        raise ValueError(f"{field}: {str(path)!r} is not a readable checkpoint ({first_line(error)})") from error
    if not isinstance(checkpoint, dict) or "lskip" not in checkpoint:
        raise ValueError(f"{field}: {str(path)!r} is not a checkpoint of lskip (it has no entry 'lskip')")
    for name in ("lskip", "state_dict"):
        if not isinstance(checkpoint.get(name), dict):
            raise ValueError(f"{field}: {str(path)!r} is not a checkpoint of lskip (its {name!r} is no mapping)")
    if not isinstance(checkpoint["lskip"].get("config"), dict):
        raise ValueError(f"{field}: {str(path)!r} is not a checkpoint of lskip (its 'config' is no mapping)")
    checkpoint = place_tensors(checkpoint, path, field, optimizer=whole)
    for key, part in checkpoint["state_dict"].items():
        if not isinstance(key, str) or not isinstance(part, Tensor | SavedTensor):
            raise ValueError(f"{field}: {str(path)!r} is not a checkpoint of lskip ({key!r:.50} is no weight)")
    check_checksums(checkpoint if whole else {}, path, field)
    return checkpoint


def check_checksums(tensors: Any, path: Path, field: str = "model") -> None:
    """Raise ValueError unless tensors mapped from a checkpoint match the checksums in the file.

    A checkpoint is a zip file with a checksum for each part, which mapping does not read. This reads each byte of
    `tensors` once (3 GB/s from memory), and all parts that are not tensors.
    """
    try:
        with zipfile.ZipFile(path) as file:
            parts = {(part.file_size, part.CRC) for part in file.infolist()}
            for part in file.infolist():
                if "/data/" not in part.filename:
                    file.read(part)  # raises where the checksum differs
    except (zipfile.BadZipFile, EOFError, NotImplementedError, zlib.error) as error:
        raise ValueError(f"{field}: {str(path)!r} is damaged ({first_line(error)})") from error
    for name, tensor in _tensors(tensors):
        data = tensor.untyped_storage()
        content = torch.empty(0, dtype=torch.uint8).set_(data).numpy()
        if data.nbytes() and (data.nbytes(), zlib.crc32(content)) not in parts:
            raise ValueError(f"{field}: {str(path)!r} is damaged ({name} is not what was saved)")


def _tensors(value: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor in nested containers with its path; of those that share a storage, one."""
    seen, rest = set(), [(name, value)]
    while rest:
        name, value = rest.pop()
        if isinstance(value, Tensor):
            if (place := value.untyped_storage().data_ptr()) not in seen:
                seen.add(place)
                yield name, value
        elif isinstance(value, dict):
            rest += [(f"{name}.{key}" if name else str(key), part) for key, part in value.items()]
        elif isinstance(value, list | tuple):
            rest += [(f"{name}.{index}", part) for index, part in enumerate(value)]


def merged_low_rank(weights: dict[str, Tensor], scale: float) -> dict[str, Tensor]:
    """Return a state dict in which LoRA's factors are merged: W + scale B A, under the names of the plain model."""
    plain = {name.replace(".base_layer.", "."): value for name, value in weights.items() if ".lora_" not in name}
    for name, factor in weights.items():
        if name.endswith(".lora_A.default.weight"):
            place = name.removesuffix(".lora_A.default.weight")
            other = weights[f"{place}.lora_B.default.weight"]
            weight = plain[f"{place}.weight"]
            # At least in float32, since the product is small beside the weight.
            wide = torch.promote_types(weight.dtype, torch.float32)
            plain[f"{place}.weight"] = (weight.to(wide) + scale * (other.to(wide) @ factor.to(wide))).to(weight.dtype)
    return plain


def random_state() -> dict:
    """Return torch's random states in this process, which dropout inside a model draws from."""
    devices = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"cpu": torch.get_rng_state(), "cuda": devices}


def random_states(state: dict) -> dict:
    """Return what `random_state` returned in this process; of several processes {"ranks": [one of each]}, on all."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return state
    ranks: list = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(ranks, state)
    return {"ranks": ranks} if len(ranks) > 1 else state


def restore_random_state(states: dict, rank: int = 0) -> None:
    """Restore what `random_states` returned; for accelerators only where their number is the same.

    Where more processes go on than have saved, the others begin streams of their own, which follow from those saved.
    """
    ranks = states.get("ranks", [states])
    state = ranks[rank % len(ranks)]
    torch.set_rng_state(state["cpu"].cpu())
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([device.cpu() for device in state["cuda"]])
    if rank >= len(ranks):
        torch.manual_seed(int(torch.randint(2**62, ())) + rank)
