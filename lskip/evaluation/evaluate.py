"""`lskip evaluate`: what every exit scores on the tasks of lm-eval-harness."""

from __future__ import annotations

import functools
import importlib.util
import json
import logging
import random
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from rich.console import Console
from rich.table import Table

from lskip.checks import check_real, check_whole
from lskip.decoder import Decoder
from lskip.evaluation.exit_names import exit_layers_of, exit_names
from lskip.inference import TextGenerator
from lskip.inference.loading import resolve_device
from lskip.pretrained import load_config, load_model
from lskip.trained_exits import load_trained_exits

if TYPE_CHECKING:
    from lskip.evaluation.lm_eval_adapter import ExitModel

BOOTSTRAP_SAMPLES = 1000  # for the standard errors that lm-eval draws; its own default takes minutes an exit
SEED = 1234  # lm-eval's default: of worked examples


def evaluate(
    tasks: str,
    model: str = "smollm2",
    exits: str = "last",
    output: str = "results.json",
    include_path: str | None = None,
    limit: float | None = None,
    num_fewshot: int | None = None,
    batch_size: int = 8,
    chat: bool = False,
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    device: str = "auto",
    overwrite: bool = False,
    confirm_run_unsafe_code: bool = False,
) -> None:
    """Score exits on tasks of lm-eval-harness, all exits from one forward pass: a table and a JSON file.

    Args:
        tasks: names of lm-eval-harness, tasks or groups, with commas between: hellaswag,arc_easy.
        model: a run folder, a checkpoint, an exported or downloaded folder, a hub name, a .gguf file, smollm2.
        exits: exit layers with commas between, 1 to the model's layers or last: 8,16,last.
        output: JSON file to write, anew after each exit.
        include_path: folder with task files of your own.
        limit: documents of each task that are used: a number, or below 1 their share; null: all.
        num_fewshot: worked examples before each question; null: as the task says.
        batch_size: texts that are run together.
        chat: put questions into the tokenizer's chat template.
        dtype: of the weights in memory.
        device: cpu, cuda …; auto takes a GPU where there is one.
        overwrite: replace an existing output.
        confirm_run_unsafe_code: let tasks that run what the model writes (HumanEval, MBPP) do so, on this machine.
    """
    named = [name.strip() for name in tasks.split(",") if name.strip()]
    asked_exits = exit_names(exits)
    check_whole("batch_size", batch_size, 1)
    if num_fewshot is not None:
        check_whole("num_fewshot", num_fewshot, 0)
    if limit is not None:
        check_real("limit", limit, "above 0", lambda value: value > 0)
    path = _writable(Path(output), overwrite)
    _require_lm_eval()
    place = resolve_device(device)
    exit_layers = exit_layers_of(asked_exits, load_config(model).num_hidden_layers)
    loaded = _load_tasks(named, include_path, num_fewshot)
    options = {
        "limit": limit if limit is None or limit < 1 else int(limit),
        "apply_chat_template": chat,
        "confirm_run_unsafe_code": confirm_run_unsafe_code,
    }
    models = _exit_models(model, exit_layers, batch_size, getattr(torch, dtype), place)
    if chat and models[0].tokenizer.chat_template is None:
        raise ValueError("chat: true needs a chat template, and the model's tokenizer has none")
    record = {"model": model, "dtype": dtype, "tasks": named, "num_fewshot": num_fewshot, **options}
    record |= {"lm_eval": version("lm-eval"), "results": {}}
    for exit_layer, exit_model in zip(exit_layers, models, strict=True):
        record["results"][str(exit_layer)] = _evaluate_exit(exit_model, loaded, options)
        path.write_text(json.dumps(record, indent=2, default=str) + "\n", encoding="utf-8")
    Console().print(results_table(record["results"]))


def results_table(results: dict[str, dict[str, dict]]) -> Table:
    """One line a task and metric, one column an exit; standard errors after ±.

    Args:
        results: exit layer -> task -> what lm-eval reports ("acc,none", "acc_stderr,none" …).
    """
    table = Table(title="Exits on tasks", title_justify="left")
    for name in ("task", "metric"):
        table.add_column(name)
    for exit_layer in results:
        table.add_column(f"exit {exit_layer}", justify="right")
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


def _writable(path: Path, overwrite: bool) -> Path:
    if path.exists() and not overwrite:
        raise ValueError(f"output: '{path}' exists; replace it with --overwrite true, or name another file")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"output: there is no folder '{path.parent}'")
    return path


def _require_lm_eval() -> None:
    if importlib.util.find_spec("lm_eval") is None:
        raise ValueError("tasks: come from lm-eval-harness, which is not installed: pip install lm-eval accelerate")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)


def _load_tasks(names: list[str], include_path: str | None, num_fewshot: int | None) -> dict:
    """The tasks and groups of these names as lm-eval takes them, their data read."""
    from lm_eval.tasks import TaskManager

    if include_path is not None and not Path(include_path).is_dir():
        raise FileNotFoundError(f"include_path: there is no folder '{include_path}'")
    manager = _own_tasks(names, include_path) or TaskManager(include_path=include_path)
    unknown = [name for name in names if name not in manager.all_tasks]
    if unknown or not names:
        raise ValueError(f"tasks: {', '.join(unknown) or 'none'} is not a task of lm-eval-harness or of include_path")
    random.seed(SEED)  # tasks may draw from it while they read their data
    loaded = manager.load(names)
    for task in loaded["tasks"].values():
        own = task.get_config("num_fewshot")
        if own != 0:  # a task that says 0 means it, whatever is asked for: so does lm-eval
            task.set_config("num_fewshot", (own or 0) if num_fewshot is None else num_fewshot)
    return loaded


def _own_tasks(names: list[str], include_path: str | None):
    """A TaskManager of include_path alone, where that has all tasks: to read lm-eval's own takes up to a minute."""
    from lm_eval.tasks import TaskManager

    if include_path is None:
        return None
    manager = TaskManager(include_path=include_path, include_defaults=False)
    return manager if set(names) <= set(manager.all_subtasks) else None


def _exit_models(
    source: str, exit_layers: list[int], batch_size: int, dtype: torch.dtype, place: torch.device
) -> list[ExitModel]:
    from lskip.evaluation.lm_eval_adapter import ExitModel, ExitScorer

    loaded, tokenizer = load_model(source, dtype)
    if tokenizer is None:
        raise ValueError(f"model: {source!r} has no tokenizer, which tasks need")
    decoder = Decoder(loaded.eval().to(place))
    trained = load_trained_exits(source, decoder)
    scorer = ExitScorer(decoder, exit_layers, batch_size, trained)
    generator = functools.cache(lambda: TextGenerator(loaded, tokenizer, trained_exits=trained))
    return [ExitModel(exit_layer, scorer, generator, tokenizer) for exit_layer in exit_layers]


def _evaluate_exit(model: ExitModel, tasks: dict, options: dict) -> dict[str, dict]:
    from lm_eval.evaluator import evaluate as evaluate_model

    for task in tasks["tasks"].values():
        task.set_fewshot_seed(SEED)  # the same examples for every exit
    return evaluate_model(model, tasks, bootstrap_iters=BOOTSTRAP_SAMPLES, log_samples=False, **options)["results"]
