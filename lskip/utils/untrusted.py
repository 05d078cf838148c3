"""Untrusted text: files of bounded size, JSON and YAML parsed to plain values, terminal output escaped.

Every reader raises ValueError with one sentence that names the field and the place, whatever was wrong.
"""

import json
import signal
import threading
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

MAX_BYTES = 64 * 2**20  # of a file that is read whole and parsed
MAX_NODES = 100_000  # of a YAML document with its aliases expanded
MAX_DEPTH = 100  # of lists in lists
_DIRECTIONS = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"  # change the direction of writing


def read_text(path: Path, field: str, max_bytes: int = MAX_BYTES) -> str:
    """Return the text of a UTF-8 file, with or without a byte order mark.

    Raises:
        ValueError: it is larger than `max_bytes`, or not UTF-8. OSError: it cannot be read.
    """
    with path.open("rb") as file:
        data = file.read(max_bytes + 1)
    if len(data) > max_bytes:
        raise ValueError(f"{field}: '{path}' is larger than the {max_bytes // 2**20} MiB that are read")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{field}: '{path}' is not UTF-8 text (byte {error.start})") from error


def parse_json(text: str, where: str, object_of: Callable[[list[tuple[str, Any]]], Any] | None = None) -> Any:
    """Return the value of a JSON text; `where` begins the message of the ValueError if it is not JSON.

    Args:
        object_of: makes an object of its (key, value) pairs, and may raise ValueError; None: a dict.
    """
    try:
        return json.loads(text, object_pairs_hook=object_of)
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if "\n" in text.strip() else ""
        raise ValueError(f"{where} is not JSON ({error.msg} at {line}column {error.colno})") from error
    except RecursionError as error:
        raise ValueError(f"{where} is not JSON that is read (too deeply nested)") from error
    except ValueError as error:  # a number of thousands of digits, or object_of's
        raise ValueError(f"{where} is not JSON that is read ({error})") from error


def parse_yaml(text: str, where: str, loader: type = yaml.SafeLoader) -> Any:
    """Return the plain values of a YAML text; `where` begins the message of the ValueError if it is not YAML.

    A few hundred bytes of aliases may expand to billions of values: they are counted before any is built.
    """
    try:
        document = yaml.compose(text, Loader=loader)
        check_nodes(document)
        _check_keys(document, set())
        return yaml.load(text, Loader=loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ValueError(f"{where} is not plain YAML ({error.problem or error.context}{place})") from error
    except yaml.YAMLError as error:
        raise ValueError(f"{where} is not plain YAML ({' '.join(str(error).split())[:100]})") from error
    except RecursionError as error:
        raise ValueError(f"{where} is not YAML that is read (too deeply nested)") from error
    except (ValueError, OverflowError) as error:  # a key twice, a date of month 13, a number of thousands of digits
        raise ValueError(f"{where} is not YAML that is read ({error})") from error


def check_nodes(document: yaml.Node | None) -> None:
    """Raise ValueError if a document expands to too many values, is nested too deeply or contains itself."""
    if document is not None:
        _count_nodes(document, {}, 0)


def _count_nodes(node: yaml.Node, known: dict[int, int], depth: int) -> int:
    """Return how many values a node expands to. ValueError: too many, too deep, or a node within itself."""
    if id(node) in known:
        if known[id(node)] == 0:
            raise ValueError("it contains itself")
        return known[id(node)]
    if depth > MAX_DEPTH:
        raise ValueError(f"more than {MAX_DEPTH} levels deep")
    known[id(node)] = 0
    parts = node.value if isinstance(node, yaml.CollectionNode) else []
    flat = [part for pair in parts for part in pair] if isinstance(node, yaml.MappingNode) else parts
    count = 1 + sum(_count_nodes(part, known, depth + 1) for part in flat)
    if count > MAX_NODES:
        raise ValueError(f"its aliases stand for more than {MAX_NODES} values")
    known[id(node)] = count
    return count


def _check_keys(node: yaml.Node | None, seen: set[int]) -> None:
    """Raise ValueError for a repeated key, of which the loaders would silently take the last value."""
    if not isinstance(node, yaml.CollectionNode) or id(node) in seen:
        return
    seen.add(id(node))
    parts = node.value
    if isinstance(node, yaml.MappingNode):
        keys = Counter((key.tag, key.value) for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        for (tag, name), count in keys.most_common(1):
            if count > 1 and tag != "tag:yaml.org,2002:merge":
                raise ValueError(f"the key {name!r} is there twice")
        parts = [value for _, value in node.value]
    for part in parts:
        _check_keys(part, seen)


def printable(text: str, keep: str = "\n\t") -> str:
    """Return `text` with control characters escaped, which could move a terminal's cursor or set its title."""
    return "".join(each if each in keep or not _controls(each) else _written_out(each) for each in text)


def _controls(character: str) -> bool:
    # Cc: escape, bell, backspace …; Cs: lone surrogates, which cannot be encoded.
    return unicodedata.category(character) in ("Cc", "Cs") or character in _DIRECTIONS


def _written_out(character: str) -> str:
    return f"\\x{ord(character):02x}" if ord(character) < 256 else f"\\u{ord(character):04x}"


@contextmanager
def time_limit(seconds: float, message: str) -> Iterator[None]:
    """Raise ValueError(message) in the code inside after so many seconds, as for chat templates that do not end.

    Only the main thread of a Unix process can set the alarm; elsewhere nothing is limited.
    """
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return

    inside = True

    def stop(signum, frame):
        if inside:
            raise ValueError(message)

    previous = signal.signal(signal.SIGALRM, stop)
    # Repeated: jinja2 swallows an exception raised while it folds constants.
    signal.setitimer(signal.ITIMER_REAL, seconds, 0.2)
    try:
        yield
    finally:
        inside = False
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
