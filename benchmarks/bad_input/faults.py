"""Faults of the environment as context managers: a full or read-only disk, a second writer, signals."""

from __future__ import annotations

import errno
import io
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest.mock import patch

import safetensors
import safetensors.torch
import transformers

from lskip.cli import main

real_open = io.open


class Disk:
    """A simulated disk with room for so many bytes below a folder.

    Errors are injected, since root can write to read-only folders and tests cannot mount disks: into Python's files,
    and into two writers of libraries in Rust, with their own messages.
    """

    def __init__(self, folder: Path, room: int):
        self.folder, self.room = os.path.abspath(folder), room

    def has(self, path) -> bool:
        return isinstance(path, str | os.PathLike) and (os.path.abspath(path) + "/").startswith(self.folder + "/")

    def take(self, size: int) -> None:
        self.room -= size
        if self.room < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def open(self, file, mode="r", buffering=-1, encoding=None, errors=None, newline=None, closefd=True, opener=None):
        """Open a file; bytes written below the folder use up room."""
        if not self.has(file) or not set(mode) & set("wax+"):
            return real_open(file, mode, buffering, encoding, errors, newline, closefd, opener)
        raw = _File(self, file, mode.replace("b", "").replace("t", ""), closefd, opener)
        if buffering == 0:
            return raw
        buffered = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
        return buffered if "b" in mode else io.TextIOWrapper(buffered, encoding, errors, newline)


class _File(io.FileIO):
    def __init__(self, disk: Disk, file, mode: str, closefd: bool, opener):
        super().__init__(file, mode, closefd, opener)
        self.disk = disk

    def write(self, data) -> int | None:
        self.disk.take(len(data))
        return super().write(data)


@contextmanager
def full_disk(folder: Path, room: int) -> Iterator[None]:
    """Allow `room` bytes to be written below `folder`."""
    disk = Disk(folder, room)
    serialize, save = safetensors.torch.serialize_file, transformers.PreTrainedTokenizerFast.save_pretrained

    def serialize_file(tensors, path, *arguments, **more):
        if disk.has(path):
            disk.room -= sum(part.data_len for part in tensors.values())
        if disk.has(path) and disk.room < 0:
            text = "Error while serializing: I/O error: No space left on device (os error 28)"
            raise safetensors.SafetensorError(text)
        return serialize(tensors, path, *arguments, **more)

    def save_pretrained(self, folder, *arguments, **more):
        if disk.has(folder) and disk.room < 20_000:
            raise Exception("No space left on device (os error 28)")  # so does tokenizers
        return save(self, folder, *arguments, **more)

    with ExitStack() as stack:
        for module in ("builtins", "io"):
            stack.enter_context(patch(f"{module}.open", disk.open))
        stack.enter_context(patch("safetensors.torch.serialize_file", serialize_file))
        stack.enter_context(patch.object(transformers.PreTrainedTokenizerFast, "save_pretrained", save_pretrained))
        yield


@contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """Refuse to create, write, rename or remove anything below `folder`."""
    disk = Disk(folder, 0)

    def refusing(act: Callable, writes: Callable[..., bool] = lambda *arguments, **more: True) -> Callable:
        def refused(path, *arguments, **more):
            if disk.has(path) and writes(*arguments, **more):
                raise OSError(errno.EROFS, os.strerror(errno.EROFS), os.fspath(path))
            return act(path, *arguments, **more)

        return refused

    def by_mode(mode="r", *arguments, **more) -> bool:
        return bool(set(mode) & set("wax+"))

    def by_flags(flags, *arguments, **more) -> bool:
        return bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))

    with ExitStack() as stack:
        for module in ("builtins", "io"):
            stack.enter_context(patch(f"{module}.open", refusing(real_open, by_mode)))
        stack.enter_context(patch("os.open", refusing(os.open, by_flags)))
        for name in ("mkdir", "unlink", "remove", "rmdir", "rename", "replace", "truncate", "symlink", "utime"):
            stack.enter_context(patch(f"os.{name}", refusing(getattr(os, name))))
        serialize = safetensors.torch.serialize_file
        stack.enter_context(patch("safetensors.torch.serialize_file", _swapped(disk, serialize)))
        yield


def _swapped(disk: Disk, serialize: Callable) -> Callable:
    def serialize_file(tensors, path, *arguments, **more):
        if disk.has(path):
            text = "Error while serializing: I/O error: Read-only file system (os error 30)"
            raise safetensors.SafetensorError(text)
        return serialize(tensors, path, *arguments, **more)

    return serialize_file


@contextmanager
def second_writer(arguments: list[str], folder: Path) -> Iterator[None]:
    """Run the same command in a second process at the same time; its exit code goes to `folder`/second."""
    child = os.fork()
    if child == 0:
        code = 99
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            os.dup2(os.open(folder / "second.err", os.O_WRONLY | os.O_CREAT), 2)
            code = main(arguments)
        finally:
            (folder / "second").write_text(str(code))
            os._exit(0)
    try:
        yield
    finally:
        os.waitpid(child, 0)


@contextmanager
def signalled(number: int, when: Callable[[], bool], after: float = 0.0) -> Iterator[None]:
    """Send a signal to this process, `after` so many seconds after `when` becomes true."""
    over = threading.Event()

    def wait() -> None:
        while not over.is_set() and not when():
            time.sleep(0.002)
        if not over.wait(after):
            os.kill(os.getpid(), number)

    waiting = threading.Thread(target=wait, daemon=True)
    waiting.start()
    try:
        yield
    finally:
        over.set()
        signal.signal(number, signal.SIG_IGN)
        waiting.join()
