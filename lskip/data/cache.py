"""Cache folders: written once, atomically, checked by hashes, and rewritten where they were changed."""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

from filelock import FileLock, Timeout
from lightning.pytorch.utilities import rank_zero_warn

WRITTEN = "written.json"  # size and sha256 of every other file of the folder
FOLDERS = ("documents", "tokenizers", "tokens", "streams")
UNFINISHED = ".unfinished-"
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)


def cached_folder(path: Path, write: Callable[[Path], None]) -> Path:
    """Return `path`, after `write(folder)` if it did not exist or was changed since it was written.

    The folder is filled under another name and renamed when complete, so that neither a kill nor a second process
    leaves an incomplete folder.

    Raises:
        OSError: no space, or the place cannot be written.
    """
    if os.path.lexists(path):
        wrong = what_is_wrong(path)
        if wrong is None:
            return path
        rank_zero_warn(f"cache_dir: '{path}' is not as it was written ({wrong}); it is made anew")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with unfinished_folder(path.parent) as folder:
            write(folder)
            (folder / WRITTEN).write_text(json.dumps(sizes_and_hashes(folder)), encoding="utf-8")
            put_in_place(folder, path)
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        raise OSError(f"cache_dir: cannot write '{path.parent}' ({os.strerror(error.errno)})") from error
    return path


def what_is_wrong(folder: Path) -> str | None:
    """Return how the files of `folder` differ from those that were written; None where they do not."""
    try:
        written = json.loads((folder / WRITTEN).read_text(encoding="utf-8"))
        found = sizes_and_hashes(folder)
    except (OSError, ValueError):
        return f"no readable {WRITTEN}"
    if not isinstance(written, dict):
        return f"no readable {WRITTEN}"
    differing = [name for name in {**written, **found} if written.get(name) != found.get(name)]
    return f"{differing[0]} is another" if differing else None


def sizes_and_hashes(folder: Path) -> dict[str, list]:
    found = {}
    for path in sorted(folder.iterdir()):
        if path.name != WRITTEN:
            with path.open("rb") as file:
                found[path.name] = [path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()]
    return found


@contextmanager
def unfinished_folder(parent: Path) -> Iterator[Path]:
    """Yield a new folder in `parent`, removed afterwards unless it was renamed.

    This process holds a lock beside it; `remove_litter` removes folders whose lock nobody holds.
    """
    folder = parent / f"{UNFINISHED}{uuid4().hex}"
    with locked(folder.with_suffix(".lock")):
        folder.mkdir()
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def locked(place: Path, timeout: float = -1) -> Iterator[None]:
    lock = FileLock(place)
    lock.acquire(timeout=timeout)
    try:
        yield
    finally:
        place.unlink(missing_ok=True)  # while it is held: a waiting process opens a new file of this name
        lock.release()


def put_in_place(folder: Path, path: Path) -> None:
    try:
        os.rename(folder, path)
    except OSError:
        if what_is_wrong(path) is None:
            return  # another process was faster, with the same content
        discard(path)
        os.rename(folder, path)


def discard(path: Path) -> None:
    """Remove a file or folder: its name is free immediately, and processes that have it open can go on reading."""
    with locked(path.parent / f"{UNFINISHED}{uuid4().hex}.lock"):
        removed = path.parent / f"{UNFINISHED}{uuid4().hex}"
        os.rename(path, removed)
        remove(removed)


def remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def remove_litter(cache: Path) -> None:
    """Remove unfinished folders of killed processes from a cache, and no others."""
    for place in (place for folder in FOLDERS for place in (cache / folder).glob(f"{UNFINISHED}*.lock")):
        try:
            with locked(place, timeout=0):
                remove(place.with_suffix(""))
        except (Timeout, OSError):
            continue  # being written, or another user's
