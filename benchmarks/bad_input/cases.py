"""All cases of bad_input.py, by a seed; and the options that none of them says anything about."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from importlib import import_module
from random import Random

from jsonargparse import ArgumentParser

from benchmarks.bad_input.options import NOT_TRIED, OPTIONS
from benchmarks.bad_input.training import OPTIONS as TRAINING
from benchmarks.bad_input.verdict import Case
from lskip.cli import main

MODULES = (
    *("options", "training", "prompts", "data", "rows", "configs", "strangers"),
    *("models", "tokenizers", "weights", "gguf", "records", "places", "tasks", "names", "terminals"),
)


FEWEST = 30  # cases of each command


def all_cases(seed: int) -> list[Case]:
    """Each module draws from a stream of its own, so that one more case does not change the others' values."""
    modules = (import_module(f"benchmarks.bad_input.{name}") for name in MODULES)
    return [case for module in modules for case in module.cases(Random(f"{seed} {module.__name__}"))]


def chosen(cases: list[Case], only: str, limit: int, seed: int) -> list[Case]:
    """Those whose names hold `only`, of them `limit`, drawn by the seed, FEWEST of each command first."""
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
    """Options of the command line that no table says anything about: new ones."""
    said = {**OPTIONS, "fit": TRAINING}
    return [
        f"{command} --{name}"
        for command, table in said.items()
        for name in options_of(command)
        if not any(name == known or known.startswith(f"{name}.") for known in table)
    ]


class _Asked(BaseException):
    """The parser that a command has made, in place of what it would have parsed."""


def options_of(command: str) -> Iterator[str]:
    """The names of a command's options, by its own parser."""
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
