"""Standard output on an ASCII terminal, closed or full; and modules of the working directory that shadow libraries."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from random import Random

import lskip
from benchmarks.bad_input.models import edit
from benchmarks.bad_input.options import BASES, own_task
from benchmarks.bad_input.verdict import Case, Seen, done, either, refused


def cases(random: Random) -> Iterator[Case]:
    yield from terminals()
    yield from escapes()
    yield real_process()


@contextmanager
def standard(stream: str, make: Callable[[], io.TextIOBase | None]) -> Iterator[None]:
    """Replace sys.stdout or sys.stderr while the command runs."""
    before = getattr(sys, stream)
    setattr(sys, stream, make())
    try:
        yield
    finally:
        with_end = getattr(sys, stream)
        setattr(sys, stream, before)
        if with_end is not None:
            with suppress(OSError, ValueError):
                with_end.flush()


def ascii_terminal() -> io.TextIOWrapper:
    return io.TextIOWrapper(io.FileIO(1, "w", closefd=False), encoding="ascii", line_buffering=True)


def full_terminal() -> io.TextIOWrapper:
    return io.TextIOWrapper(io.FileIO("/dev/full", "w"))


class _Terminal(io.TextIOWrapper):
    def isatty(self) -> bool:
        return True


def terminal() -> io.TextIOWrapper:
    return _Terminal(io.FileIO(1, "w", closefd=False), encoding="utf-8", line_buffering=True)


def escapes() -> Iterator[Case]:
    """Yield a model whose text holds escape sequences, on a terminal."""

    def prepare(here: Path) -> None:
        shutil.copytree(here.parent / "llama", here / "m")
        escape = {"type": "Replace", "pattern": {"Regex": "."}, "content": "\x1b[2J\x07"}
        edit(here / "m" / "tokenizer.json", lambda fields: {**fields, "decoder": escape})

    def check(seen: Seen) -> str | None:
        return "it is printed as it is" if {"\x1b", "\x07"} & set(seen.out) else None

    arguments = ("--prompt=def f(x):", "--model={here}/m", "--max_new_tokens=4", "--device=cpu")
    yield Case(
        "generate", "terminal", "escapes", arguments, done(check), prepare, lambda here: standard("stdout", terminal)
    )


def terminals() -> Iterator[Case]:
    """Yield ASCII terminals, and outputs that are closed or full."""
    ready = {"generate", "predict", "sweep", "compare", "inspect", "adapt"}
    for command in sorted(ready):
        base, whole = BASES[command]
        makes = ("out", "out.jsonl", "out.json", "out.png", "model")
        prepare = lambda here: own_task(here / "tasks")  # noqa: E731
        there = done() if command == "generate" else whole
        yield Case(
            command, "terminal", "ASCII", base, there, prepare, lambda here: standard("stdout", ascii_terminal), makes
        )
        yield Case(
            command, "terminal", "no stdout", base, there, prepare, lambda here: standard("stdout", lambda: None), makes
        )
        full = either(there, refused("No space|space left|output|stdout"))
        yield Case(
            command,
            "terminal",
            "full stdout",
            base,
            full,
            prepare,
            lambda here: standard("stdout", full_terminal),
            makes,
            makes,
        )
    emoji = ("--prompt=🙂", *BASES["generate"][0][1:])
    yield Case(
        "generate",
        "terminal",
        "an emoji on ASCII",
        emoji,
        done(),
        around=lambda here: standard("stdout", ascii_terminal),
    )


def real_process() -> Case:
    """Return a case of modules in the working directory with the names of libraries, which must not be imported."""

    def check(seen: Seen) -> str | None:
        folder = seen.here / "stranger"
        folder.mkdir()
        for name in ("yaml", "json", "random", "tqdm", "torch", "numpy", "argparse", "jsonargparse", "re"):
            (folder / f"{name}.py").write_text("open('MARK', 'w')\n")
        command = [sys.executable, "-m", "lskip", "generate", "--prompt=", "--model=smollm2"]
        ran = subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True, timeout=25)
        if (folder / "MARK").exists():
            return "python -m lskip runs a module of the working directory"
        return None if ran.returncode == 2 and "prompt" in ran.stderr else f"{ran.returncode}: {ran.stderr[-300:]!r}"

    return Case(
        "generate",
        "names",
        "modules of a stranger",
        ("--prompt=", "--model=smollm2"),
        refused("prompt", check=check),
        leaves=("stranger",),
    )


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(Path(lskip.__file__).parent.parent)}
