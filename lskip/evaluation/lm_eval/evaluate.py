"""`lskip evaluate`: scores of exits on the tasks of lm-eval-harness."""

from __future__ import annotations

import difflib
import importlib.util
import itertools
import json
import logging
import random
import re
import traceback
from collections.abc import Iterable
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from rich.table import Table

from lskip.evaluation.lm_eval.models import load_parts, models_to_score
from lskip.inference.loading import resolve_device
from lskip.models.exit_adapter import find_adapter
from lskip.models.exit_names import exit_layers_of, exit_names, layers_of
from lskip.utils.checks import check_choice, check_real, check_whole
from lskip.utils.console import plain_console, plain_table
from lskip.utils.devices import DTYPES, DType
from lskip.utils.output_files import check_output_file, only_writer, write_bytes
from lskip.utils.user_errors import one_line
from lskip.utils.user_paths import user_path

if TYPE_CHECKING:
    from lskip.evaluation.lm_eval.exit_model import ExitModel

BOOTSTRAP_SAMPLES = 1000  # for standard errors; lm-eval's default takes minutes an exit
WEIGHTS = ("auto", "int8")
SEED = 1234  # of few-shot examples, lm-eval's default


def evaluate(
    tasks: str,
    model: str = "smollm2",
    exits: str = "last",
    output: str | None = None,
    include_path: str | None = None,
    limit: float | None = None,
    num_fewshot: int | None = None,
    batch_size: int = 8,
    chat: bool = False,
    dtype: DType = "float32",
    device: str = "auto",
    overwrite: bool = False,
    confirm_run_unsafe_code: bool = False,
    exit_adapter: str | None = None,
    weights: Literal["auto", "int8"] = "auto",
) -> None:
    """Score exits on tasks of lm-eval-harness, all exits from one forward pass: a table and a JSON file.

    Args:
        tasks: names of lm-eval-harness, tasks or groups, with commas between: hellaswag,arc_easy.
        model: a run folder, a checkpoint, an exported or downloaded folder, a hub name, a .gguf file, smollm2.
        exits: exit layers with commas between, 1 to the model's layers or last: 8,16,last.
        output: JSON file to write, anew after each exit; null: results_MODEL_TIME.json in this folder.
        include_path: folder with task files of your own.
        limit: documents of each task that are used: a number, or below 1 their share; null: all.
        num_fewshot: worked examples before each question; null: as the task says.
        batch_size: texts that are run together.
        chat: put questions into the tokenizer's chat template.
        dtype: of the weights in memory.
        device: cpu, cuda …; auto takes a GPU where there is one.
        overwrite: replace an existing output.
        confirm_run_unsafe_code: let tasks that run what the model writes (HumanEval, MBPP) do so, on this machine.
        exit_adapter: folder of an exit adapter without joins_last_state, through which its exit is read; others are
            read as without. null: none.
        weights: int8: score the model, and once more with its blocks in 8 bits, as weights int8 decodes it; with
            dtype float32 alone.
    """
    names, asked_exits = [name.strip() for name in tasks.split(",") if name.strip()], exit_names(exits)
    _check_values(batch_size, num_fewshot, limit, dtype, weights)
    path = _free(user_path(results_name(model) if output is None else output, "output"), overwrite)
    _require_lm_eval()
    place, exit_layers = resolve_device(device), exit_layers_of(asked_exits, layers_of(model))
    adapter = None if exit_adapter is None else find_adapter(exit_adapter)
    with only_writer(path, "output"):
        loaded = _load_tasks(names, include_path, num_fewshot)
        options = {
            "limit": limit if limit is None or limit < 1 else int(limit),
            "apply_chat_template": chat,
            "confirm_run_unsafe_code": confirm_run_unsafe_code,
        }
        parts = load_parts(model, exit_layers, getattr(torch, dtype), place, adapter)
        if chat and parts.tokenizer.chat_template is None:
            raise ValueError("chat: true needs a chat template, and the model's tokenizer has none")
        models = models_to_score(parts, exit_layers, batch_size, weights)
        record = {"model": model, "dtype": dtype, "tasks": names, "num_fewshot": num_fewshot, **options}
        record |= {} if exit_adapter is None else {"exit_adapter": exit_adapter}
        results = _evaluate_all(models, loaded, options, path, record | {"lm_eval": version("lm-eval")})
    plain_console().print(results_table(results))
    plain_console().print(f"results: {path}", soft_wrap=True)


def results_name(model: str) -> str:
    """Return the default name of the results file, from the model's name and the time."""
    name = re.sub(r"[^\w.-]+", "-", user_path(model, "model").resolve().name)
    return f"results_{name}_{datetime.now():%Y-%m-%d_%H-%M-%S}.json"


def _evaluate_all(models: Iterable[ExitModel], tasks: dict, options: dict, path: Path, record: dict) -> dict[str, dict]:
    """Return {exit: lm-eval's results}, written to `path` after each exit, so that a failure loses one exit only.

    Raises:
        ValueError: the logits of an exit are NaN, or the disk is full (the table so far is then printed).
    """
    results: dict[str, dict] = {}
    for model in models:
        try:
            results[model.exit_name] = _evaluate_exit(model, tasks, options)
        except KeyboardInterrupt as pressed:  # or its subclass for SIGTERM
            kept = f"exits {', '.join(results)} are in '{path}'" if results else "nothing is scored yet"
            raise type(pressed)(f"; {kept}") from None
        try:
            write_bytes(path, (json.dumps(record | {"results": results}, indent=2, default=str) + "\n").encode())
        except OSError as error:
            plain_console().print(results_table(results))
            raise ValueError(
                f"output: could not be written ({one_line(error)}); what is scored stands above"
            ) from error
    return results


def results_table(results: dict[str, dict[str, dict]]) -> Table:
    """Return a table with one row per task and metric, one column per exit, and standard errors after ±.

    Args:
        results: exit -> task -> lm-eval's results ("acc,none", "acc_stderr,none" …).
    """
    exits = (f"exit {name}" for name in results)
    table = plain_table("task", "metric", *exits, title="Exits on tasks", right=2)
    for task, scores in next(iter(results.values())).items():
        for metric in filter(_is_metric, scores):
            cells = [_cell(found[task], metric) for found in results.values()]
            table.add_row(task, metric.removesuffix(",none"), *cells)
    return table


def _is_metric(name: str) -> bool:
    return "," in name and "_stderr," not in name


def _cell(scores: dict, metric: str) -> str:
    error = scores.get(metric.replace(",", "_stderr,", 1))
    value = f"{scores[metric]:.4g}" if isinstance(scores[metric], float) else str(scores[metric])
    return f"{value} ± {error:.2g}" if isinstance(error, float) else value


def _check_values(batch_size: int, num_fewshot: int | None, limit: float | None, dtype: str, weights: str) -> None:
    check_choice("dtype", dtype, DTYPES)
    check_choice("weights", weights, WEIGHTS)
    if weights == "int8" and dtype != "float32":  # which would round the numbers once more, to others
        raise ValueError(f"dtype: {dtype!r} is not for weights int8, which is scored in float32; leave it out")
    check_whole("batch_size", batch_size, 1)
    if num_fewshot is not None:
        check_whole("num_fewshot", num_fewshot, 0)
    if limit is not None:
        allowed = "above 0, and whole from 1 to 2**31"
        check_real("limit", limit, allowed, lambda value: 0 < value <= 2**31 and (value < 1 or value == int(value)))


def _free(path: Path, overwrite: bool) -> Path:
    """Return the path; ValueError, FileNotFoundError if it exists or is not writable."""
    check_output_file(path)
    if path.exists() and not overwrite:
        raise ValueError(f"output: '{path}' exists; replace it with --overwrite true, or name another file")
    return path


def _require_lm_eval() -> None:
    if importlib.util.find_spec("lm_eval") is None:
        raise ValueError("tasks: come from lm-eval-harness, which is not installed: pip install lm-eval accelerate")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)


def _load_tasks(names: list[str], include_path: str | None, num_fewshot: int | None) -> dict:
    """Return the tasks and groups of these names, loaded by lm-eval with their data."""
    from lm_eval.tasks import TaskManager

    if include_path is not None and not user_path(include_path, "include_path").is_dir():
        raise FileNotFoundError(f"include_path: there is no folder '{include_path}'")
    try:
        manager = _own_tasks(names, include_path) or TaskManager(include_path=include_path)
    except Exception as error:  # a task file may raise anything; no code of lskip runs here
        raise _unreadable(names, error) from error
    unknown = [name for name in names if name not in manager.all_tasks]
    if unknown or not names:
        said = f"tasks: {', '.join(unknown) or 'none'} is not a task of lm-eval-harness or of include_path"
        close = difflib.get_close_matches(unknown[0], manager.all_tasks, 3) if unknown else []
        raise ValueError(f"{said}; did you mean {' or '.join(close)}?" if close else said)
    random.seed(SEED)  # tasks may sample while they load their data
    try:
        loaded = manager.load(names)
    except Exception as error:
        raise _unreadable(names, error) from error
    for name, task in loaded["tasks"].items():
        own = task.get_config("num_fewshot")
        if own is not None:
            check_whole(f"tasks: {name}: num_fewshot", own, 0)
        if own != 0:  # as in lm-eval, a task that sets 0 keeps it
            task.set_config("num_fewshot", (own or 0) if num_fewshot is None else num_fewshot)
    return loaded


def _unreadable(names: list[str], error: Exception) -> ValueError:
    said = f"{type(error).__name__}: {error}"
    return ValueError(f"tasks: {', '.join(names)} cannot be read by lm-eval ({said})")


def _runs_lskip(error: Exception) -> bool:
    """Return whether the error was raised in code of lskip that lm-eval had called."""
    modules = [str(frame.f_globals.get("__name__")) for frame, _ in traceback.walk_tb(error.__traceback__)]
    below = itertools.dropwhile(lambda name: not name.startswith("lm_eval."), modules)
    return any(name.startswith("lskip.") for name in below)


def _own_tasks(names: list[str], include_path: str | None):
    """Return a TaskManager of include_path alone if it has all tasks, since reading lm-eval's own takes a minute."""
    from lm_eval.tasks import TaskManager

    if include_path is None:
        return None
    manager = TaskManager(include_path=include_path, include_defaults=False)
    return manager if set(names) <= set(manager.all_subtasks) else None


def _evaluate_exit(model: ExitModel, tasks: dict, options: dict) -> dict[str, dict]:
    from jinja2 import TemplateError
    from lm_eval.evaluator import evaluate as evaluate_model

    for task in tasks["tasks"].values():
        task.set_fewshot_seed(SEED)  # the same few-shot examples for every exit
    sampled = {"bootstrap_iters": BOOTSTRAP_SAMPLES, "log_samples": False}
    try:
        return evaluate_model(model, tasks, **sampled, **options)["results"]
    except TemplateError as error:
        raise ValueError(f"tasks: a template cannot be filled in ({error})") from error
    except Exception as error:
        if "math range error" in str(error):  # exp of a mean loss
            raise ValueError(f"exits: the perplexity of exit {model.exit_layer} is more than a float holds") from error
        if "larger than population" in str(error):
            raise ValueError("tasks: num_fewshot: is more than a task has worked examples") from error
        if _runs_lskip(error):
            raise
        raise _unreadable(list(tasks["tasks"]), error) from error
