"""The data of a run, which `validate` and `test` read unless their options name other data."""

import json
import sys
from pathlib import Path
from typing import Any

from lskip.cli.config_files import config_file, read_config
from lskip.data import TextData
from lskip.models.reading.sources import run_of
from lskip.utils.console import say

# What rows held in runs whose config.yaml and checkpoints do not say it: these options came later.
OF_EARLIER_RUNS = {"documents": "joined", "pack": False}


def with_run_data(arguments: list[str]) -> list[str]:
    """Return the arguments of `validate` or `test`, with the data and the folder of the run that `model` names.

    Nothing is added if the model is not a run. Data named by `--config` or flags win over the run's.

    Raises:
        ValueError: neither the run nor the arguments name data. OSError: the run's config is unreadable.
    """
    configs = [read_config(config_file(name)) for name in _values(arguments, "-c", "--config") if name[:1] != "{"]
    named = [*(config.get("model") for config in configs), *_values(arguments, "--model")]
    run = run_of(named[-1]) if named else None
    if run is None:
        return arguments
    own: dict[str, Any] = {}
    if not any("data" in config for config in configs) and not _values(arguments, "--data", "--data.class_path"):
        own["data"] = _data_of(run, bool(_values(arguments, "--data.source", "--data.init_args.source")))
    if not any("run_folder" in config for config in configs) and not _values(arguments, "--run_folder"):
        own["run_folder"] = str(run)
    # In front, since later options win.
    own = {key: value for key, value in own.items() if value is not None}
    return [arguments[0], f"--config={json.dumps(own)}", *arguments[1:]] if own else arguments


def _data_of(run: Path, has_source: bool) -> dict[str, Any] | None:
    path = run / "config.yaml"
    if not path.is_file():
        if has_source:
            return None
        raise ValueError(f"data: '{run}' has no config.yaml that says what it was trained on; give --data.source")
    data = read_config(path).get("data")
    if not isinstance(data, dict):
        raise ValueError(f"data: '{path}' does not say what the run was trained on; give --data.source")
    arguments = data.get("init_args")
    source = arguments.get("source", "") if isinstance(arguments, dict) else ""
    if isinstance(arguments, dict) and str(data.get("class_path")).rpartition(".")[2] == TextData.__name__:
        data["init_args"] = {**OF_EARLIER_RUNS, **arguments}
    if not has_source:
        said = f" (source {source})" if source else ""
        say(f"data: as in {path}{said}", sys.stderr)
    return data


def _values(arguments: list[str], *options: str) -> list[str]:
    """Return all values that the arguments give to any of `options`, in order."""
    found = []
    for at, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if name in options:
            found.append(value if equals else "".join(arguments[at + 1 : at + 2]))
    return found
