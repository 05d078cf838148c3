"""Writing of sharded checkpoints: each rank its own rows, into files of its own; see lskip.models.reading.shards.

All is written into a new folder and forced to the disk before `last.ckpt`, which names the folder, takes its place. So
the checkpoint before is whole until then, whatever ends whichever process; its folder is removed afterwards.
"""

import json
import os
import zlib
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed
from torch.distributed.tensor import DTensor, Shard

from lskip.models.reading.shards import DTYPES, INDEX_FILE, VERSION, SavedTensor, place_tensors, shard_file
from lskip.training.checkpoint_file import WholeFiles, remove_other_shards, sync_folder
from lskip.utils.untrusted import MAX_BYTES

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_Result = TypeVar("_Result")


def own_rows(tensor: DTensor) -> tuple[int, int]:
    """Return the first row that this rank holds, and the one after its last: those of torch.chunk, as FSDP2 shards."""
    mesh, rows = tensor.device_mesh, tensor.shape[0]
    each = -(-rows // mesh.size())
    rank = mesh.get_local_rank()
    return min(rank * each, rows), min((rank + 1) * each, rows)


def share_of(saved: SavedTensor | Tensor, like: DTensor) -> DTensor:
    """Return this rank's rows of a saved tensor, sharded and placed as `like`; only these are read."""
    if saved.shape != like.shape:
        raise ValueError(f"ckpt_path: a tensor of it has shape {tuple(saved.shape)}, here it is {tuple(like.shape)}")
    first, end = own_rows(like)
    rows = saved.read(first, end) if isinstance(saved, SavedTensor) else saved[first:end]
    whole = {"shape": like.shape, "stride": like.stride()}
    return DTensor.from_local(rows.to(like.device), like.device_mesh, like.placements, run_check=False, **whole)


def save_sharded(checkpoint: dict[str, Any], path: Path) -> None:
    """Replace the checkpoint at `path`; every rank calls this, with its own rows in DTensors.

    Raises:
        ValueError: on all ranks, where one could not write; the checkpoint before is unchanged.
    """
    is_first = distributed.get_rank() == 0
    rest, shares = _divided(checkpoint)
    try:
        name = _on_all(lambda: _new_folder(path, checkpoint["global_step"]) if is_first else None)[0]
        written = _on_all(partial(_write_shares, shares, path.parent / name))
        _on_all(lambda: _complete({**rest, "shards": name}, path, written) if is_first else None)
    except OSError as error:
        whole = "; the one before it is whole" if path.exists() else ""
        raise ValueError(f"checkpoint: cannot write '{path}' ({error.strerror}){whole}") from error
    finally:
        if is_first:
            remove_other_shards(path)  # the folder of the checkpoint before, or of this one where it failed


def _on_all(work: Callable[[], _Result]) -> list[_Result]:
    """Return what a call returned on each rank, once it has ended on all; raise on all what it raised on one."""
    own: tuple = (None, None)
    try:
        own = work(), None
    except (OSError, ValueError) as error:
        own = None, error
    ranks: list[tuple] = [own] * distributed.get_world_size()
    distributed.all_gather_object(ranks, own)
    for _, error in ranks:
        if error is not None:
            raise error
    return [result for result, _ in ranks]


def _divided(checkpoint: dict[str, Any]) -> tuple[dict[str, Any], dict[str, DTensor]]:
    """Return a checkpoint with a mark in the place of each sharded tensor, and these tensors by their keys."""
    shares: dict[str, DTensor] = {}
    known: dict[tuple, str] = {}  # tied weights are one tensor under two names

    def marked(key: str, value: Any) -> Any:
        if not isinstance(value, DTensor):
            return value
        if value.placements != (Shard(0),) or value.dtype not in _NAMES:
            return value.full_tensor().cpu()  # such as an optimizer's sums over rows, which are small
        rows = value.to_local()
        if rows.numel():
            key = known.setdefault((rows.data_ptr(), rows.shape, rows.dtype), key)
        shares.setdefault(key, value)
        return {"shard": key}

    weights = {name: marked(f"weights/{name}", value) for name, value in checkpoint["state_dict"].items()}
    states = [
        {
            **each,
            "state": {
                name: {key: marked(f"optimizer/{number}/{name}/{key}", value) for key, value in state.items()}
                for name, state in each["state"].items()
            },
        }
        for number, each in enumerate(checkpoint.get("optimizer_states", []))
    ]
    rest = {**checkpoint, "state_dict": weights}
    return ({**rest, "optimizer_states": states} if "optimizer_states" in checkpoint else rest), shares


def _new_folder(path: Path, step: int) -> str:
    """Make a folder for a checkpoint's shards, named by its step (or the next free number), and return its name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_other_shards(path)
    while (folder := path.with_name(f"{path.name}.shards-{step}")).exists():
        step += 1
    folder.mkdir()
    return folder.name


def _write_shares(shares: Mapping[str, DTensor], folder: Path) -> dict[str, dict[str, Any]]:
    """Write this rank's rows into its files, and return what the index says of them."""
    rank, sums = distributed.get_rank(), {}
    held = {key: tensor.to_local() for key, tensor in shares.items() if tensor.to_local().numel()}
    for kind in ("weights", "optimizer"):
        own = {key.partition("/")[2]: rows for key, rows in held.items() if key.startswith(f"{kind}/")}
        if own:
            written = write_safetensors(shard_file(folder, kind, rank), own)
            sums |= {f"{kind}/{name}": crc32 for name, crc32 in written.items()}
    return {
        key: {
            "dtype": _NAMES[shares[key].dtype],
            "shape": list(shares[key].shape),
            "pieces": [[rank, *own_rows(shares[key]), crc32]],
        }
        for key, crc32 in sums.items()
    }


def write_safetensors(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Write a safetensors file and return the CRC-32 of each tensor's bytes.

    By hand, since the package would copy all of them into main memory at once; here it is one at a time.
    """
    names = sorted(tensors, key=lambda name: -tensors[name].element_size())  # so that each is aligned
    header, end, sums = {}, 0, {}
    for name in names:
        start, end = end, end + tensors[name].numel() * tensors[name].element_size()
        kind = {"dtype": _NAMES[tensors[name].dtype], "shape": list(tensors[name].shape)}
        header[name] = {**kind, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            content = tensors[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
            sums[name] = zlib.crc32(content)
            file.write(content)
        _force(file)
    return sums


def _complete(rest: dict[str, Any], path: Path, written: list[dict[str, dict[str, Any]]]) -> None:
    """Write the index of what all ranks have written, check it as a reader does, and let `path` name it."""
    tensors: dict[str, dict[str, Any]] = {}
    for parts in written:
        for key, part in parts.items():
            tensors.setdefault(key, {**part, "pieces": []})["pieces"] += part["pieces"]
    text = json.dumps({"version": VERSION, "tensors": tensors}, separators=(",", ":")).encode()
    if len(text) > MAX_BYTES:
        size = f"{len(tensors)} tensors on {len(written)} devices"
        raise ValueError(f"checkpoint.sharded: {size} make an {INDEX_FILE} of more than {MAX_BYTES // 2**20} MiB")
    folder = path.parent / rest["shards"]
    with (folder / INDEX_FILE).open("wb") as file:
        file.write(text)
        _force(file)
    sync_folder(folder)
    place_tensors(rest, path, "checkpoint")  # raises where a node writes to a folder of its own
    WholeFiles().save_checkpoint(rest, path)


def _force(file) -> None:
    file.flush()
    os.fsync(file.fileno())
