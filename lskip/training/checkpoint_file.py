"""Atomic writing of checkpoint files."""

import glob
import os
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch import Trainer

from lskip.models.reading.shards import FOLDER, INDEX_FILE, place_tensors, read_all, shards_of


class WholeFiles(TorchCheckpointIO):
    """Checkpoint writing on the target disk, in place of Lightning's.

    Lightning serializes into memory, writes to $TMPDIR and moves the file from there: it needs a checkpoint's size more
    of memory, and a killed run leaves files there for ever.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Replace the file at `path` atomically.

        Raises:
            ValueError: it could not be written; the previous file is unchanged.
        """
        path = Path(path)
        partial = partial_of(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            _write(checkpoint, partial)
            os.replace(partial, path)
            sync_folder(path.parent)
        except OSError as error:
            whole = "; the one before it is whole" if path.exists() else ""
            raise ValueError(f"checkpoint: cannot write '{path}' ({error.strerror}){whole}") from error
        finally:
            partial.unlink(missing_ok=True)
        remove_other_shards(path)

    def load_checkpoint(self, path: str | Path, *arguments, **settings) -> dict[str, Any]:
        """Return the whole checkpoint, whether it is one file or sharded."""
        checkpoint = self.load_parts(path, *arguments, **settings)
        return read_all(checkpoint) if "shards" in checkpoint else checkpoint

    def load_parts(self, path: str | Path, *arguments, **settings) -> dict[str, Any]:
        """Return a checkpoint as `load_checkpoint` does, but with a SavedTensor for what is sharded."""
        return place_tensors(super().load_checkpoint(path, *arguments, **settings), Path(path), "ckpt_path")

    def remove_checkpoint(self, path: str | Path) -> None:
        super().remove_checkpoint(path)
        remove_other_shards(Path(path))


def use_whole_files(trainer: Trainer) -> None:
    """Let a Trainer read and write checkpoints by WholeFiles, unless it has been given something of its own."""
    if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
        trainer.strategy.checkpoint_io = WholeFiles()


def _write(checkpoint: dict[str, Any], path: Path) -> None:
    with path.open("wb") as file:
        watched = _Watched(file)
        try:
            torch.save(checkpoint, watched)
        except RuntimeError as error:  # torch's, without the reason
            raise watched.failure or error from error
        file.flush()
        os.fsync(file.fileno())  # before the rename, so that a power cut cannot leave an incomplete file under its name


class _Watched:
    """A file that keeps the OSError of a failed write."""

    def __init__(self, file: BinaryIO):
        self._file = file
        self.failure: OSError | None = None

    def write(self, data) -> int:
        try:
            return self._file.write(data)
        except OSError as error:
            self.failure = error
            raise

    def flush(self) -> None:
        self._file.flush()


def partial_of(path: Path) -> Path:
    """Return the path of a file while it is being written."""
    return path.with_name(f".{path.name}.partial")


def remove_leftovers(folder: Path) -> None:
    """Delete partial files that a killed run left in `folder`, where no other process may be writing."""
    for path in folder.glob(".*.partial"):
        if path.is_file():
            path.unlink()
    for shards in folder.glob("*.shards-*"):
        remove_other_shards(folder / shards.name.rpartition(".shards-")[0])


def remove_other_shards(path: Path) -> None:
    """Delete folders of shards made for the checkpoint at `path` that neither it nor a copy of it beside it names."""
    folders = [each for each in path.parent.glob(f"{glob.escape(path.name)}.shards-*") if FOLDER.fullmatch(each.name)]
    try:
        named = {shards_of(path)} if folders and path.is_file() else set()
    except ValueError:  # then it is not known what it needs
        return
    others = [folder for folder in folders if folder not in named and not folder.is_symlink()]
    for copy in path.parent.glob("*.ckpt") if others else ():
        with suppress(ValueError):
            named.add(shards_of(copy))
    for folder in others:
        if folder not in named:
            _remove_shards(folder)


def _remove_shards(folder: Path) -> None:
    """Delete what lskip wrote into a folder of shards, the index first, and the folder where nothing else is in it."""
    with suppress(OSError):  # what stays is removed the next time
        for pattern in (INDEX_FILE, "weights-*.safetensors", "optimizer-*.safetensors"):
            for path in folder.glob(pattern):
                path.unlink()
        folder.rmdir()


def sync_folder(folder: Path) -> None:
    """Force the names of a folder's files to the disk."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
