"""What `lskip tune` found, kept beside the model by task, and `--task` of generate and predict that goes by it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from lskip.command_options import DecodingOptions, LoadingOptions
from lskip.output_files import write_json

FILE = "tuned.json"
CACHE = Path("~/.cache/lskip/tuned")
DECODING = ("exit_layer", "num_speculations", "draft")  # what a task sets, of DecodingOptions and LoadingOptions
LOADING = ("draft_weights", "exit_adapter")


def tuned_path(model: str) -> Path:
    """Where the tuned tasks of a model are: beside its checkpoint or in its folder; ~/.cache/lskip for all others.

    Raises:
        ValueError, FileNotFoundError: there is no such model.
    """
    from lskip.pretrained import find_source  # brings the GGUF reader and the hub client: only when asked

    found = find_source(model)
    if found.kind == "folder":
        return Path(found.place) / FILE
    if found.kind == "hub" or model == "smollm2":
        return CACHE.expanduser() / f"{model.replace('/', '--')}.json"
    return Path(found.place).with_suffix(f".{FILE}")


def read_tuned(path: Path) -> dict[str, dict[str, Any]]:
    """Task -> what was found; nothing where no task was tuned. ValueError for a file that holds something else."""
    if not path.is_file():
        return {}
    try:
        tasks = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"task: '{path}' is not JSON ({error}); remove it, and tune again") from error
    whole = isinstance(tasks, dict) and all(
        isinstance(found, dict) and {*DECODING, *LOADING, "device"} <= set(found) for found in tasks.values()
    )
    if not whole:
        raise ValueError(f"task: '{path}' does not hold what lskip tune writes; remove it, and tune again")
    return tasks


def save_tuned(path: Path, task: str, found: dict[str, Any]) -> None:
    """Puts a task among those that the file holds, all at once."""
    tasks = read_tuned(path) | {task: found}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, tasks)


def tuned_options(
    task: str | None, decoding: DecodingOptions, loading: LoadingOptions
) -> tuple[DecodingOptions, LoadingOptions]:
    """The options with what a task sets in place of what the user has left open.

    A user who says that nothing drafts (num_speculations 0, an exit_criterion), or that something else does, gets
    no draft of the task's.

    Raises:
        ValueError: no such task was tuned for this model (it lists those that were), or on another kind of device.
    """
    if task is None:
        return decoding, loading
    path = tuned_path(loading.model)
    tasks = read_tuned(path)
    if task not in tasks:
        known = f"tuned are {', '.join(tasks)}" if tasks else "none is tuned yet"
        advice = f"lskip tune --model {loading.model} --task {task}"
        raise ValueError(f"task: {task!r} is not tuned for {loading.model} ({known}); run: {advice}")
    from lskip.inference.loading import resolve_device  # brings torch: only when asked

    found = tasks[task]
    here = resolve_device("auto").type if loading.device == "auto" else loading.device.partition(":")[0]
    if here != found["device"]:
        raise ValueError(f"task: {task!r} was tuned on {found['device']!r}, not on {here!r}; tune it there")
    if decoding.num_speculations == 0 or decoding.exit_criterion is not None:
        return decoding, loading
    if _drafts_otherwise(found, decoding, loading):
        found = dict.fromkeys(found) | {"num_speculations": found["num_speculations"]}
    return _filled(decoding, found, DECODING), _filled(loading, found, LOADING)


def _drafts_otherwise(found: dict[str, Any], decoding: DecodingOptions, loading: LoadingOptions) -> bool:
    """Whether the user names another draft than the task's."""
    named = {"draft": decoding.draft, **{name: getattr(loading, name) for name in LOADING}}
    return any(value is not None and value != found[name] for name, value in named.items())


def _filled(options, found: dict[str, Any], names: tuple[str, ...]):
    return replace(options, **{name: found[name] for name in names if getattr(options, name) is None})
