"""A checkpoint's file: written beside its place and moved there whole, so that nothing can leave half of one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, BinaryIO

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO


class WholeFiles(TorchCheckpointIO):
    """Writes straight to the disk that the checkpoint is for.

    Lightning's own builds it in memory, writes it to $TMPDIR, and moves it from there: the size of a checkpoint more
    of memory, and what a kill leaves there stays for ever.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Replace the file at `path` at once.

        Raises:
            ValueError: it could not be written; what was there before is as it was.
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
        except RuntimeError as error:  # torch's own, which does not say why
            raise watched.failure or error from error
        file.flush()
        os.fsync(file.fileno())  # a name never stands for bytes that a power cut can take


class _Watched:
    """A file that remembers why writing to it failed."""

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
    """Return where a file lies while it is written."""
    return path.with_name(f".{path.name}.partial")


def remove_leftovers(folder: Path) -> None:
    """Delete what a killed run has left half written in `folder`. Nobody else may be writing there."""
    for pattern in (".*.partial", "last.partial"):  # the second as older versions named it
        for path in folder.glob(pattern):
            if path.is_file():
                path.unlink()
