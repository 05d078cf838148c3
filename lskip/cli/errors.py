"""Error messages of jsonargparse (nested reports), turned into one sentence for the user."""

import inspect
import pydoc
import re
from collections.abc import Iterable, Iterator
from typing import get_args

from jsonargparse import ArgumentParser
from jsonargparse._common import ImportDenied
from jsonargparse._util import import_object

from lskip.utils.user_paths import did_you_mean

_CUTOFF = 0.5  # similarity of a name that is hinted at

_KINDS = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "list": "a list",
    "tuple": "a list",
    "dict": "names and values",
    "str": "text",
    "Path": "a path",
}
# Parts of a report, one for each type of a Union, that do not help the user.
_NOISE = re.compile(
    r"Does not validate against any of the Union subtypes|Subtypes: .*|Errors:|Expected a path but .*"
    r"|Expected (an? )?<class '(NoneType|collections\.abc\.\w+)'>|Given value(?: type)?: .*|\. Got value: .*"
    r"|Type \S.* expects a function or a callable class: |Subclass types expect one of:|- an? (class path|dict) .*"
    r"|Parser key \"[\w.]+\":?|Problem with given class_path '[\w.]+':"
)


def explain(report: str, parser: ArgumentParser, choices: dict[str, type]) -> str:
    """Return one sentence that names the field, the value and what is allowed.

    Args:
        report: the message of the ArgumentError.
        parser: the parser that raised it, for the names of its options.
        choices: last part of a field's name -> base class of the classes allowed there.
    """
    report = re.sub(r"Subcommand '\w+' does not accept option '([^']+)'", r"unrecognized arguments: --\1", report)
    field = field_of(report)
    inside = f"{field}." if field else ""
    if group := re.search(r"Unable to load config ([\"'].*[\"'])$", report, re.M):
        return f"{field}: {group[1]} is not options and their values"
    if missing := re.search(r"arguments are required: (?:\w+\.)?([\w.]+)|Option '([\w.]+)' is required", report):
        return f"{inside}{missing[1] or missing[2]}: must be given"
    if nothing := re.search(r"argument (?:-\w/)?--([\w.]+)[^:]*: expected (?:at least )?one argument", report):
        return f"{nothing[1]}: a value is missing"
    if unknown := re.search(r"unrecognized arguments: (\S+)", report):
        return _unknown_option(field, unknown[1], parser)
    if refused := re.search(r"Option '([^']+)' is not accepted", report):
        return _unknown_argument(field, refused[1], report)
    base = choices.get(field.rsplit(".", 1)[-1])
    if sentence := _wrong_class(field, report, base):
        return sentence
    value = _last_value(report)
    if value is not None and (allowed := _allowed(report, base)):
        return f"{field}: {value!r} is not {allowed}"
    if re.search(r"object has no attribute|unhashable type|object is not", report):
        return f"{field}: what is given is not a class_path, the name of a class, and its init_args, names and values"
    if key := re.search(r"invalid literal for int\(\) with base 10: (\S+)", report):
        return f"{field}: the key {key[1]} is not a whole number"
    if re.search(r"unsupported operand type\(s\) for \+: '(int|float)' and 'str'", report):
        # jsonargparse fails on {4:0.3}, whose key YAML reads as a number to the base 60.
        return f"{field}: is not readable; in a mapping a space follows each colon, as in {{4: 0.3}}"
    text = re.sub(r"^[\s.-]+", "", " ".join(_NOISE.sub(" ", report).replace("- ", " ").split()))[:200]
    return f"{field}: {text}" if field else text


def field_of(report: str) -> str:
    """Return the dotted name of the field that a report is about."""
    keys = re.findall(r'Parser key "([\w.]+)"', report)
    return ".".join(key for key, before in zip(keys, [None, *keys], strict=False) if key != before)


def innermost(report: str) -> str:
    """Return the message of a constructor from a report with a part for each type of a Union."""
    if "Union subtypes" not in report:
        return report
    said = report.partition("Errors:")[2].partition("Given value type:")[0]
    kinds = re.sub(r"- Expected an? (<class|typing).*", "", said)
    return " ".join(_NOISE.sub("", kinds).replace("- ", " ").split()) or report


def import_trouble(error: BaseException) -> str | None:
    """Return a sentence that names the class path whose import raised `error`; None: no import did."""
    trace, path = error.__traceback__, None
    while trace is not None:
        if trace.tb_frame.f_code is import_object.__code__:
            path = trace.tb_frame.f_locals.get("name")
        trace = trace.tb_next
    return None if path is None else f"class_path: {path!r}: {_words(error)}"


# Classes: not importable, of the wrong kind, or unknown.


_PATHS = re.compile(
    r"class_path '([\w.]+)'|Given value: ([\w.]+)$|Got value: ([\w.]+)$|'class_path': '([\w.]+)'|class_path='([\w.]+)'"
    r"|val='([\w.]+)'|Importing '([\w.]+)'|\['([\w.]+)'\]",
    re.M,
)


def _wrong_class(field: str, report: str, base: type | None) -> str | None:
    """Return a sentence on the class that a report names; None if it names no class."""
    if other := re.search(r"Import path ([\w.]+) does not correspond to a subclass of (\w+)", report):
        return f"{field}: {other[1]!r} is not a class of the kind {other[2]}"
    paths = dict.fromkeys(name for names in _PATHS.findall(report) for name in names if "." in name)
    for path in paths:
        try:
            import_object(path)
        except ImportDenied as error:
            return f"{field}: {path!r} {_words(error)}"
        except ValueError:
            continue  # a number such as 1.5
        except Exception as error:
            return f"{field}: {path!r}: {_words(error)}"
    kind = r"to be a (?:subclass of|function that returns) (?:<class ')?(\w+)"
    if paths and (wrong := re.search(kind, report)):
        return f"{field}: {list(paths)[-1]!r} is not a class of the kind {wrong[1]}"
    if same := re.search(r"Multiple subclasses with name (\w+)\. Give .* ambiguity: (.*?)\.?$", report, re.M):
        return f"{field}: {same[1]!r} is the name of several classes; write one of {same[2]}"
    if base and (name := re.search(r"Expected a dot import path string: (\w+)$", report, re.M)):
        return _unknown_class(field, name[1], base)
    return None


_EXTRAS = ("bitsandbytes",)  # optional packages that shipped configs name


def _words(error: BaseException) -> str:
    """Return the message of an error raised by an import, with file and line unless the message has them."""
    if isinstance(error, ImportDenied):
        return "is not a class of lskip, of its libraries or of your own"
    if isinstance(error, ModuleNotFoundError) and error.name in _EXTRAS:
        return f"{error}; to have it: pip install {error.name}"
    if isinstance(error, ImportError | AttributeError | SyntaxError):
        return str(error)
    trace = error.__traceback__
    while trace.tb_next is not None:
        trace = trace.tb_next
    file = trace.tb_frame.f_code.co_filename.rpartition("/")[2]
    return f"{type(error).__name__}: {error} ({file}, line {trace.tb_lineno})"


def _unknown_class(field: str, name: str, base: type) -> str:
    known = sorted(set(class_names(base)))
    allowed = ", ".join(known)
    if len(allowed) > 200:
        return f"{field}: {name!r} is not the name of a class of {base.__name__}{did_you_mean(name, known, _CUTOFF)}"
    return f"{field}: {name!r} is not one of {allowed}"


def class_names(base: type) -> Iterable[str]:
    """Yield the names of all concrete public subclasses, or of the class itself if it has none."""
    kinds = base.__subclasses__()
    if not kinds and not base.__name__.startswith("_"):
        yield base.__name__
    for kind in kinds:
        if not kind.__name__.startswith("_") and not inspect.isabstract(kind):
            yield kind.__name__
        yield from class_names(kind)


# Values.


def _allowed(report: str, base: type | None) -> str:
    """Return the expected value in words: "one of …", "a number" …; empty if the report does not say."""
    words = [
        word for group in re.findall(r"Expected (?:a )?typing\.Literal\[(.*?)\]", report) for word in group.split(", ")
    ]
    words = list(dict.fromkeys(word.strip("'") for word in words))
    expected = re.findall(r"Expected (?:an? )?(?:<class ')?(?:pathlib\.)?(\w+)", report)
    kinds = [_KINDS[kind] for kind in dict.fromkeys(expected) if kind in _KINDS]
    if item := re.search(r"Subtypes: \[list\[(int|str)\]", report):
        kinds = [{"int": "a list of whole numbers", "str": "a list of texts"}[item[1]]]
    if length := re.search(r"Expected a tuple with (\d+) elements", report):
        kinds = [f"a list of {length[1]}"]
    if words:
        kinds.append(f"one of {', '.join(words)}")
    if base:
        kinds.append(f"a class of the kind {base.__name__}")
    return " or ".join(dict.fromkeys(kinds)) if expected else ""


def _last_value(report: str) -> str | None:
    """Return the rejected value: inner reports come first, the outermost repeats the whole value last."""
    values = re.findall(r"(?:import path string|Got value|Given value): ([^\n]*?)(?:\. Got value.*)?$", report, re.M)
    values = [value for value in values if not value.startswith(("NestedArg(", "Namespace("))]
    plain = [value for value in values if not value.startswith("{")] or values
    of_list = len(plain) > 1 and plain[-1].startswith("[") and not plain[0].startswith("[") and plain[0] in plain[-1]
    if of_list and "Subtypes: [list[str]" not in report:
        return plain[0]  # the bad element; in a list of texts 5 would look like a text
    return None if not plain else plain[-1] if len(plain[-1]) <= 80 else f"{plain[-1][:79]}…"


# Options.


def _unknown_option(field: str, text: str, parser: ArgumentParser) -> str:
    known = [action.dest for action in parser._actions if not action.dest.endswith(("help", "print_config"))]
    if not text.startswith("-"):
        prompt = "; a prompt is given by --prompt" if "prompt" in known else ""
        return f"{text!r} is not understood; options begin with --{prompt}"
    name = text.lstrip("-").split("=")[0]
    full = f"{field}.{name}" if field else name
    elsewhere = [f"task.{name}"] if "task" in known and not _is_text(parser, "task") and name in _TASK_ARGUMENTS else []
    elsewhere += [option for option in [*known, *_inside_classes(parser)] if option.endswith(f".{name}")]
    hint = f"; did you mean {elsewhere[0]}?" if elsewhere else _hint_beside(full, known)
    return f"{full}: there is no such option{hint}"


_TASK_ARGUMENTS = ("max_new_tokens", "prompt_characters", "path", "metrics", "stop_strings", "chat")


def _inside_classes(parser: ArgumentParser) -> Iterator[str]:
    """Yield the options that are arguments of classes: of each field's default class or type."""
    for action in parser._actions:
        default = getattr(action.default, "get", lambda key: None)("class_path")
        kinds = [pydoc.locate(default)] if default else get_args(getattr(action, "_typehint", None))
        for kind in kinds if "." not in action.dest else ():
            if inspect.isclass(kind) and kind.__module__ != "builtins":
                yield from (f"{action.dest}.{argument}" for argument in inspect.signature(kind).parameters)


def _is_text(parser: ArgumentParser, name: str) -> bool:
    return any(action.dest == name and "str" in str(action._typehint) for action in parser._actions)


def _hint_beside(name: str, known: list[str]) -> str:
    """Return the hint for a misspelled option, from the options of its own group."""
    group = name[: name.rfind(".") + 1]
    beside = [option for option in known if option.startswith(group) and not name.startswith(f"{option}.")]
    names = [option[len(group) :] for option in beside]
    return did_you_mean(name[len(group) :], names, _CUTOFF, lambda found: group + found)


def _unknown_argument(field: str, name: str, report: str) -> str:
    if name == "class_path":
        return f"{field}: beside class_path stands init_args alone, and the class's arguments under that"
    path = re.findall(r"given class_path '([\w.]+)'", report)
    owner = pydoc.locate(path[-1]) if path else None
    if owner is None:
        return f"{field}.{name}: there is no such option".lstrip(".")
    known = list(inspect.signature(owner).parameters)
    takes = f"{owner.__name__} takes {', '.join(known)}" if known else f"{owner.__name__} takes none"
    if len(takes) > 150:
        takes = f"{owner.__name__} does not take it{did_you_mean(name, known, _CUTOFF)}"
    return f"{field}.{name}: there is no such option; {takes}"
