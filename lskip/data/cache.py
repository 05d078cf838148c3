"""Folders that are written once and are either whole or not there."""

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path


def cached_folder(path: Path, write: Callable[[Path], None]) -> Path:
    """`path`, after `write(folder)` filled it if it was not there yet.

    The folder is filled under another name and renamed when whole, so neither a kill in the middle nor a
    second process that does the same leaves half a folder behind.
    """
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=".unfinished-", dir=path.parent))
    try:
        write(unfinished)
        os.rename(unfinished, path)
    except OSError:
        if not path.exists():  # otherwise another process was faster, with the same content
            raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return path
