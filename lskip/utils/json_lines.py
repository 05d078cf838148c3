"""JSON Lines files (.jsonl): their objects, and the prompts or chat messages in them."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lskip.utils.checks import check_unicode
from lskip.utils.untrusted import parse_json

ENDINGS = (".jsonl", ".ndjson")  # compared in lower case
MAX_LINE = 4 * 2**20  # bytes; tokenizing a longer text would take gigabytes
_BOM = b"\xef\xbb\xbf"


def read_json_lines(path: Path, field: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (where, fields) for every line that is not blank; `where` begins an error message about that line.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a line is not UTF-8, not a JSON object, or too long.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{field}: there is no file '{path}'")
    with path.open("rb") as file:
        for number, data in enumerate(iter(lambda: file.readline(MAX_LINE + 1), b""), start=1):
            where = f"{field}: line {number} of '{path}'"
            if number == 1:
                data = data.removeprefix(_BOM)
            if len(data) > MAX_LINE:
                raise ValueError(f"{where} is longer than the {MAX_LINE // 2**20} MiB that are read")
            if data.strip():
                yield where, _fields(data, where)


def _fields(data: bytes, where: str) -> dict[str, Any]:
    try:
        return parse_line(data.decode("utf-8"), where)
    except UnicodeDecodeError as error:
        raise ValueError(f"{where} is not UTF-8 text (byte {error.start})") from error


def parse_line(text: str, where: str) -> dict[str, Any]:
    """Return the fields of a line; ValueError if it is not a JSON object or repeats a key."""
    fields = parse_json(text, where, _each_once)
    if not isinstance(fields, dict):
        raise ValueError(f"{where} is no object, like {{…}}")
    return fields


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the fields; ValueError for a repeated key, of which json would keep the last value only."""
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} is there twice")
    return fields


def text_of(fields: dict[str, Any], name: str, where: str) -> str:
    """Return the text field `name` of a line; ValueError if it is missing or not a text."""
    if name not in fields:
        raise ValueError(f"{where}: {name}: is missing")
    value = fields[name]
    if not isinstance(value, str):
        raise ValueError(f"{where}: {name}: {json.dumps(value)[:60]} is not a text")
    check_unicode(f"{where}: {name}", value)
    return value


def asked_of(fields: dict[str, Any], where: str) -> str | list[dict[str, Any]]:
    """Return the prompt or the chat messages of a line; ValueError unless it has exactly one of them."""
    if ("prompt" in fields) == ("messages" in fields):
        raise ValueError(f"{where}: needs either the key 'prompt' or the key 'messages'")
    if "prompt" in fields:
        prompt = text_of(fields, "prompt", where)
        if not prompt.strip():
            raise ValueError(f"{where}: prompt: is empty")
        return prompt
    messages = fields["messages"]
    if not isinstance(messages, list) or not messages or not all(map(_is_message, messages)):
        raise ValueError(f"{where}: messages: not a list of objects with texts role and content")
    for message in messages:
        check_unicode(f"{where}: messages", message["content"])
    return messages


def _is_message(message: Any) -> bool:
    return isinstance(message, dict) and all(isinstance(message.get(key), str) for key in ("role", "content"))
