"""Settings that `lskip tune` found, kept beside the model by task, and their use by `--task`."""

from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

from lskip.inference import CriterionDraft, GenerationSettings
from lskip.inference.drafting.registry import DRAFTERS
from lskip.inference.exit_criteria import MEASURED
from lskip.inference.loading import resolve_device
from lskip.inference.options import DecodingOptions, DraftWeights, LoadingOptions
from lskip.inference.settings import AUTO
from lskip.models.draft_tokens import ALL
from lskip.models.exit_adapter import SHIPPED, find_adapter
from lskip.utils.output_files import make_writable, only_writer, write_json
from lskip.utils.untrusted import parse_json, read_text
from lskip.utils.user_errors import one_line
from lskip.utils.user_paths import user_path

FILE = "tuned.json"
CACHE = "~/.cache/lskip/tuned"
DECODING = ("exit_layer", "num_speculations", "draft")  # options that a task sets, of DecodingOptions
LOADING = ("draft_weights", "exit_adapter")  # and of LoadingOptions
NAMES = ("draft", *LOADING, "draft_tokens")  # draft_tokens: files of before lack them
WAIT = 60  # seconds for another process to save its task in the same file


def tuned_path(model: str) -> Path:
    """Return the file of a model's tuned tasks: beside its checkpoint or in its folder, else in ~/.cache/lskip.

    Raises:
        ValueError, FileNotFoundError: there is no such model.
    """
    from lskip.models.pretrained import find_source  # late: it imports the GGUF reader and the hub client

    found = find_source(model)
    if found.kind == "folder":
        return Path(found.place) / FILE
    if found.kind == "hub" or model == "smollm2":
        return user_path(CACHE, "task") / f"{model.replace('/', '--')}.json"
    return Path(found.place).with_suffix(f".{FILE}")


def read_tuned(path: Path) -> dict[str, dict[str, Any]]:
    """Return what was found by task; {} where no task was tuned; ValueError for a file that has something else."""
    if not path.exists():
        return {}
    try:
        tasks = parse_json(read_text(path, "task"), f"task: '{path}'")
    except (ValueError, OSError) as error:  # OSError: a folder
        raise ValueError(f"{one_line(error)}; remove it, and tune again") from error
    if not isinstance(tasks, dict) or not all(map(_is_found, tasks.values())):
        raise ValueError(f"task: '{path}' does not hold what lskip tune writes; remove it, and tune again")
    return tasks


def _is_found(found: Any) -> bool:
    """Return whether it is an entry that tune saves of a task; only fields in use count."""
    if not isinstance(found, dict) or not {*DECODING, *LOADING, "device"} <= set(found):
        return False
    try:
        GenerationSettings(**{name: found[name] for name in DECODING if name != "draft"})
        _policy_of(found)
    except (ValueError, TypeError, KeyError):
        return False
    if not isinstance(found["device"], str) or not all(isinstance(found.get(name), str | None) for name in NAMES):
        return False
    # A drafter of the user's own may not be known here: `_check_found` says so of its task alone.
    needs = DRAFTERS[found["draft"]].needs if found["draft"] in DRAFTERS else None
    return needs is None or found[needs] is not None


def _policy_of(found: dict[str, Any]) -> CriterionDraft | None:
    """Return the policy of a task whose drafts end where a criterion is unsure; None for the others."""
    if (criterion := found.get("criterion")) is None:
        return None
    return CriterionDraft(MEASURED[criterion["name"]](criterion["threshold"]))


def adapter_place(name: str) -> str:
    """Return an exit adapter's name that holds in every folder: its absolute path, or the name of a shipped one."""
    return name if name in SHIPPED else str(user_path(name, "exit_adapter").resolve())


def tokens_place(name: str | None) -> str | None:
    """Return a file of draft_tokens as an absolute path, and any other value as it is."""
    return name if name in (None, ALL) else str(user_path(name, "draft_tokens").resolve())


def check_place(path: Path) -> None:
    """Raise ValueError, before anything is measured, where no task can be saved."""
    read_tuned(path)
    make_writable(path.parent, "model: what is tuned is kept beside it")


def save_tuned(path: Path, task: str, found: dict[str, Any]) -> None:
    """Add a task to the file, in one step, since another process may write it at the same time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with only_writer(path, "task", WAIT):
        write_json(path, read_tuned(path) | {task: found})


def tuned_options(
    task: str | None, decoding: DecodingOptions, loading: LoadingOptions
) -> tuple[DecodingOptions, LoadingOptions]:
    """Return the options, with the task's settings in place of what the user has left open.

    A user who turns drafting off (num_speculations 0, an exit_criterion), or names another draft, gets no draft of the
    task's.

    Raises:
        ValueError: no such task was tuned for this model (it lists those that were), or on another kind of device.
    """
    if task is None:
        return decoding, loading
    path = tuned_path(loading.model)
    tasks = read_tuned(path)
    if task not in tasks:
        known = f"tuned are {', '.join(tasks)}" if tasks else "none is tuned yet"
        advice = f"lskip tune --model {loading.model} --task {task}, or --task LocalTask --task.path {task}.jsonl"
        raise ValueError(f"task: {task!r} is not tuned for {loading.model} ({known}); run: {advice}")
    found = tasks[task]
    here = resolve_device("auto").type if loading.device == "auto" else loading.device.partition(":")[0]
    if here != found["device"]:
        raise ValueError(f"task: {task!r} was tuned on {found['device']!r}, not on {here!r}; tune it there")
    if decoding.num_speculations == 0 or decoding.exit_criterion is not None:
        return decoding, loading
    if _drafts_otherwise(found, decoding, loading):
        count = None if decoding.draft == AUTO else found["num_speculations"]  # a fixed draft's says nothing of it
        found = dict.fromkeys(found) | {"num_speculations": count}
    _check_found(task, found, loading)
    policy = _policy_of(found)
    decoding = _filled(decoding, found, DECODING)
    if policy is not None and decoding.draft_policy is None and decoding.exit_layer == found["exit_layer"]:
        decoding = replace(decoding, draft_policy=policy)  # a threshold is its exit's
    return decoding, _filled(loading, found, (*LOADING, "draft_tokens"))


def _check_found(task: str, found: dict[str, Any], loading: LoadingOptions) -> None:
    """Raise ValueError or FileNotFoundError where the model cannot draft so, or weights or adapter are gone."""
    from lskip.models.pretrained import find_source, load_config

    if found["draft"] not in (None, *DRAFTERS):
        advice = "name its class by --draft, or tune again"
        raise ValueError(f"task: {task!r} was tuned with draft {found['draft']!r}, which is not known; {advice}")
    weights, allowed = found["draft_weights"], get_args(DraftWeights)
    if weights not in (None, *allowed):
        one_of = f"is not one of {', '.join(allowed)}; tune again"
        raise ValueError(f"task: {task!r} was tuned with draft_weights {weights!r}, which {one_of}")
    if weights is not None and weights == loading.weights:
        advice = f"tune it with --weights {weights}, or name another draft"
        raise ValueError(f"task: {task!r} drafts in {weights!r}, which weights are already; {advice}")
    if found["exit_adapter"] is not None:
        find_adapter(found["exit_adapter"], f"task: {task!r} was tuned with an exit_adapter")
    tokens = found.get("draft_tokens")
    if tokens not in (None, ALL) and not user_path(tokens, "task").is_file():
        raise FileNotFoundError(f"task: {task!r} was tuned with draft_tokens {tokens!r}, and there is no such file")
    exit_layer = found["exit_layer"]
    if exit_layer is None or find_source(loading.model).kind not in ("folder", "checkpoint"):
        return  # the tuned file of others goes by their name, so it is of this model
    if exit_layer > (layers := load_config(loading.model).num_hidden_layers):
        raise ValueError(f"task: {task!r} was tuned for another model: exit_layer {exit_layer} of {layers}; tune again")


def _drafts_otherwise(found: dict[str, Any], decoding: DecodingOptions, loading: LoadingOptions) -> bool:
    """Return whether the user names another draft than the task's."""
    mine, theirs = loading.exit_adapter, found["exit_adapter"]
    if mine is not None and (theirs is None or adapter_place(mine) != adapter_place(theirs)):
        return True
    named = {"draft": decoding.draft, "draft_weights": loading.draft_weights}
    return any(value is not None and value != found[name] for name, value in named.items())


def _filled(options, found: dict[str, Any], names: tuple[str, ...]):
    return replace(options, **{name: found.get(name) for name in names if getattr(options, name) is None})
