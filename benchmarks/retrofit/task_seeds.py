"""Exact match and speed-ups of a task fine-tune over several seeds, from results of benchmarks.retrofit.task_finetune.

    python -m benchmarks.retrofit.task_seeds result_seed0 result_seed1 result_seed2

Each result compares a LayerSkip run with a plain one of the same seed. The interval of the difference in exact match is
drawn over seeds and over groups of items, since the items of a group are right and wrong together. A setting's speed-up
is the mean over the results, with the lowest and the highest.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from pathlib import Path
from statistics import mean

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.command_line import command_parser
from benchmarks.retrofit.task_scores import interval

NAMES = ("layerskip", "plain")


def main(arguments: list[str] | None = None) -> None:
    parser = command_parser("benchmarks.retrofit.task_seeds", __doc__)
    parser.add_argument("results", nargs="+", type=Path, help="folders of results, one a seed")
    folders = parser.parse_args(arguments).results
    try:
        gains, groups = read_gains(folders)
        report(folders, gains, groups)
    except (ValueError, OSError) as error:
        raise SystemExit(f"benchmarks.retrofit.task_seeds: {error}") from error


def read_gains(folders: list[Path]) -> tuple[np.ndarray, np.ndarray]:
    """Return, of each seed and item, right by layerskip less right by plain [S, N], and the item's group [N].

    Raises:
        ValueError: the results are not of the same items. FileNotFoundError: a folder has no answers.
    """
    right = [{name: read_answers(folder / f"answers_{name}.jsonl") for name in NAMES} for folder in folders]
    prompts = sorted(right[0]["plain"])
    for folder, answers in zip(folders, right, strict=True):
        if any(sorted(answers[name]) != prompts for name in NAMES):
            raise ValueError(f"{folder}: has not answered the same items as {folders[0]}")
    rows = [[answers["layerskip"][p][0] - answers["plain"][p][0] for p in prompts] for answers in right]
    groups = np.unique([right[0]["plain"][p][1] for p in prompts], return_inverse=True)[1]
    return np.array(rows), groups


def read_answers(path: Path) -> dict[str, tuple[int, str]]:
    """Return (1 where it is right, its group) by prompt."""
    rows = map(json.loads, path.read_text().splitlines())
    return {row["prompt"]: (int(row["right"]), row["group"]) for row in rows}


def report(folders: list[Path], gains: np.ndarray, groups: np.ndarray) -> None:
    """Print both tables."""
    console, tasks = Console(width=150), [json.loads((folder / "task.json").read_text()) for folder in folders]
    for name in NAMES:
        shares = [task["exact_match"][name] for task in tasks]
        console.print(f"exact match, {name}: {mean(shares):.4f} ({', '.join(f'{share:.4f}' for share in shares)})")
    low, high = interval(gains, groups)
    console.print(
        f"layerskip less plain: {gains.mean():+.4f}, 95 % interval {low:+.4f} to {high:+.4f} ({len(gains)} seeds, "
        f"{gains.shape[1]} items of {groups.max() + 1} groups)"
    )
    console.print(speed_table(tasks))


def speed_table(tasks: list[dict]) -> Table:
    """Return a table of the settings that every result has, the fastest first."""
    found = defaultdict(list)
    for task in tasks:
        for record in task["decoding"]:
            key = tuple(record[name] for name in ("model", "method", "draft", "exit_layer", "num_speculations"))
            found[key].append(record)
    table = Table("model", "method", "draft", "exit", "d", "over autoregressive", "acceptance", "mismatches")
    whole = {key: records for key, records in found.items() if len(records) == len(tasks)}
    for key, records in sorted(whole.items(), key=lambda item: -mean(r["over_autoregressive"] for r in item[1])):
        speeds = [record["over_autoregressive"] for record in records]
        rates = [record["acceptance_rate"] for record in records if record["acceptance_rate"] is not None]
        table.add_row(
            *("" if part is None else str(part) for part in key),
            f"{mean(speeds):.2f} ({min(speeds):.2f} to {max(speeds):.2f})",
            f"{mean(rates):.2f}" if rates else "",
            str(sum(record["mismatches"] for record in records)),
        )
    return table


if __name__ == "__main__":
    main(sys.argv[1:])
