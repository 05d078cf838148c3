"""The option `--config`: a YAML file, or the name of one that comes with lskip, read as untrusted input."""

import os
from collections.abc import Iterator
from enum import Enum
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ActionConfigFile, ArgumentParser
from jsonargparse._actions import _ActionConfigLoad
from jsonargparse._loaders_dumpers import get_yaml_default_loader
from jsonargparse._paths import Path as PathOption

from lskip.utils.untrusted import check_nodes, parse_yaml, read_text
from lskip.utils.user_paths import did_you_mean, user_path

CONFIG_HELP = "YAML file with the options below, or the name of one of `lskip configs`; later ones win"


def bound_yaml() -> None:
    """Bound the YAML that jsonargparse reads, in files and in values of options, and let it write enum defaults.

    (An enum is the default of an argument of Lightning's Timer.)
    """
    yaml.SafeDumper.add_multi_representer(Enum, lambda dumper, each: dumper.represent_data(each.value))
    loader = get_yaml_default_loader()
    if "get_single_node" not in vars(loader):
        compose = loader.get_single_node
        loader.get_single_node = lambda self: _checked(compose, self)
    PathOption.read_text = lambda self: _text_of(self.absolute)
    _text_of.cache_clear()


def _checked(compose, loader: yaml.SafeLoader) -> yaml.Node | None:
    try:
        document = compose(loader)
        check_nodes(document)
    except RecursionError as error:
        raise yaml.YAMLError("too deeply nested") from error
    if document is None:  # a comment: jsonargparse then takes `--text "# A title"` for a text
        raise yaml.YAMLError("it is empty")
    return document


# Classes that configs of runs may name by where they were before lskip had folders.
MOVED = {
    "lskip.run_logger.RunLogger": "lskip.cli.runs.run_logger.RunLogger",
    "lskip.step_bar.StepBar": "lskip.training.step_bar.StepBar",
    "lskip.checkpoint_file.WholeFiles": "lskip.training.checkpoint_file.WholeFiles",
}


@lru_cache
def _text_of(path: str) -> str:
    # Cached: a pipe (`--config <(…)`) can be read only once.
    try:
        text = read_text(Path(path), "config")
    except OSError as error:
        # jsonargparse tries every value as a file name; after a ValueError it takes the value for a text.
        raise ValueError(f"config: '{path}' cannot be read ({error.strerror})") from error
    for before, now in MOVED.items():
        text = text.replace(before, now)
    return text


def shipped_configs() -> dict[str, Path]:
    """Return {name: path} of the configs that come with lskip (quickstart, curriculum/gradual …)."""
    import lskip.configs

    folder = Path(next(iter(lskip.configs.__path__)))
    return {path.relative_to(folder).with_suffix("").as_posix(): path for path in sorted(folder.rglob("*.yaml"))}


def shipped_config(name: str) -> Path:
    """Return the path of a config that comes with lskip, by its name or as configs/NAME.yaml.

    Raises:
        ValueError: there is none of that name.
    """
    known = shipped_configs()
    short = name.removeprefix("configs/").removesuffix(".yaml")
    if short not in known:
        hint = did_you_mean(short, known, cutoff=0.5)
        raise ValueError(f"config: there is no file {name!r}, and `lskip configs` lists none of that name{hint}")
    return known[short]


def read_config(path: Path) -> dict[str, Any]:
    """Return the options in a YAML file, with numbers parsed as on the command line.

    Raises:
        ValueError: one sentence with the file's name.
    """
    content = parse_yaml(_text_of(os.path.abspath(path)), f"config: '{path}'", get_yaml_default_loader())
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        kind = "empty" if content is None else f"a {type(content).__name__}"
        raise ValueError(f"config: '{path}' is {kind}, not options and their values")
    return content


def config_file(name: str) -> Path:
    """Return the path of a config file, or else of a config that comes with lskip; ValueError, OSError if neither."""
    path = user_path(name, "config")
    if path.is_dir():
        raise IsADirectoryError(f"config: '{path}' is a folder")
    return path if path.exists() else shipped_config(name)


class ConfigFile(ActionConfigFile):
    """The action of --config; a value in braces is read as the options themselves: `--config '{model: smollm2}'`."""

    def __call__(self, parser, cfg, values, option_string=None):
        if values.lstrip().startswith("{"):
            content = parse_yaml(values, "config: the value", get_yaml_default_loader())
        else:
            path = config_file(values)
            content, values = read_config(path), os.path.abspath(path)
        _check_content(content, parser)
        super().__call__(parser, cfg, values, option_string)


def _check_content(content: dict[str, Any], parser: ArgumentParser) -> None:
    """Raise ValueError for content on which jsonargparse would crash, or which it would silently ignore."""
    names = {action.dest: isinstance(action, _ActionConfigLoad) for action in parser._actions}
    known = {name.partition(".")[0] for name in names}
    for name, value in content.items():
        if value == {} and name not in known:
            raise ValueError(f"{name}: there is no such option")
        if name == "config" and not isinstance(value, str):
            raise ValueError(f"config: {value!r} is not the name of a file")
        if names.get(name) and not isinstance(value, dict | str):
            raise ValueError(f"{name}: {'null' if value is None else repr(value)} is not options and their values")
        for field in _with_nul(name, value):
            raise ValueError(f"{field}: a NUL in a text is not allowed")


def _with_nul(name: str, value: Any) -> Iterator[str]:
    """Yield the dotted names of the fields that hold a NUL."""
    if isinstance(value, dict):
        for key, part in value.items():
            yield from _with_nul(f"{name}.{key}", part)
    elif isinstance(value, list):
        for part in value:
            yield from _with_nul(name, part)
    if "\0" in name or (isinstance(value, str) and "\0" in value):
        yield name
