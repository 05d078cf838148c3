"""Checks of class paths in configs, which are untrusted: only subclasses of a field's type are instantiated.

Functions are never called, modules of the standard library never imported, and a class path in a field that takes no
class is refused.
"""

import inspect
import sys
from functools import partial
from typing import Any

from jsonargparse import ArgumentParser, Namespace, set_parsing_settings
from jsonargparse._common import parser_context
from jsonargparse._typehints import ActionTypeHint, get_class_types, is_subclass_spec
from jsonargparse._util import import_object


def restrict_imports() -> None:
    """Make jsonargparse import no module of a denylist, and instantiate no class in a field of any type."""
    set_parsing_settings(
        import_path_denylist=[*sorted(sys.stdlib_module_names), "__main__", "pip", "setuptools", "lskip.__main__"],
        instantiate_subclass_spec_in_any=False,
        config_read_mode_urls_enabled=False,
        config_read_mode_fsspec_enabled=False,
    )


def check_classes(parser: ArgumentParser, values: Namespace, prefix: str = "") -> None:
    """Check that each class path in parsed values, nested ones included, is a subclass of its field's type.

    Also that null stands only where it is allowed, which jsonargparse does not check.

    Raises:
        ValueError: one sentence that names the field and its value.
    """
    with parser_context(parent_parser=parser):
        for action in parser._actions:
            if isinstance(action, ActionTypeHint) and action.dest in values:
                value = values[action.dest]
                if value is None and action.default is not None and not _may_be_null(action._typehint):
                    raise ValueError(f"{prefix}{action.dest}: null is not allowed")
                _check(prefix + action.dest, value, action)


def _may_be_null(hint: Any) -> bool:
    return hint in (Any, object) or type(None) in getattr(hint, "__args__", ())


def _check(field: str, value: Any, action: ActionTypeHint) -> None:
    if is_subclass_spec(value):
        kind = class_of_field(field, value["class_path"], get_class_types(action._typehint))
        if arguments := value.get("init_args"):
            parser = ActionTypeHint.get_class_parser(kind, action.sub_add_kwargs)
            check_classes(parser, arguments, f"{field}.")
    elif isinstance(value, dict | Namespace):
        for key, part in vars(value).items() if isinstance(value, Namespace) else value.items():
            _check(f"{field}.{key}", part, action)
    elif isinstance(value, list | tuple | set):
        for part in value:
            _check(field, part, action)
    elif (inspect.isroutine(value) or isinstance(value, partial)) and value is not action.default:
        raise ValueError(f"{field}: {getattr(value, '__name__', value)!r} is a function; only classes are taken")


def class_of_field(field: str, path: Any, kinds: tuple[type, ...]) -> type:
    """Return the class that a field names by its import path; ValueError where it is of none of these kinds."""
    if not kinds:
        raise ValueError(f"{field}: class_path {path!r}: no class is expected here")
    named = import_object(path)
    if not inspect.isclass(named) or not issubclass(named, kinds):
        names = " or ".join(dict.fromkeys(kind.__name__ for kind in kinds))
        raise ValueError(f"{field}: {path!r} is not a class of the kind {names}")
    return named
