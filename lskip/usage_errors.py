"""What was wrong on the command line, in one line: jsonargparse's nested reports, read and shortened."""

from __future__ import annotations

import difflib
import inspect
import pydoc
import re
from collections.abc import Iterable

from jsonargparse import ArgumentParser

_KINDS = {"int": "a whole number", "float": "a number", "bool": "true or false", "list": "a list"}


def explain(report: str, parser: ArgumentParser, choices: dict[str, type]) -> str:
    """One sentence that names the field, the value and what is allowed.

    Args:
        report: the message of the ArgumentError.
        parser: that raised it, for the names of its options.
        choices: last part of a field's name -> base class of what may be chosen there.
    """
    report = re.sub(r"Subcommand '\w+' does not accept option '([\w.]+)'", r"unrecognized arguments: --\1", report)
    if missing := re.search(r"arguments are required: (?:\w+\.)?([\w.]+)|Option '([\w.]+)' is required", report):
        return f"{missing[1] or missing[2]}: must be given"
    field = ".".join(re.findall(r'Parser key "([\w.]+)"', report))
    if unknown := re.search(r"unrecognized arguments: (\S+)", report):
        return _unknown_option(field, unknown[1], parser)
    if refused := re.search(r"Option '([\w.]+)' is not accepted", report):
        return _unknown_argument(field, refused[1], report)
    value = _last_value(report)
    if "dot import path" in report and value is not None and field.rsplit(".", 1)[-1] in choices:
        return _unknown_class(field, value, choices[field.rsplit(".", 1)[-1]])
    if (literal := re.search(r"Literal\[(.*?)\]", report)) and value is not None:
        return f"{field}: {value!r} is not one of {literal[1].replace(chr(39), '')}"
    expected = re.findall(r"Expected (?:an? )?(?:<class ')?(\w+)", report)
    kinds = [_KINDS[kind] for kind in dict.fromkeys(expected) if kind in _KINDS]
    if kinds and value is not None:
        return f"{field}: {value!r} is not {' or '.join(kinds)}"
    text = re.sub(r'Parser key "[\w.]+":?', "", report)
    text = " ".join(text.replace("- ", " ").split())[:200]
    return f"{field}: {text}" if field else text


def innermost(report: str) -> str:
    """What a constructor said, out of a report that tells of every type that might have been meant."""
    if "Union subtypes" not in report:
        return report
    said = report.partition("Errors:")[2].partition("Given value type:")[0]
    lines = [line.strip().removeprefix("- ") for line in said.splitlines()]
    return " ".join(line for line in lines if line and "NoneType" not in line) or report


def _last_value(report: str) -> str | None:
    """The value complained about: the innermost report comes last but one, the outermost repeats it whole."""
    values = re.findall(r"(?:import path string|Got value|Given value): ([^\n]*?)(?:\. Got value.*)?$", report, re.M)
    plain = [value for value in values if not value.startswith(("NestedArg(", "Namespace(", "{"))]
    return plain[-1] if plain else None


def _unknown_option(field: str, text: str, parser: ArgumentParser) -> str:
    if not text.startswith("-"):
        return f"{text!r} is not understood; options begin with --"
    name = text.lstrip("-").split("=")[0]
    full = f"{field}.{name}" if field else name
    known = [action.dest for action in parser._actions]
    return f"{full}: there is no such option" + _hint(full, known)


def _unknown_argument(field: str, name: str, report: str) -> str:
    path = re.findall(r"given class_path '([\w.]+)'", report)
    owner = pydoc.locate(path[-1]) if path else None
    if owner is None:
        return f"{field}.{name}: there is no such option"
    known = list(inspect.signature(owner).parameters)
    takes = f"{owner.__name__} takes {', '.join(known)}" if known else f"{owner.__name__} takes none"
    if len(takes) > 150:
        takes = f"{owner.__name__} does not take it{_hint(name, known)}"
    return f"{field}.{name}: there is no such option; {takes}"


def _unknown_class(field: str, name: str, base: type) -> str:
    known = sorted(set(_class_names(base)))
    allowed = ", ".join(known)
    if len(allowed) > 200:
        return f"{field}: {name!r} is not the name of a class of {base.__name__}{_hint(name, known)}"
    return f"{field}: {name!r} is not one of {allowed}"


def _class_names(base: type) -> Iterable[str]:
    kinds = base.__subclasses__()
    if not kinds and not base.__name__.startswith("_"):
        yield base.__name__
    for kind in kinds:
        if not kind.__name__.startswith("_") and not inspect.isabstract(kind):
            yield kind.__name__
        yield from _class_names(kind)


def _hint(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, 1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else ""
