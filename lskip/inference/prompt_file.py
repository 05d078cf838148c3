"""Reading of prompt files for `lskip predict`; every line is checked before a model is loaded."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path

from lskip.inference import GenerationSettings, TextGenerator
from lskip.utils.checks import check_unicode
from lskip.utils.json_lines import ENDINGS, asked_of, parse_line
from lskip.utils.untrusted import parse_json, read_text

WRITTEN = ("line", "text", "tokens", "seconds", "acceptance_rate", "tokens_per_round", "finish_reason", "seed")
STANDARD_INPUT = ("-", "/dev/stdin")
MAX_BYTES = 2**30  # of a file of prompts, which is read whole


@dataclass(frozen=True)
class Prompt:
    """One prompt of a file.

    Attributes:
        line: its number in the file, from 1.
        fields: keys and values of its line, the prompt among them.
    """

    line: int
    fields: dict

    @property
    def content(self) -> str | list[dict]:
        """The prompt: a text, or chat messages."""
        return self.fields["prompt"] if "prompt" in self.fields else self.fields["messages"]

    def to_train_on(self, chat: bool) -> Prompt:
        """Return it in the form that `fit` puts before a completion as the model sees it here.

        Args:
            chat: whether a text goes through the chat template: it becomes messages then.

        Raises:
            ValueError: its line has a completion.
        """
        if "completion" in self.fields:
            raise ValueError(f"prompts: line {self.line}: the key 'completion' is taken: it is what predict writes")
        if not chat or "messages" in self.fields:
            return self
        others = {name: value for name, value in self.fields.items() if name != "prompt"}
        return Prompt(self.line, {"messages": [{"role": "user", "content": self.content}], **others})

    def encode(self, generator: TextGenerator, settings: GenerationSettings) -> list[int]:
        """Return its token ids; ValueError with the line if this model cannot answer it (too long, no template)."""
        try:
            return generator.prepare(self.content, settings).prompt
        except ValueError as error:
            raise ValueError(f"prompts: line {self.line}: {error}") from error


def read_prompts(path: Path) -> list[Prompt]:
    """Return the prompts of a .txt (one a line) or .jsonl file, or of standard input ("-"), blank lines left out.

    Standard input holds JSON lines if its first line is one that has a prompt, and else a prompt a line.

    Raises:
        ValueError: not such a file, a line that is no prompt (with its number), or no prompt at all.
        FileNotFoundError: no such file.
    """
    text, is_json = _read(path)
    # Not splitlines: that would also cut at rare characters that a prompt may hold.
    lines = [(line, each.removesuffix("\r")) for line, each in enumerate(text.split("\n"), start=1) if each.strip()]
    if not lines:
        raise ValueError(f"prompts: '{path}' holds no prompt")
    if is_json is None:
        is_json = _begins_with_json(lines[0][1])
    if not is_json and "\0" in text:
        line = 1 + text[: text.index("\0")].count("\n")
        raise ValueError(f"prompts: line {line} of '{path}' holds a NUL, as text does that is not UTF-8 but UTF-16")
    parse = _parse_json if is_json else lambda line, text: {"prompt": text}
    return [Prompt(line, parse(line, each)) for line, each in lines]


def _read(path: Path) -> tuple[str, bool | None]:
    """Return the file's text, and whether it is JSON lines; None: the first line tells."""
    if str(path) in STANDARD_INPUT:
        return read_standard_input("prompts", MAX_BYTES), None
    kind = path.suffix.lower()
    if kind not in (".txt", *ENDINGS):
        raise ValueError(f"prompts: '{path}' is neither a .txt nor a .jsonl file, nor - for standard input")
    if not path.is_file():
        raise FileNotFoundError(f"prompts: there is no file '{path}'")
    return read_text(path, "prompts", MAX_BYTES), kind in ENDINGS


def read_standard_input(field: str, max_bytes: int) -> str:
    """Return the text of standard input, checked as untrusted.read_text checks a file's."""
    if sys.stdin is None:
        raise ValueError(f"{field}: '-' is standard input, which is closed")
    data = getattr(sys.stdin, "buffer", sys.stdin).read(max_bytes + 1)
    if len(data) > max_bytes:
        raise ValueError(f"{field}: standard input is larger than the {max_bytes // 2**20} MiB that are read")
    try:
        return data if isinstance(data, str) else data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{field}: standard input is not UTF-8 text (byte {error.start})") from error


def _begins_with_json(line: str) -> bool:
    try:
        first = parse_json(line, "prompts: line 1")
    except ValueError:
        return False
    return isinstance(first, dict) and not {"prompt", "messages"}.isdisjoint(first)


def _parse_json(line: int, text: str) -> dict:
    where = f"prompts: line {line}"
    fields = parse_line(text, where)
    asked_of(fields, where)
    if "tools" in fields:
        raise ValueError(f"{where}: the key 'tools' is read by no prompt here; leave it out")
    for name, value in fields.items():
        if name in WRITTEN:
            raise ValueError(f"{where}: the key {name!r} is taken: it is what predict writes")
        _check_writable(f"{where}: {name}", name, value)
    return fields


def _check_writable(where: str, name: str, value) -> None:
    """Raise ValueError for what could not be written beside the answer, before any answer is computed."""
    try:
        text = json.dumps([[[[[[[[{name: value}]]]]]]]], ensure_ascii=False, allow_nan=False)
    except RecursionError as error:
        raise ValueError(f"{where}: too deeply nested") from error
    except ValueError as error:
        raise ValueError(f"{where}: a number that is not finite, which JSON has no word for") from error
    check_unicode(where, text)
