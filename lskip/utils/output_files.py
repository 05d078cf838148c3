"""Where results go: places that can be written, one writer at a time, and files that a kill leaves whole."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryFile
from threading import get_ident
from typing import Any

from filelock import FileLock, Timeout


def hidden_beside(path: Path, end: str) -> Path:
    """Return a name in the folder of `path` for what belongs to it: of a long name, which more would not fit into, a
    part and a digest."""
    name = path.name
    if len(os.fsencode(name)) > 200:
        name = f"{name[:30]}…{sha256(os.fsencode(name)).hexdigest()[:16]}"
    return path.with_name(f".{name}.{end}")


def make_writable(folder: Path, field: str = "output") -> None:
    """Makes a folder where there is none; ValueError, which names the field, unless it can be written into."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ValueError(f"{field}: cannot write '{folder}' ({error.strerror})") from error


@contextmanager
def only_writer(path: Path, field: str, wait: float = 0) -> Iterator[None]:
    """Keep `path` (a file or a folder, there or not) from a second process of lskip as long as this one writes it.

    The lock is a hidden file beside it, which the system lets go of when a process dies.

    Args:
        wait: seconds that another process may take with it.

    Raises:
        ValueError: another process writes it.
    """
    path = Path(os.path.abspath(path))  # without ..
    if path.exists() and not (path.is_file() or path.is_dir()):
        yield  # a pipe, or /dev/null
        return
    place = hidden_beside(path, "lock")
    lock = FileLock(place)
    try:
        lock.acquire(timeout=wait)
    except Timeout as error:
        advice = "wait for it, or name another"
        raise ValueError(f"{field}: '{path}' is being written by another process; {advice}") from error
    except OSError as error:
        raise ValueError(f"{field}: cannot write '{place}' ({error.strerror})") from error
    try:
        yield
    finally:
        # Removed while it is held: whoever waits for this name opens a new file.
        place.unlink(missing_ok=True)
        lock.release()


@contextmanager
def output_folder(folder: Path, field: str = "output") -> Iterator[None]:
    """Keep a folder to this process while it writes there. It is made, and goes again if nothing came into it.

    Raises:
        ValueError: it cannot be written into, or another process writes there.
    """
    existed = folder.exists()
    make_writable(folder, field)
    try:
        with only_writer(folder, field):
            yield
    finally:
        if not existed and not any(folder.iterdir()):
            folder.rmdir()


def write_json(path: Path, content: Any) -> None:
    """All at once, as write_bytes. Paths in it become strings."""
    write_bytes(path, (json.dumps(content, indent=1, default=os.fspath) + "\n").encode())


def write_bytes(path: Path, content: bytes) -> None:
    """All at once: a kill, a full disk or a second writer leaves what was there before, or what is whole.

    A link stays one; a pipe or a device is written into, never replaced.
    """
    path = path.resolve()
    if path.exists() and not path.is_file():
        path.write_bytes(content)
        return
    partial = hidden_beside(path, f"{os.getpid()}-{get_ident()}.partial")  # a second writer has its own
    try:
        partial.write_bytes(content)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
