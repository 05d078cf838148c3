"""All cases of a seed, and the command-line options that no case covers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from importlib import import_module
from random import Random

from jsonargparse import ArgumentParser

from benchmarks.bad_input.options import NOT_TRIED, OPTIONS
from benchmarks.bad_input.servers import OPTIONS as SERVERS
from benchmarks.bad_input.training_options import OPTIONS as TRAINING
from benchmarks.bad_input.training_options import PLAN
from benchmarks.bad_input.verdict import Case
from lskip.cli import main

MODULES = (
    *("options", "training_options", "prompts", "data", "rows", "configs", "strangers"),
    *("models", "tokenizers", "weights", "gguf", "records", "outputs", "tasks", "names", "terminals", "servers"),
)


FEWEST = 30  # cases of each command


def all_cases(seed: int) -> list[Case]:
    """Return the cases of all modules; each module has its own random stream, so that new cases change no others."""
    modules = (import_module(f"benchmarks.bad_input.{name}") for name in MODULES)
    return [case for module in modules for case in module.cases(Random(f"{seed} {module.__name__}"))]


def chosen(cases: list[Case], only: str, limit: int, seed: int) -> list[Case]:
    """Return up to `limit` cases whose names contain `only`, drawn by the seed, FEWEST of each command first."""
    cases, drawn = [case for case in cases if only in case.name], Random(seed)
    order = drawn.sample(range(len(cases)), len(cases))
    before: Counter[str] = Counter()
    place = {}
    for number, index in enumerate(order):
        command = cases[index].command
        place[index] = (before[command] >= FEWEST, number)
        before[command] += 1
    return [cases[index] for index in sorted(sorted(order, key=place.get)[:limit])]


def options_without_cases() -> list[str]:
    """Return the options of the command line that no table covers."""
    said = {**OPTIONS, **SERVERS, "fit": TRAINING, "plan": {**TRAINING, **PLAN}}
    return [
        f"{command} --{name}"
        for command, table in said.items()
        for name in options_of(command)
        if not any(name == known or known.startswith(f"{name}.") for known in table)
    ]


class _Asked(BaseException):
    """Raised with the parser that a command has built, in place of parsing."""


def options_of(command: str) -> Iterator[str]:
    """Yield the names of a command's options, from its own parser."""
    parse = ArgumentParser.parse_args

    def ask(self, *arguments, **more):
        raise _Asked(self)

    ArgumentParser.parse_args = ask
    try:
        main([command])
    except _Asked as asked:
        (parser,) = asked.args
    finally:
        ArgumentParser.parse_args = parse
    if parser._subcommands_action is not None:
        parser = parser._subcommands_action._name_parser_map[command]
    for action in parser._actions:
        if action.dest.split(".")[0] not in NOT_TRIED and not action.dest.endswith(".help"):
            yield action.dest
