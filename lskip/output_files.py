"""Where results go: folders that can be written, and files that a kill leaves whole."""

from __future__ import annotations

import json
import os
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any


def make_writable(folder: Path, field: str = "output") -> None:
    """Makes a folder where there is none; ValueError, which names the field, unless it can be written into."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ValueError(f"{field}: cannot write '{folder}' ({error.strerror})") from error


def write_json(path: Path, content: Any) -> None:
    """All at once: a kill leaves what was there before. Paths in it become strings."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(content, indent=1, default=os.fspath) + "\n", encoding="utf-8")
    os.replace(partial, path)
