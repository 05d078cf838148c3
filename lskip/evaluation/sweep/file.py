"""The file of a sweep under way, with a line for each finished part, so that a kill loses one part at most."""

import json
from pathlib import Path
from typing import Any

from lskip.utils.untrusted import parse_json

CELL = {"draft": str, "exit_layer": int | None, "num_speculations": int, "policy": str, "mismatches": int}
CELL |= {"acceptance_rate": int | float | None, "tokens_per_round": int | float}
TIMES = {"speedup": int | float, "speedups": list, "tokens_per_second": int | float}
TIMES |= {"share_of_ideal": int | float | None}


class SweepFile:
    """Finished parts of one sweep. The first line says of which; another sweep does not go on with it.

    Attributes:
        parts: name -> record, in the order in which they were finished.
    """

    def __init__(self, path: Path, sweep: dict[str, Any], resume: bool, overwrite: bool):
        """Read the parts that the file has, if this sweep goes on with it.

        Args:
            sweep: task, options and counts of all parts, in plain types.

        Raises:
            ValueError: the file exists and neither flag says what to do (or both do), or it is of another sweep.
        """
        self.path = path
        self.parts: dict[str, dict[str, Any]] = {}
        if overwrite and resume:
            raise ValueError("overwrite: true and resume: true exclude each other")
        found = [] if overwrite else self._whole_lines()
        if len(found) > 1 and not resume:
            raise ValueError(
                f"output: '{path.parent}' holds a sweep; go on with it by --resume true, replace it by --overwrite"
                " true, or name another"
            )
        self._header = ""  # is written with the first part, so that a sweep that is refused leaves no file
        if found and resume:
            self._take(found, sweep)
        else:
            self._header = json.dumps({"sweep": sweep}) + "\n"

    def _whole_lines(self) -> list[Any]:
        """Return the file's lines; a last one that a kill cut short is removed from it."""
        data = self.path.read_bytes() if self.path.exists() else b""
        whole = data[: data.rfind(b"\n") + 1]
        if len(whole) < len(data):
            with self.path.open("r+b") as file:
                file.truncate(len(whole))
        lines = whole.decode("utf-8", errors="replace").split("\n")[:-1]
        return [parse_json(line, self._line(number)) for number, line in enumerate(lines, start=1)]

    def _line(self, number: int) -> str:
        advice = "remove that line to measure its part again" if number > 1 else "name another output"
        return f"output: line {number} of '{self.path}' ({advice})"

    def _take(self, lines: list[Any], sweep: dict[str, Any]) -> None:
        first, *parts = lines
        other = first.get("sweep") if isinstance(first, dict) else None
        if not isinstance(other, dict):
            raise ValueError(f"output: '{self.path}' is not the file of a sweep (its first line says no 'sweep')")
        for name, value in sweep.items():
            if other.get(name) != value:
                raise ValueError(
                    f"{name}: {value!r}, but the sweep in '{self.path.parent}' has {other.get(name)!r}; name the same,"
                    " or another output"
                )
        for number, part in enumerate(parts, start=2):
            if not _is_part(part):
                raise ValueError(f"{self._line(number)} is not what a sweep writes")
            self.parts[part["part"]] = part["record"]

    def add(self, name: str, record: dict[str, Any]) -> None:
        """Write a finished part; ValueError if that fails, with the earlier ones still there."""
        try:
            with self.path.open("w" if self._header else "a", encoding="utf-8") as file:
                file.write(f"{self._header}{json.dumps({'part': name, 'record': record})}\n")
        except OSError as error:
            advice = f"{len(self.parts)} parts are kept; go on with --resume true"
            raise ValueError(f"output: cannot write '{self.path}' ({error.strerror}); {advice}") from error
        self._header = ""
        self.parts[name] = record


def _is_part(part: Any) -> bool:
    """Return whether it is a cell's line, with times, or a fixed exit's, with scores; only fields in use count."""
    record = part.get("record") if isinstance(part, dict) else None
    if not isinstance(record, dict) or not isinstance(part.get("part"), str):
        return False
    if "times" in record:
        return (
            _fits(record, CELL) and _fits(record["times"], TIMES) and all(map(_is_number, record["times"]["speedups"]))
        )
    return _fits(record, {"exit_layer": int, "prompts": int, "scores": dict}) and all(
        map(_is_number, record["scores"].values())
    )


def _fits(record: Any, kinds: dict[str, Any]) -> bool:
    return isinstance(record, dict) and all(
        name in record and isinstance(record[name], kind) for name, kind in kinds.items()
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float)
