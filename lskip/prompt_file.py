"""The two files of `lskip predict`: prompts, checked whole before a model is loaded, and what they were answered."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from lskip.inference import GenerationSettings, TextGenerator

WRITTEN = ("line", "text", "tokens", "seconds", "acceptance_rate", "tokens_per_round", "finish_reason", "seed")


@dataclass(frozen=True)
class Prompt:
    """One prompt of a file.

    Attributes:
        line: its number in the file, from 1.
        fields: what its line says, the prompt among it.
    """

    line: int
    fields: dict

    @property
    def content(self) -> str | list[dict]:
        """A text, or chat messages."""
        return self.fields["prompt"] if "prompt" in self.fields else self.fields["messages"]

    def check(self, generator: TextGenerator, settings: GenerationSettings) -> None:
        """ValueError with the line if this model cannot answer it: too long, no chat template …"""
        try:
            generator.prepare(self.content, settings)
        except ValueError as error:
            raise ValueError(f"prompts: line {self.line}: {error}") from error


def read_prompts(path: Path) -> list[Prompt]:
    """All prompts of a .txt (one a line) or .jsonl file; blank lines are left out.

    Raises:
        ValueError: not such a file, a line that is no prompt (with its number), or no prompt at all.
        FileNotFoundError: no such file.
    """
    if path.suffix not in (".txt", ".jsonl"):
        raise ValueError(f"prompts: '{path}' is neither a .txt nor a .jsonl file")
    if not path.is_file():
        raise FileNotFoundError(f"prompts: there is no file '{path}'")
    try:
        # Not splitlines: that would also cut at rare characters that a prompt may hold.
        lines = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"prompts: '{path}' is not UTF-8 text (byte {error.start})") from error
    parse = _parse_json if path.suffix == ".jsonl" else lambda line, text: {"prompt": text}
    prompts = [Prompt(line, parse(line, text)) for line, text in enumerate(lines, start=1) if text.strip()]
    if not prompts:
        raise ValueError(f"prompts: '{path}' holds no prompt")
    return prompts


def _parse_json(line: int, text: str) -> dict:
    try:
        fields = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"prompts: line {line} is not JSON ({error.msg} at column {error.colno})") from error
    wrong = _what_is_wrong(fields)
    if wrong:
        raise ValueError(f"prompts: line {line}: {wrong}")
    return fields


def _what_is_wrong(fields) -> str | None:
    if not isinstance(fields, dict):
        return 'not an object like {"prompt": "…"} or {"messages": […]}'
    if ("prompt" in fields) == ("messages" in fields):
        return "needs either the key 'prompt' or the key 'messages'"
    for name in WRITTEN:
        if name in fields:
            return f"the key {name!r} is taken: it is what predict writes"
    if "prompt" in fields:
        good = isinstance(fields["prompt"], str) and fields["prompt"].strip()
        return None if good else f"prompt: {fields['prompt']!r} is not a text, or is empty"
    return None if _are_messages(fields["messages"]) else "messages: not a list of objects with texts role and content"


def _are_messages(messages) -> bool:
    return (
        isinstance(messages, list)
        and len(messages) > 0
        and all(isinstance(message, dict) for message in messages)
        and all(isinstance(message.get(key), str) for message in messages for key in ("role", "content"))
    )


def start_output(path: Path, prompts: list[Prompt], overwrite: bool, resume: bool) -> tuple[set[int], str]:
    """See that `path` can be written and what is to happen to what it holds.

    Returns:
        The indices of the prompts that it already answers, and the mode to open it with.

    Raises:
        ValueError: it holds something and neither flag says what to do (or both do), it answers other prompts,
            or it cannot be written.
    """
    if overwrite and resume:
        raise ValueError("overwrite: true and resume: true exclude each other")
    existed = path.exists()
    _check_writable(path)
    if not existed or not path.stat().st_size or overwrite:
        if not existed:
            path.unlink()
        return set(), "w"
    if not resume:
        raise ValueError(
            f"output: '{path}' exists; go on with it by --resume true, replace it by --overwrite true, or name another"
        )
    return _find_answered(path, prompts), "a"


def _check_writable(path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("a").close()
    except OSError as error:
        raise ValueError(f"output: cannot write '{path}' ({error.strerror})") from error


def _find_answered(path: Path, prompts: list[Prompt]) -> set[int]:
    """Indices of the prompts that `path` answers; a last line that a kill cut short is removed."""
    index_of = {prompt.line: index for index, prompt in enumerate(prompts)}
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    answered: set[int] = set()
    for number, answer in enumerate(whole.decode("utf-8", errors="replace").split("\n")[:-1], start=1):
        fields = _parse_answer(answer)
        index = index_of.get(fields.get("line"))
        if index is None or index in answered or not _answers(fields, prompts[index]):
            raise ValueError(f"output: line {number} of '{path}' is not of these prompts; resume needs the same")
        answered.add(index)
    with path.open("r+b") as file:
        file.truncate(len(whole))
    return answered


def _parse_answer(line: str) -> dict:
    """What a line of the output says; nothing if it is no such line."""
    try:
        fields = json.loads(line)
    except json.JSONDecodeError:
        return {}
    return fields if isinstance(fields, dict) and isinstance(fields.get("line"), int) else {}


def _answers(fields: dict, prompt: Prompt) -> bool:
    return all(fields.get(key) == value for key, value in prompt.fields.items())


def put_in_order(path: Path) -> None:
    """Puts the lines of a finished output into the order of their prompts, all at once.

    Raises:
        OSError: its folder cannot be written; the lines then stay in the order in which they were done.
    """
    if not path.is_file():
        return  # a pipe, or /dev/null: what went in there is gone
    path = path.resolve()  # a link stays one
    lines = path.read_bytes().split(b"\n")[:-1]
    lines.sort(key=lambda line: json.loads(line)["line"])
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_bytes(b"\n".join([*lines, b""]))
        shutil.copymode(path, partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
