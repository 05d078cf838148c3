"""Reading of .jsonl, .ndjson and .json files row by row, without conversion of types."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from lskip.data.corpora import PLACE
from lskip.data.files import LONGEST, NotTextError, numbered_lines, opened, suffix_of
from lskip.utils.untrusted import parse_json

CHUNK = 2**20  # characters
DECODER = json.JSONDecoder()
SEPARATORS = re.compile(r"[\s,\ufeff]*")  # a byte order mark may be in the middle of joined files
SHORT = 16  # an error this near to the end of the text read so far may vanish with more of it


def read_json(paths: list[str], lone: bool = False) -> Iterator[dict]:
    """Yield the objects of each file: one on each line, or the elements of a list.

    Raises:
        ValueError: a value that is not JSON or not an object, with its line.
    """
    for path in map(Path, paths):
        rows = listed(path) if is_listed(path) else lines(path)
        for number, row in rows:
            place = f"line {number}" if lone else f"'{path}' line {number}"
            if not isinstance(row, dict):
                raise ValueError(f"source: {place}: {type(row).__name__} is no object with columns")
            yield {**row, PLACE: place}


def is_listed(path: Path) -> bool:
    """Return whether a file is a list, or a .json file of objects that span several lines."""
    first = next((line.strip() for _, line in numbered_lines(path) if line.strip()), "").lstrip("\ufeff")
    if first.startswith("["):
        return True
    try:
        json.loads(first)
    except (ValueError, RecursionError):
        return suffix_of(path) == ".json" and first.startswith("{")
    return False


def lines(path: Path) -> Iterator[tuple[int, Any]]:
    for number, line in numbered_lines(path):
        line = line.lstrip("\ufeff")  # in the middle of joined files
        if line.strip():
            yield number, parse_json(line, f"source: '{path}' line {number}")


def listed(path: Path) -> Iterator[tuple[int, Any]]:
    """Yield the first line and the value of each element of a file; lists may follow one another (joined files).

    Raises:
        ValueError: text that is not JSON, or outside of the lists.
    """
    with opened(path) as file:
        text = JsonText(file, path)
        is_list = text.peek() == "["
        while text.peek() == ("[" if is_list else "{"):
            text.place += is_list
            while text.peek() not in ("", "]"):
                yield text.line, text.value()
            if is_list and text.peek() != "]":
                raise ValueError(f"source: '{path}' ends inside its list (line {text.line})")
            text.place += is_list
        if text.peek():
            raise ValueError(f"source: '{path}' line {text.line} is not JSON ({text.peek()!r} behind the rows)")


@dataclass
class JsonText:
    """A parser of consecutive values in a file, with only the next one in memory."""

    file: TextIO
    path: Path
    text: str = ""
    place: int = 0
    line: int = 1

    def peek(self) -> str:
        """Return the first character that is neither blank nor a comma; "" at the end."""
        while True:
            self._go_to(SEPARATORS.match(self.text, self.place).end())
            if self.place < len(self.text) or not self._read(CHUNK):
                return self.text[self.place : self.place + 1]

    def value(self) -> Any:
        """Return the next value, and read as much of the file as it needs."""
        while True:
            try:
                value, end = DECODER.raw_decode(self.text, self.place)
                self._go_to(end)
                return value
            except json.JSONDecodeError as error:
                is_cut = error.msg.startswith("Unterminated") or error.pos > len(self.text) - SHORT
                size, line = len(self.text) - self.place, self.line + self.text.count("\n", self.place, error.pos)
                if not (is_cut and size < LONGEST and self._read(max(CHUNK, size))):
                    raise ValueError(f"source: '{self.path}' line {line} is not JSON ({error.msg})") from error
            except (RecursionError, ValueError) as error:  # too deeply nested, or a number of thousands of digits
                raise ValueError(
                    f"source: '{self.path}' line {self.line} is not JSON that is read ({error})"
                ) from error

    def _go_to(self, place: int) -> None:
        self.line += self.text.count("\n", self.place, place)
        self.place = place

    def _read(self, size: int) -> bool:
        try:
            more = self.file.read(size)
        except UnicodeError as error:
            raise NotTextError(f"source: '{self.path}' is not UTF-8 text (near line {self.line})") from error
        self.text, self.place = self.text[self.place :] + more, 0
        return bool(more)
