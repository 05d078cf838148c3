"""Atomic writing of checkpoint files."""

import os
from pathlib import Path
from typing import Any, BinaryIO

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO


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
        except OSError as error:
            whole = "; the one before it is whole" if path.exists() else ""
            raise ValueError(f"checkpoint: cannot write '{path}' ({error.strerror}){whole}") from error
        finally:
            partial.unlink(missing_ok=True)


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
