"""Parsing of command-line options with jsonargparse: spellings of lists, defaults, errors in one sentence."""

import argparse
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Union, get_args

from jsonargparse import ArgumentParser, Namespace, _typehints
from jsonargparse._required import iter_required_keys
from jsonargparse._typehints import ActionTypeHint

from lskip.cli.errors import explain, field_of, import_trouble
from lskip.cli.named_classes import check_classes

_WANTS_LIST = re.compile(r"Expected (?:a )?<class '(?:list|tuple)'>")  # some reports lack the "a"
_NAMES_AND_COMMAS = ("--exits", "--tasks")  # texts that their commands split
_OF_TEXTS = re.compile(r"list\[(?:str|typing\.Any)\]")


def parse_options(
    parser: ArgumentParser, arguments: list[str], command: ArgumentParser, choices: dict[str, type]
) -> Namespace:
    """Return the parsed values, with every class checked to be of its field's type.

    Lists may be written [2,4], 2,4 or as several words; in a list of texts a comma does not separate.

    Args:
        command: the parser of the options: `parser` itself, or that of its subcommand.
        choices: as in errors.explain.

    Raises:
        ValueError: one sentence on what is wrong.
    """
    arguments = list(_join_words(arguments, command))
    for action in command._actions:
        _put_int_first(action)
    for _ in range(len(arguments) + 1):
        try:
            with _own_defaults(arguments, command):
                values = parser.parse_args(arguments)
            break
        except argparse.ArgumentError as error:
            if (spelled := _with_list(arguments, str(error))) is None:
                root = _root(error)
                # jsonargparse reports a KeyError raised in an imported module as a parse error of its own.
                trouble = import_trouble(root) if isinstance(root, KeyError | TypeError) else None
                trouble = trouble or _endless_number(arguments, str(error))
                raise ValueError(trouble or explain(str(error), command, choices)) from error
            arguments = spelled
        except Exception as error:
            if isinstance(error, ValueError | OSError) or (sentence := import_trouble(error)) is None:
                raise
            raise ValueError(sentence) from error
    check_classes(command, values if command is parser else values[values.subcommand])
    return values


@contextmanager
def _own_defaults(arguments: list[str], command: ArgumentParser) -> Iterator[None]:
    """Let a class that replaces another one start from its own defaults.

    jsonargparse passes on all arguments that both classes take: AdamW's weight decay to SGD, the batch size of TextData
    to the user's data module. Inside this context arguments at the replaced class's defaults are dropped, unless one of
    `arguments` sets them; so is lskip's default learning rate where the new class's default is None (Adafactor).
    jsonargparse 4.53 has no setting for this, hence the patch of one of its functions.
    """
    discard = _typehints.discard_init_args_on_class_path_change
    preset = command.get_defaults().get("optimizer")
    rate = preset["init_args"]["lr"] if preset else None
    named = {argument.partition("=")[0].rpartition(".")[2] for argument in arguments if argument.startswith("--")}

    def discard_defaults(parser_or_action, before, value):
        if isinstance(before, Namespace) and before.get("init_args") and before["class_path"] != value["class_path"]:
            old, new = (_class_parser(each["class_path"]) for each in (before, value))
            defaults, own = vars(old.get_defaults()), vars(new.get_defaults())
            for name in set(vars(before["init_args"])) - named - set(iter_required_keys(new)):
                value_before = before["init_args"][name]
                not_asked = name == "lr" and value_before == rate and own.get(name, 0) is None
                if not_asked or (name in defaults and value_before == defaults[name]):
                    before["init_args"].pop(name)
        discard(parser_or_action, before, value)

    _typehints.discard_init_args_on_class_path_change = discard_defaults
    try:
        yield
    finally:
        _typehints.discard_init_args_on_class_path_change = discard


def _class_parser(path: str) -> ArgumentParser:
    return ActionTypeHint.get_class_parser(path, {"fail_untyped": False})


def _put_int_first(action: argparse.Action) -> None:
    """Let an option of type int or float read 2 as an int: the Trainer takes 2.0 for a share.

    typing caches Unions: their order is that of whichever module was imported first.
    """
    kinds = get_args(getattr(action, "_typehint", None))
    if int in kinds and float in kinds:
        action._typehint = Union[tuple(sorted(kinds, key=lambda kind: kind is not int))]  # noqa: UP007


def _endless_number(arguments: list[str], report: str) -> str | None:
    """Return a sentence on a number with more digits than Python parses; the report may not name its option."""
    if "integer string conversion" not in report:
        return None
    for at, argument in enumerate(arguments):
        option, equals, value = argument.partition("=")
        value = value if equals else "".join(arguments[at + 1 : at + 2])
        if re.fullmatch(r"[+-]?\d{1000,}", value):
            return f"{option.lstrip('-')}: a number of {len(value)} digits is more than is read"
    return None


def _root(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _join_words(arguments: list[str], parser: ArgumentParser) -> Iterator[str]:
    """Yield the arguments, with several words after a list option joined to one list: --drafts layers ngram."""
    known = {option: action for action in parser._actions for option in action.option_strings}
    at = 0
    while at < len(arguments):
        end = at + 1
        while end < len(arguments) and not arguments[end].startswith("-"):
            end += 1
        option, equals, value = arguments[at].partition("=")
        words = [value] * bool(equals) + arguments[at + 1 : end]
        if option in _NAMES_AND_COMMAS and words:
            names = ",".join(words).replace(" ", "")
            yield f"{option}={names[1:-1] if names[:1] == '[' and names[-1:] == ']' else names}"
        elif len(words) > 1 and option.startswith("--") and _takes_list(option, known):
            yield f"{option}={json.dumps(words)}"
        else:
            yield from arguments[at:end]
        at = end


def _takes_list(option: str, known: dict[str, argparse.Action]) -> bool:
    if option in known:
        return "list[" in str(getattr(known[option], "_typehint", ""))
    # An argument of a class, whose type is known only once the class is.
    return any(option.startswith(f"{name}.") for name in known)


def _with_list(arguments: list[str], report: str) -> list[str] | None:
    """Return the arguments with the value that should be a list, by the report, as a list; None if there is none."""
    option = f"--{field_of(report)}"
    for at, argument in enumerate(arguments if _WANTS_LIST.search(report) else []):
        name, equals, given = argument.partition("=")
        end = at + (1 if equals else 2)
        given = given if equals else "".join(arguments[at + 1 : end])
        if name == option and given[:1] not in ("[", "{", ""):
            parts = [given] if _OF_TEXTS.search(report) else given.split(",")
            return [*arguments[:at], f"{option}={json.dumps(parts)}", *arguments[end:]]
    return None
