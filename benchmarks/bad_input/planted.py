"""Faults planted in lskip, each of which the checks must detect."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

from benchmarks.bad_input.checks import answers, numbered
from benchmarks.bad_input.child import run_case
from benchmarks.bad_input.fixtures import PROMPTS
from benchmarks.bad_input.verdict import Case, done, refused
from lskip.inference.options import LoadingOptions

load = LoadingOptions.load
HANG, LONGEST = 1.0, 30.0  # seconds after which the planted hang is one, and any other


def fails(error: BaseException) -> Callable:
    def planted(here: Path, options: LoadingOptions, *arguments):
        raise error

    return planted


def says(text: str) -> Callable:
    def planted(here: Path, options: LoadingOptions, *arguments):
        print(text, file=sys.stderr)
        raise SystemExit(2)

    return planted


def writes(name: str) -> Callable:
    def planted(here: Path, options: LoadingOptions, *arguments):
        (here / name).write_text("planted")
        raise ValueError("prompts: planted")

    return planted


def does(act: Callable[[], object]) -> Callable:
    def planted(here: Path, options: LoadingOptions, *arguments):
        kept = act()  # noqa: F841 (what takes memory keeps it)
        return load(options, *arguments)

    return planted


def other_texts(here: Path, options: LoadingOptions, *arguments):
    generator = load(options, *arguments)
    generator.tokenizer.backend_tokenizer.decoder = None
    return generator


def touches_mark(here: Path, options: LoadingOptions, *arguments):
    (here / "MARK").touch()
    return load(options, *arguments)


REFUSED, ANSWERED = refused("prompts"), done(answers(numbered(PROMPTS)))
# fault -> (replacement of LoadingOptions.load, right outcome, expected kind of the verdict)
PLANTS = {
    "a KeyError": (fails(KeyError("planted")), REFUSED, "traceback"),
    "an AttributeError": (fails(AttributeError("planted")), REFUSED, "traceback"),
    "a TypeError": (fails(TypeError("planted")), REFUSED, "traceback"),
    "an IndexError": (fails(IndexError("planted")), REFUSED, "traceback"),
    "an assertion": (fails(AssertionError("planted")), REFUSED, "traceback"),
    "a ZeroDivisionError": (fails(ZeroDivisionError("planted")), REFUSED, "traceback"),
    "a sentence without the field": (fails(ValueError("something is wrong")), REFUSED, "sentence"),
    "no sentence": (says("planted"), REFUSED, "sentence"),
    "an escape in the sentence": (says("lskip predict: error: prompts: \x1b[2J"), REFUSED, "sentence"),
    "two sentences": (says("x: error: a\nlskip predict: error: prompts: b"), REFUSED, "sentence"),
    "nothing": (lambda here, options, *more: load(options, *more), REFUSED, "not refused"),
    "a refusal of what is right": (fails(ValueError("prompts: planted")), ANSWERED, "refused what is right"),
    "other texts": (other_texts, ANSWERED, "wrong effect"),
    "a hang": (does(lambda: time.sleep(60)), ANSWERED, "hang"),
    "a crash": (does(lambda: os.kill(os.getpid(), signal.SIGSEGV)), ANSWERED, "crash"),
    "1.2 GB": (does(lambda: b"x" * (1200 * 2**20)), ANSWERED, "memory"),
    "a stranger's code": (touches_mark, ANSWERED, "ran a stranger's code"),
    "a file that is left": (writes("left"), REFUSED, "left something behind"),
    "an input that is changed": (writes("prompts.txt"), REFUSED, "changed an input"),
}


def planted(name: str) -> Case:
    act, right, _ = PLANTS[name]

    @contextmanager
    def around(here: Path) -> Iterator[None]:
        with patch.object(LoadingOptions, "load", lambda self, *arguments: act(here, self, *arguments)):
            yield

    def prepare(here: Path) -> None:
        (here / "prompts.txt").write_text("\n".join(PROMPTS))

    arguments = ("--prompts={here}/prompts.txt", "--model={place}/llama", "--output={here}/out.jsonl")
    more = ("--max_new_tokens=4", "--device=cpu")
    return Case("predict", "planted", name, (*arguments, *more), right, prepare, around, makes=("out.jsonl",))


def missed_plants(place: Path) -> dict[str, str]:
    """Return {fault: verdict} of the planted faults that got another verdict than expected."""
    missed = {}
    for number, (name, (_, _, kind)) in enumerate(PLANTS.items()):
        verdict = run_case(planted(name), place / f"planted{number}", HANG if kind == "hang" else LONGEST)
        if verdict.kind != kind:
            missed[name] = f"{verdict.kind}: {verdict.wrong}"
    return missed
