"""The file of a sweep under way: a line for each finished part, so that a kill loses one part at most."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


class SweepFile:
    """Parts of one sweep by name. The first line says of what sweep; another sweep does not go on with it.

    Attributes:
        parts: name -> record, in the order in which they were finished.
    """

    def __init__(self, path: Path, sweep: dict[str, Any], resume: bool, overwrite: bool):
        """
        Args:
            sweep: what all parts have in common, in plain types.

        Raises:
            ValueError: the file exists and neither flag says what to do (or both do), or it is of another sweep.
        """
        self.path = path
        self.parts: dict[str, dict[str, Any]] = {}
        if overwrite and resume:
            raise ValueError("overwrite: true and resume: true exclude each other")
        if path.exists() and not (overwrite or resume):
            raise ValueError(
                f"output: '{path.parent}' holds a sweep; go on with it by --resume true, replace it by --overwrite"
                " true, or name another"
            )
        found = self._whole_lines() if resume else []
        if found:
            self._take(found, sweep)
        else:
            path.write_text(json.dumps({"sweep": sweep}) + "\n", encoding="utf-8")

    def _whole_lines(self) -> list[dict[str, Any]]:
        """What the file holds; a last line that a kill cut short is removed."""
        data = self.path.read_bytes() if self.path.exists() else b""
        whole = data[: data.rfind(b"\n") + 1]
        if len(whole) < len(data):
            with self.path.open("r+b") as file:
                file.truncate(len(whole))
        try:
            return [json.loads(line) for line in whole.decode("utf-8").splitlines()]
        except ValueError as error:
            raise ValueError(f"output: '{self.path}' is not the file of a sweep ({error})") from error

    def _take(self, lines: list[dict[str, Any]], sweep: dict[str, Any]) -> None:
        first, *parts = lines
        other = first.get("sweep") if isinstance(first, dict) else None
        if other is None:
            raise ValueError(f"output: '{self.path}' is not the file of a sweep (its first line says no 'sweep')")
        for name, value in sweep.items():
            if other.get(name) != value:
                raise ValueError(
                    f"{name}: {value!r}, but the sweep in '{self.path.parent}' has {other.get(name)!r}; name the same,"
                    " or another output"
                )
        self.parts = {part["part"]: part["record"] for part in parts}

    def add(self, name: str, record: dict[str, Any]) -> None:
        """Keeps a finished part."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"part": name, "record": record}) + "\n")
        self.parts[name] = record
