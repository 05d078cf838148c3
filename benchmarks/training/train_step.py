"""Time and memory of a training step: savings of layer dropout, and costs of early exits.

    python -m benchmarks.training.train_step [--quick] [--output result.json] [--threads 2] [--device cpu]
    python -m benchmarks.training.train_step --batch 1 --rounds 200 --kinds plain,dropout

All kinds of step run interleaved in one process; a time ratio is the median over the rounds of the ratio to the
plain step of the same round. Beside it is the ratio of the means: with few rows a step drops all of a block or nothing,
and a median says little. With --kinds the table of those steps is all that is measured.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.command_line import command_parser
from benchmarks.environment import environment
from benchmarks.memory.exit_loss import measure_exit_loss
from benchmarks.memory.peak import peak_bytes, resident_bytes
from benchmarks.training.timed_training import QUICK, Sizes, Trained, kinds_of_step
from lskip.utils.output_files import write_json


def timed(work: Callable[[], None], device: torch.device) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def time_rounds(works: dict[str, Callable[[int], None]], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of each work in each round, after one round to warm up; every round starts with another one."""
    names, seconds = list(works), {name: [0.0] * rounds for name in works}
    for number in range(-1, rounds):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            taken = timed(partial(works[name], max(number, 0)), device)
            if number >= 0:
                seconds[name][number] = taken
    return seconds


def paired_ratio(seconds: dict[str, list[float]], name: str, base: str) -> float:
    return statistics.median(a / b for a, b in zip(seconds[name], seconds[base], strict=True))


def measure_steps(sizes: Sizes, device: torch.device, only: list[str] | None = None) -> dict:
    """Time and peak memory of every kind of step, and, of all of them, what dropout and exits should cost."""
    trained = Trained(sizes, device)
    kinds = {name: kind for name, kind in kinds_of_step(sizes).items() if only is None or name in only}
    works = {name: partial(trained.step, kind) for name, kind in kinds.items()}
    if only is None:
        works |= {"blocks": partial(trained.blocks, False), "blocks, dropout": partial(trained.blocks, True)}
        works["head"] = lambda micro_batch: trained.head()
    seconds = time_rounds(works, sizes.rounds, device)
    resident = resident_bytes(trained.module, trained.optimizer)
    peaks = {name: resident + peak_bytes(partial(works[name], 0), device) for name in kinds}
    steps = [
        {
            "step": name,
            "seconds": statistics.median(seconds[name]),
            "time_ratio": paired_ratio(seconds, name, "plain"),
            "mean_ratio": sum(seconds[name]) / sum(seconds["plain"]),
            "peak_bytes": peaks[name],
            "memory_ratio": peaks[name] / peaks["plain"],
        }
        for name in kinds
    ]
    if only is not None:
        return {"steps": steps}
    return {"steps": steps, "dropout": judge_dropout(trained, seconds), "exits": judge_exits(trained, seconds)}


def judge_dropout(trained: Trained, seconds: dict[str, list[float]]) -> dict:
    """Dropout at a mean rate r should save at least 0.8 r of the plain blocks' time."""
    rates = [trained.drop_rate(micro_batch) for micro_batch in range(trained.sizes.rounds)]
    pairs = zip(seconds["blocks, dropout"], seconds["blocks"], rates, strict=True)
    return {
        "mean_rate": statistics.mean(rates),
        "plain_blocks_seconds": statistics.median(seconds["blocks"]),
        "blocks_time_ratio": paired_ratio(seconds, "blocks, dropout", "blocks"),
        "target_ratio": 1 - 0.8 * statistics.mean(rates),
        "saved_share_of_rate": statistics.median((1 - ours / plain) / rate for ours, plain, rate in pairs if rate),
    }


def judge_exits(trained: Trained, seconds: dict[str, list[float]]) -> dict:
    """The extra exits should cost at most 1.15 times what the products with the head say."""
    blocks, head = trained.flops()
    extra = sum(weight > 0 for weight in trained.exit_weights[:-1])
    predicted = 1 + extra * head / (blocks + head)
    by_head = statistics.median(1 + extra * h / p for h, p in zip(seconds["head"], seconds["plain"], strict=True))
    measured, loop = (paired_ratio(seconds, name, "plain") for name in ("exits", "exits, plain loop"))
    return {
        "extra_exits": extra,
        "gigaflops_of_plain_step": (blocks + head) / 1e9,
        "gigaflops_of_extra_heads": extra * head / 1e9,
        "time_ratio": measured,
        "ratio_by_flops": predicted,
        "ratio_by_time_of_head": by_head,
        "measured_over_predicted": measured / predicted,
        "extra_measured_over_predicted": (measured - 1) / (predicted - 1),
        "plain_loop_over_predicted": loop / predicted,
        "plain_loop_extra_over_predicted": (loop - 1) / (predicted - 1),
    }


def run(sizes: Sizes, device: torch.device, only: list[str] | None = None) -> dict:
    """All figures, as written to --output."""
    result = {"environment": environment(device), "sizes": asdict(sizes), **measure_steps(sizes, device, only)}
    if only is not None:
        return result
    result["exit_loss_memory"] = [
        measure_exit_loss(vocabulary, sizes.hidden, sizes.exits, sizes.exit_rows, device, sizes.plain_loop_bytes)
        for vocabulary in sizes.vocabularies
    ]
    return result


def show(result: dict, console: Console) -> None:
    """The figures beside their targets."""
    console.print(", ".join(f"{name} {value}" for name, value in result["environment"].items()))
    console.print(", ".join(f"{name} {value}" for name, value in result["sizes"].items()))
    rows = [
        (
            s["step"],
            f"{s['seconds']:.3f}",
            f"{s['time_ratio']:.3f}",
            f"{s['mean_ratio']:.3f}",
            megabytes(s["peak_bytes"]),
            f"{s['memory_ratio']:.3f}",
        )
        for s in result["steps"]
    ]
    print_table(console, "Training step", STEP_COLUMNS, rows)
    if "dropout" not in result:
        return
    dropout, exits = result["dropout"], result["exits"]
    console.print(
        f"Dropout: plain blocks {dropout['plain_blocks_seconds']:.3f} s; at rate {dropout['mean_rate']:.3f} they take "
        f"{dropout['blocks_time_ratio']:.3f} of it (target {dropout['target_ratio']:.3f}), "
        f"{dropout['saved_share_of_rate']:.2f} r saved (target 0.80 r)"
    )
    console.print(
        f"{exits['extra_exits']} extra exits: {exits['gigaflops_of_extra_heads']:.3g} GFLOP on top of "
        f"{exits['gigaflops_of_plain_step']:.3g} say {exits['ratio_by_flops']:.3f}, the head's own time says "
        f"{exits['ratio_by_time_of_head']:.3f}, measured {exits['time_ratio']:.3f}"
    )
    console.print(
        f"  measured / predicted {exits['measured_over_predicted']:.3f} (target 1.15; plain loop "
        f"{exits['plain_loop_over_predicted']:.3f}); of the extra alone {exits['extra_measured_over_predicted']:.2f} "
        f"(plain loop {exits['plain_loop_extra_over_predicted']:.2f})"
    )
    rows = [
        (
            str(m["vocabulary"]),
            megabytes(m["head_loss_bytes"]),
            megabytes(m["plain_loop_bytes"]),
            megabytes(m["all_logits_bytes"]),
        )
        for m in result["exit_loss_memory"]
    ]
    title = f"Loss of {result['sizes']['exits']} exits of {result['sizes']['exit_rows']} rows"
    print_table(console, title, ("vocabulary", "head_loss, peak MB", "plain loop, peak MB", "all logits, MB"), rows)


STEP_COLUMNS = ("step", "seconds", "time / plain", "of the means", "peak MB", "peak / plain")


def megabytes(count: int | None) -> str:
    return "not run" if count is None else f"{count / 1e6:,.1f}"


def print_table(console: Console, title: str, columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    table = Table(*columns, title=title, title_justify="left")
    for column in table.columns[1:]:
        column.justify = "right"
    for row in rows:
        table.add_row(*row)
    console.print(table)


def main(arguments: list[str] | None = None) -> None:
    parser = command_parser("benchmarks.training.train_step", __doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it runs; its times say nothing")
    parser.add_argument("--output", type=Path, help="write the figures here as JSON")
    parser.add_argument("--batch", type=int, help="rows of a step")
    parser.add_argument("--rounds", type=int, help="steps of each kind")
    parser.add_argument(
        "--kinds", type=lambda text: ["plain", *text.split(",")], help="names in the table; default: all"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    options = parser.parse_args(arguments)
    for name in options.kinds or ():
        if name not in kinds_of_step(Sizes()):
            parser.error(f"kinds: {name!r} is not one of {', '.join(kinds_of_step(Sizes()))}")
    torch.set_num_threads(options.threads)
    given = {key: value for key, value in (("batch", options.batch), ("rounds", options.rounds)) if value}
    result = run(replace(QUICK if options.quick else Sizes(), **given), options.device, options.kinds)
    show(result, Console(width=120))
    if options.output is not None:
        write_json(options.output, result)


if __name__ == "__main__":
    main()
