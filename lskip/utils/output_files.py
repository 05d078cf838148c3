"""Output files and folders: checks that they are writable, locks for one writer, atomic writes."""

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
    """Return the path of a hidden file beside `path`, its name cut and hashed where it would become too long."""
    name = path.name
    if len(os.fsencode(name)) > 200:
        name = f"{name[:30]}…{sha256(os.fsencode(name)).hexdigest()[:16]}"
    return path.with_name(f".{name}.{end}")


def make_writable(folder: Path, field: str = "output") -> None:
    """Make a folder if it is missing; ValueError, naming `field`, unless it is writable."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ValueError(f"{field}: cannot write '{folder}' ({error.strerror})") from error


def check_output_file(path: Path, field: str = "output") -> None:
    """Raise ValueError or FileNotFoundError, naming `field`, unless a file can be written at `path`."""
    if path.is_dir():
        raise ValueError(f"{field}: '{path}' is a folder; name a file")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{field}: there is no folder '{path.parent}'")
    make_writable(path.parent, field)


@contextmanager
def only_writer(path: Path, field: str, wait: float = 0) -> Iterator[None]:
    """Lock `path` (a file or a folder, existing or not) against other processes of lskip inside the context.

    The lock is on a hidden file beside it, and is released by the system when the process dies.

    Args:
        wait: seconds to wait for another process.

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
        # Removed while locked: a waiting process then opens a new file.
        place.unlink(missing_ok=True)
        lock.release()


@contextmanager
def output_folder(folder: Path) -> Iterator[None]:
    """Make and lock a folder while this process writes into it; a new folder that stays empty is removed.

    Raises:
        ValueError: it is not writable, or another process writes there.
    """
    existed = folder.exists()
    make_writable(folder)
    try:
        with only_writer(folder, "output"):
            yield
    finally:
        if not existed and not any(folder.iterdir()):
            folder.rmdir()


def write_json(path: Path, content: Any) -> None:
    """Write `content` as JSON atomically, paths as strings."""
    write_bytes(path, (json.dumps(content, indent=1, default=os.fspath) + "\n").encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write `content` atomically: after a kill or a full disk the file is either the old one or the new one.

    The target of a symbolic link is replaced, not the link; pipes and devices are written into.
    """
    path = path.resolve()
    if path.exists() and not path.is_file():
        path.write_bytes(content)
        return
    partial = hidden_beside(path, f"{os.getpid()}-{get_ident()}.partial")  # one for each writer
    try:
        partial.write_bytes(content)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
