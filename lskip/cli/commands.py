"""The commands that are plain functions: their arguments as options of the command line, parsed and called."""

from collections.abc import Callable
from dataclasses import is_dataclass
from importlib import import_module
from inspect import signature
from typing import get_type_hints

from docstring_parser import parse as parse_docstring
from jsonargparse import ArgumentParser

from lskip.cli.config_files import CONFIG_HELP, ConfigFile, bound_yaml
from lskip.cli.errors import innermost
from lskip.cli.named_classes import class_of_field, restrict_imports
from lskip.cli.option_parsing import parse_options
from lskip.evaluation.tasks.task import Task
from lskip.inference.drafting.drafter import Drafter
from lskip.inference.drafting.policies import DraftPolicy
from lskip.inference.drafting.registry import register_drafter
from lskip.inference.exit_criteria import ExitCriterion
from lskip.utils.foreign import first_line

# The module of each command's function, imported when it runs: some import Lightning, which takes seconds.
MODULES = {
    "data": "lskip.cli.data",
    "predict": "lskip.cli.predict",
    "generate": "lskip.cli.generate",
    "chat": "lskip.cli.chat",
    "serve": "lskip.cli.serve",
    "adapt": "lskip.adapters.adapt",
    "export": "lskip.export.to_hf",
    "sweep": "lskip.evaluation.sweep.sweep",
    "tune": "lskip.evaluation.sweep.tune",
    "evaluate": "lskip.evaluation.lm_eval.evaluate",
    "compare": "lskip.evaluation.runs.compare",
    "inspect": "lskip.evaluation.layers.inspect",
}
_CLASSES = {"draft_policy": DraftPolicy, "exit_criterion": ExitCriterion, "criterion": ExitCriterion, "task": Task}


def run_command(arguments: list[str]) -> None:
    """Run the command named by the first argument with the others as its options.

    Positional-only lists of its function are positional arguments on the command line too.
    """
    name, *options = arguments
    bound_yaml()
    restrict_imports()
    command = command_named(name)
    parser = ArgumentParser(prog=f"lskip {name}", exit_on_error=False, allow_abbrev=False)
    parser.add_argument("-c", "--config", action=ConfigFile, help=CONFIG_HELP)
    lists = [key for key, part in signature(command).parameters.items() if part.kind is part.POSITIONAL_ONLY]
    described = {part.arg_name: part.description for part in parse_docstring(command.__doc__).params}
    for key in lists:
        parser.add_argument(key, nargs="+", help=described[key])
    # Dataclasses, and a data module: each of their arguments is an option.
    hints = get_type_hints(command).items()
    groups = {key: kind for key, kind in hints if is_dataclass(kind) or hasattr(kind, "prepare_data")}
    plain = parser.add_function_arguments(command, skip={*groups, *lists})
    members = {key: parser.add_class_arguments(kind) for key, kind in groups.items()}
    values = _parse(parser, options)
    given = {key: kind(**{member: values[member] for member in members[key]}) for key, kind in groups.items()}
    command(*(values[key] for key in lists), **{key: values[key] for key in plain}, **given)


def command_named(name: str) -> Callable[..., None]:
    """Return the function that runs a command."""
    return getattr(import_module(MODULES[name]), name)


def _parse(parser: ArgumentParser, options: list[str]):
    """Return the values of the options, with class paths instantiated.

    Raises:
        ValueError: one sentence on the first bad option.
    """
    values = parse_options(parser, options, parser, _CLASSES)
    if isinstance(values.get("draft"), str):  # of export it is a number of layers
        values["draft"] = drafter_kind("draft", values["draft"])
    if values.get("drafts"):
        names = [name.strip() for name in ",".join(values["drafts"]).split(",")]
        values["drafts"] = [drafter_kind("drafts", name) for name in names]
    try:
        return parser.instantiate_classes(values)
    except ValueError as error:
        raise ValueError(innermost(str(error))) from error


def drafter_kind(field: str, name: str) -> str:
    """Return the kind of a Drafter that is named by its import path, and any other name as it is.

    Raises:
        ValueError: there is no such class.
    """
    if "." not in name:
        return name
    try:
        drafter = class_of_field(field, name, (Drafter,))
    except (Exception, SystemExit) as error:  # whatever its module does when it is imported
        if str(error).startswith(f"{field}: "):
            raise
        raise ValueError(
            f"{field}: {name!r} cannot be imported ({type(error).__name__}: {first_line(error)})"
        ) from error
    return register_drafter(drafter).kind
