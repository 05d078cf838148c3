"""Reading of sharded checkpoints: a small `last.ckpt`, and a folder of safetensors files beside it with all tensors.

`last.ckpt` is a checkpoint as any other, but that {"shard": key} stands where a sharded tensor belongs, and that
`shards` names the folder, "last.ckpt.shards-300". In it are

| file                        | what it holds                                                                |
|-----------------------------|------------------------------------------------------------------------------|
| weights-00003.safetensors   | rows of the weights, those that rank 3 held                                  |
| optimizer-00003.safetensors | rows of the optimizer's states, as "0/<weight>/<state>": the first optimizer |
| index.json                  | of "weights/<name>" and "optimizer/<name>" dtype, shape and pieces: rank,    |
|                             | first row, the row after the last, CRC-32 of the bytes                       |

No name of a file comes from the index. Everything is checked against the headers of the files before a tensor is read.
"""

import re
import zlib
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lskip.utils.checks import is_whole
from lskip.utils.foreign import first_line
from lskip.utils.untrusted import parse_json, read_text

INDEX_FILE = "index.json"
FOLDER = re.compile(r"[^/\\\0]+\.shards-\d{1,18}")
VERSION = 1
DTYPES = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    **{"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8},
}
_MOST = (10**5, 2**48, 2**48, 2**32)  # above each number of a piece


@dataclass(frozen=True)
class Piece:
    """Rows of a tensor, from `first` up to but not including `end`, and the file that holds them."""

    file: Path
    first: int
    end: int
    crc32: int


@dataclass(frozen=True, eq=False)
class SavedTensor:
    """A tensor of a sharded checkpoint that has not been read; its pieces are in order and leave no row out."""

    name: str
    dtype: torch.dtype
    shape: torch.Size
    pieces: tuple[Piece, ...]
    field: str  # for messages

    def numel(self) -> int:
        return self.shape.numel()

    def read(self, first: int = 0, end: int | None = None) -> Tensor:
        """Return some of the rows, in memory of their own; only files that hold one of them are opened.

        A piece is mapped and compared with its checksum as a whole, since there is one a piece; only the rows are kept.

        Raises:
            ValueError: a file is damaged.
        """
        end = self.shape[0] if end is None else end
        rows = torch.empty((end - first, *self.shape[1:]), dtype=self.dtype)
        for piece in self.pieces:
            start, stop = max(first, piece.first), min(end, piece.end)
            if start < stop:
                with _opened(piece.file, self.field) as file:
                    part = file.get_slice(self.name)[:]
                    if zlib.crc32(part.reshape(-1).view(torch.uint8).numpy()) != piece.crc32:
                        raise ValueError(f"{self.field}: '{piece.file}' is damaged ({self.name} is not what was saved)")
                    rows[start - first : stop - first] = part[start - piece.first : stop - piece.first]
        return rows


def read_tensors(tensors: Mapping[str, Tensor | SavedTensor]) -> dict[str, Tensor]:
    """Return the tensors with each SavedTensor read; names of one (tied weights) share its memory."""
    saved = {id(part): part for part in tensors.values() if isinstance(part, SavedTensor)}
    read = {key: part.read() for key, part in saved.items()}
    return {name: read.get(id(part), part) for name, part in tensors.items()}


def read_all(checkpoint: dict) -> dict:
    """Return a checkpoint with every SavedTensor in it read, as one that was saved in one file."""
    states = [
        {**each, "state": {name: read_tensors(state) for name, state in each["state"].items()}}
        for each in checkpoint.get("optimizer_states", [])
    ]
    return {**checkpoint, "state_dict": read_tensors(checkpoint["state_dict"]), "optimizer_states": states}


def place_tensors(checkpoint: dict, path: Path, field: str, optimizer: bool = True) -> dict:
    """Return the content of `last.ckpt` with a SavedTensor wherever a tensor belongs; one that is whole, as it is.

    Args:
        path: of the file.
        field: the setting that names it, for messages.
        optimizer: whether its states are wanted; otherwise the files that hold them are not looked at.

    Raises:
        ValueError: the index or a file of the folder is missing, damaged, or does not fit the others.
    """
    if "shards" not in checkpoint:
        return checkpoint
    folder = _folder(checkpoint["shards"], path, field)
    index = _Index(folder, field)
    where = f"{field}: {str(path)!r} is not a readable checkpoint"
    try:
        weights = {name: index.placed(value) for name, value in checkpoint["state_dict"].items()}
        states = [_numbered(each, index) for each in checkpoint.get("optimizer_states", [])] if optimizer else None
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{where} (its parts are not those of a sharded one: {first_line(error)})") from error
    index.check_files()
    rest = {name: part for name, part in checkpoint.items() if name != "optimizer_states"}
    return {**rest, "state_dict": weights} | ({"optimizer_states": states} if states else {})


def _folder(name: Any, path: Path, field: str) -> Path:
    if not isinstance(name, str) or not FOLDER.fullmatch(name):
        raise ValueError(f"{field}: {str(path)!r} is not a readable checkpoint (it names no folder of shards)")
    if not (folder := path.parent / name).is_dir():
        raise ValueError(f"{field}: {str(path)!r} is a part of a checkpoint, and the folder '{folder}' is missing")
    return folder


def _numbered(state: Mapping[str, Any], index: "_Index") -> dict[str, Any]:
    """Return an optimizer's state with its parameters numbered in the order of its groups, as torch has them."""
    names = [name for group in state["param_groups"] for name in group["params"]]
    numbers = {name: number for number, name in enumerate(names)}
    groups = [{**group, "params": [numbers[name] for name in group["params"]]} for group in state["param_groups"]]
    placed = {
        numbers[name]: {key: index.placed(value) for key, value in part.items()}
        for name, part in state["state"].items()
    }
    return {**state, "state": placed, "param_groups": groups}


class _Index:
    """The tensors that index.json describes; those that are asked for are checked in the end, file by file."""

    def __init__(self, folder: Path, field: str):
        self._folder, self._field = folder, field
        self.place = folder / INDEX_FILE
        if not self.place.is_file():
            raise ValueError(f"{field}: '{self.place}' is missing, without which its checkpoint cannot be read")
        index = parse_json(read_text(self.place, field), f"{field}: '{self.place}'")
        if not isinstance(index, dict) or not isinstance(index.get("tensors"), dict):
            raise ValueError(f"{field}: '{self.place}' is no index of shards")
        if index.get("version") != VERSION:
            raise ValueError(f"{field}: '{self.place}' is of version {index.get('version')!r:.20}, not {VERSION}")
        self._entries: dict[str, Any] = index["tensors"]
        self._placed: dict[str, SavedTensor] = {}

    def placed(self, value: Any) -> Any:
        """Return the tensor that a mark {"shard": key} stands for, or any other value as it is."""
        if not isinstance(value, dict) or set(value) != {"shard"}:
            return value
        key = value["shard"]
        if key not in self._placed:
            if key not in self._entries:
                raise ValueError(f"{self._field}: '{self.place}' does not name {key!r:.100}")
            self._placed[key] = self._tensor(key, self._entries[key])
        return self._placed[key]

    def _tensor(self, key: str, entry: Any) -> SavedTensor:
        where = f"{self._field}: '{self.place}': {key!r:.100}"
        kind, _, name = key.partition("/")
        if not isinstance(entry, dict) or kind not in ("weights", "optimizer"):
            raise ValueError(f"{where} is no tensor")
        dtype, shape, pieces = (entry.get(part) for part in ("dtype", "shape", "pieces"))
        if not isinstance(dtype, str) or dtype not in DTYPES:
            raise ValueError(f"{where} is of dtype {dtype!r:.20}, which is not one of {', '.join(DTYPES)}")
        if not _are_whole(shape, (2**48,) * 8) or not shape:
            raise ValueError(f"{where} has no shape that a tensor has ({shape!r:.60})")
        if not isinstance(pieces, list) or not all(_are_whole(each, _MOST) and len(each) == 4 for each in pieces):
            raise ValueError(f"{where} is made of no pieces: rank, first row, row after the last, checksum")
        pieces = sorted(pieces, key=lambda piece: piece[1])
        _check_rows(pieces, shape[0], where)
        files = [shard_file(self._folder, kind, rank) for rank, *_ in pieces]
        found = tuple(Piece(file, *numbers) for file, (_, *numbers) in zip(files, pieces, strict=True))
        return SavedTensor(name, DTYPES[dtype], torch.Size(shape), found, self._field)

    def check_files(self) -> None:
        """Raise ValueError unless the files hold the pieces of all tensors that were placed, as they are described."""
        by_file: dict[Path, list[tuple[SavedTensor, Piece]]] = defaultdict(list)
        for tensor in self._placed.values():
            for piece in tensor.pieces:
                by_file[piece.file].append((tensor, piece))
        for path, parts in by_file.items():
            with _opened(path, self._field) as file:
                held = set(file.keys())
                for tensor, piece in parts:
                    _check_held(file, held, tensor, piece, f"{self._field}: '{path}'")


def _check_held(file: safe_open, held: set[str], tensor: SavedTensor, piece: Piece, where: str) -> None:
    if tensor.name not in held:
        raise ValueError(f"{where} lacks {tensor.name!r:.100}, which {INDEX_FILE} says it holds")
    part = file.get_slice(tensor.name)
    found = DTYPES.get(part.get_dtype()), tuple(part.get_shape())
    if found != (tensor.dtype, (piece.end - piece.first, *tensor.shape[1:])):
        kind = f"{part.get_dtype()} {found[1]}"
        raise ValueError(f"{where} holds {tensor.name!r:.100} as {kind}, which is not what {INDEX_FILE} says")


def _check_rows(pieces: list[list[int]], rows: int, where: str) -> None:
    """Raise ValueError unless pieces, ordered by their first row, hold each of the rows once, and each file one."""
    if len({rank for rank, *_ in pieces}) < len(pieces):
        raise ValueError(f"{where}: a file is named twice")
    reached = 0
    for _, first, end, _ in pieces:
        if first > reached:
            raise ValueError(f"{where}: rows {reached} to {first} are in no file")
        if first < reached or end <= first:
            raise ValueError(f"{where}: rows {first} to {end} are in two files, or in none")
        reached = end
    if reached != rows:
        raise ValueError(f"{where}: {rows} rows, but the files hold {reached}")


def _are_whole(values: Any, most: tuple[int, ...]) -> bool:
    if not isinstance(values, list) or len(values) > len(most):
        return False
    return all(is_whole(value) and 0 <= value < limit for value, limit in zip(values, most, strict=False))


@contextmanager
def _opened(path: Path, field: str) -> Iterator[safe_open]:
    """Yield a safetensors file; raise ValueError, naming it, for whatever is wrong with it inside."""
    if not path.is_file():  # nor anything that has no end, such as a pipe
        raise ValueError(f"{field}: '{path}' is missing, a part of a sharded checkpoint")
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{field}: '{path}' is damaged ({first_line(error)})") from error


def shard_file(folder: Path, kind: str, rank: int) -> Path:
    """Return the file with a rank's rows of the "weights", or of the "optimizer"."""
    return folder / f"{kind}-{rank:05d}.safetensors"


def shards_of(path: Path) -> Path | None:
    """Return the folder of shards that a checkpoint names; None where it is whole.

    Raises:
        ValueError: it is no checkpoint that can be read, or names no folder.
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # whose type depends on where the file is damaged
        raise ValueError(f"{str(path)!r} is not a readable checkpoint ({first_line(error)})") from error
    name = checkpoint.get("shards") if isinstance(checkpoint, dict) else None
    return None if name is None else _folder(name, path, "model")


def files_of(path: Path) -> list[Path]:
    """Return the files that a checkpoint consists of, in a fixed order: its own, and those of its folder of shards."""
    with suppress(ValueError):
        if (folder := shards_of(path)) is not None:
            return [path, *sorted(each for each in folder.iterdir() if each.is_file())]
    return [path]
