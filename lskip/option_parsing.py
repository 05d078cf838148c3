"""Options of the command line to values: lists however they are spelled, and one sentence on what is wrong."""

from __future__ import annotations

import argparse
import inspect
import json
import re
from collections.abc import Iterator

from jsonargparse import ArgumentParser, Namespace
from jsonargparse._util import import_object

from lskip.named_classes import check_classes
from lskip.usage_errors import explain, import_trouble

_WANTS_LIST = re.compile(r"Expected a <class '(?:list|tuple)'>")
_NAMES_AND_COMMAS = ("--exits", "--tasks")  # texts that the commands take apart
_OF_TEXTS = re.compile(r"list\[(?:str|typing\.Any)\]")


def parse_options(
    parser: ArgumentParser, arguments: list[str], command: ArgumentParser, choices: dict[str, type]
) -> Namespace:
    """Return the values that `parser` reads, every class among them checked to be one that its field is made for.

    Lists may be written [2,4], 2,4 or as several words; a text with a comma in it is one text.

    Args:
        command: the parser that knows the options: `parser` itself, or that of its subcommand.
        choices: as in explain.

    Raises:
        ValueError: one sentence on what is wrong.
    """
    arguments = list(_join_words(arguments, command))
    for _ in range(len(arguments) + 1):
        try:
            values = parser.parse_args(arguments)
            break
        except argparse.ArgumentError as error:
            if (spelled := _with_list(arguments, str(error))) is None:
                root = _root(error)
                # The parser takes a KeyError for one of its own.
                trouble = import_trouble(root) if isinstance(root, KeyError | TypeError) else None
                raise ValueError(trouble or explain(str(error), command, choices)) from error
            arguments = spelled
        except Exception as error:
            if isinstance(error, ValueError | OSError) or (sentence := import_trouble(error)) is None:
                raise
            raise ValueError(sentence) from error
    check_classes(command, values if command is parser else values[values.subcommand])
    return values


def parse_own_defaults(
    parser: ArgumentParser,
    arguments: list[str],
    command: ArgumentParser,
    choices: dict[str, type],
    default: dict[str, dict],
) -> Namespace:
    """Return what parse_options does, where a class in place of the `default` of a field has defaults of its own.

    Parsed once, it would be left all arguments of the default that it takes too: AdamW's weight decay in SGD.

    Args:
        default: field -> {class_path, init_args}. Of its arguments another class keeps those that are numbers there
            (a learning rate), unless it is named.
    """
    asked = [argument for argument in arguments if not argument.startswith("--print_config")]
    values = parse_options(parser, asked, command, choices)
    (field, spec), own = next(iter(default.items())), values[values.subcommand]
    path = own[field].class_path
    takes = inspect.signature(import_object(path)).parameters
    kept = {name: value for name, value in spec["init_args"].items() if _is_number(takes.get(name))}
    command.set_defaults({field: {"class_path": path, "init_args": kept}})
    if asked == arguments and path == spec["class_path"]:
        return values
    return parse_options(parser, arguments, command, choices)


def _is_number(argument: inspect.Parameter | None) -> bool:
    return argument is not None and isinstance(argument.default, int | float)


def _root(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _join_words(arguments: list[str], parser: ArgumentParser) -> Iterator[str]:
    """Yield the arguments, the words behind an option of a list as one list: --drafts layers ngram."""
    known = {option: action for action in parser._actions for option in action.option_strings}
    at = 0
    while at < len(arguments):
        end = at + 1
        while end < len(arguments) and not arguments[end].startswith("-"):
            end += 1
        option, equals, value = arguments[at].partition("=")
        words = [value] * bool(equals) + arguments[at + 1 : end]
        if option in _NAMES_AND_COMMAS and words:
            yield f"{option}={','.join(words).strip('[]').replace(' ', '')}"
        elif len(words) > 1 and option.startswith("--") and _takes_list(option, known):
            yield f"{option}={json.dumps(words)}"
        else:
            yield from arguments[at:end]
        at = end


def _takes_list(option: str, known: dict[str, argparse.Action]) -> bool:
    if option in known:
        return "list[" in str(getattr(known[option], "_typehint", ""))
    # An argument of a class: what type it has is known once the class is.
    return any(option.startswith(f"{name}.") for name in known)


def _with_list(arguments: list[str], report: str) -> list[str] | None:
    """Return the arguments with the value that a report wants to be a list as one; None where no argument is it."""
    value = re.findall(r"(?:Got value|Given value|val=)[: ]*['\"]?([^\n]*?)['\"]?\)?(?:\. Got value.*)?$", report, re.M)
    if not _WANTS_LIST.search(report) or not value or value[-1][:1] in ("[", "{", ""):
        return None
    for at, argument in enumerate(arguments):
        option, equals, given = argument.partition("=") if argument.startswith("--") else ("", "", argument)
        if given in value and given:
            parts = [given] if _OF_TEXTS.search(report) else given.split(",")
            return [*arguments[:at], f"{option}{equals}{json.dumps(parts)}", *arguments[at + 1 :]]
    return None
