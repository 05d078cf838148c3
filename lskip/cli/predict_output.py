"""The output of `lskip predict`: JSON lines, each written when its answer is done, and resumable after a kill."""

from __future__ import annotations

import json
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path

from lskip.inference.prompt_file import Prompt
from lskip.utils.output_files import hidden_beside, only_writer


@contextmanager
def lock_output(output: Path, prompts: Path) -> Iterator[Path]:
    """Make the folder of an output, lock it for this process, and yield its path with links resolved.

    Raises:
        ValueError: it is the file of the prompts, is not writable, or another process writes it.
    """
    path = Path(os.path.realpath(output))  # so that the link's target is replaced, not the link
    if not path.exists() and output.exists():
        path = output  # the target of /dev/stdout may have no name
    if path.exists() and prompts.exists() and path.samefile(prompts):
        raise ValueError(f"output: '{output}' is the file of the prompts; name another")
    missing = [folder for folder in path.parents if not folder.exists()]
    try:
        with _named(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        with only_writer(path, "output"):
            yield path
    finally:
        for folder in missing:  # removed again unless something was written
            with suppress(OSError):
                folder.rmdir()


def start_output(path: Path, prompts: list[Prompt], overwrite: bool, resume: bool) -> tuple[set[int], str]:
    """Check that `path` is writable, and return (indices of the prompts that it answers, mode to open it with).

    Raises:
        ValueError: it holds something and neither `overwrite` nor `resume` is set (or both are), it answers other
            prompts, or it is not writable.
    """
    if overwrite and resume:
        raise ValueError("overwrite: true and resume: true exclude each other")
    existed = path.exists()
    _check_writable(path)
    if not existed:
        path.unlink()
        return set(), "w"
    if not path.is_file() or not path.stat().st_size or overwrite:
        return set(), "w"
    if not resume:
        raise ValueError(
            f"output: '{path}' exists; go on with it by --resume true, replace it by --overwrite true, or name another"
        )
    return _find_answered(path, prompts), "a"


def _check_writable(path: Path) -> None:
    if path.is_fifo():
        return  # closing a named pipe would end the input of its reader
    with _named(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab", buffering=0) as file:
            if stat.S_ISCHR(path.stat().st_mode) and not file.isatty():
                file.write(b"\n")  # a full device fails only on a write


@contextmanager
def _named(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ValueError(f"output: cannot write '{path}' ({error.strerror})") from error


def _find_answered(path: Path, prompts: list[Prompt]) -> set[int]:
    """Return the indices of the prompts that `path` answers, and remove a last line that a kill cut short."""
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
    """Return the fields of a line of the output, or {} if it is not one."""
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    if not isinstance(fields, dict):
        return {}
    # All but "line" may be missing, as in outputs of earlier versions.
    kinds = {"line": int, "tokens": int, "seed": int, "text": str}
    whole = "line" in fields and all(type(fields.get(name, kind())) is kind for name, kind in kinds.items())
    return fields if whole else {}


def _answers(fields: dict, prompt: Prompt) -> bool:
    return all(fields.get(key) == value for key, value in prompt.fields.items())


def rows_of(path: Path) -> Iterator[dict]:
    """Yield the lines of an output as dicts."""
    with path.open(encoding="utf-8", errors="replace", newline="\n") as file:
        yield from map(json.loads, file)


class AnswerFile:
    """The output while it is written, unbuffered, so that every line is kept after a kill.

    The file is opened with the first line: a command that fails before leaves an existing output as it is.
    """

    def __init__(self, path: Path, mode: str, begun: Callable[[], None]):
        """`begun` is called once, when the file is opened."""
        self.path, self.mode, self.begun = path, mode, begun
        self._file: FileIO | None = None

    def __enter__(self) -> AnswerFile:
        return self

    def __exit__(self, *error) -> None:
        if self._file is not None:
            self._file.close()

    def write(self, row: dict) -> None:
        """Append a line.

        Raises:
            ValueError: the disk is full; earlier lines stay.
            BrokenPipeError: the reader has closed the pipe (`| head`).
        """
        line = memoryview(json.dumps(row, ensure_ascii=False).encode() + b"\n")
        try:
            if self._file is None:
                self._file = self.path.open(f"{self.mode}b", buffering=0)
                self.begun()
            while line:
                line = line[self._file.write(line) :]
        except BrokenPipeError:
            raise
        except OSError as error:
            advice = "what was written stays; go on with --resume true"
            raise ValueError(f"output: cannot write '{self.path}' ({error.strerror}); {advice}") from error


def put_in_order(path: Path) -> None:
    """Sort the lines of a finished output by their prompts, atomically.

    Raises:
        ValueError: its folder is not writable; the lines then stay in the order in which they were finished.
    """
    if not path.is_file():
        return  # a pipe or a device
    path = path.resolve()
    lines = path.read_bytes().split(b"\n")[:-1]
    lines.sort(key=lambda line: json.loads(line)["line"])
    partial = hidden_beside(path, "partial")
    try:
        partial.write_bytes(b"\n".join([*lines, b""]))
        shutil.copymode(path, partial)
        os.replace(partial, path)
    except OSError as error:
        reason = f"all answers are in '{path}', but not in order: its folder cannot be written ({error.strerror})"
        raise ValueError(f"output: {reason}") from error
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
