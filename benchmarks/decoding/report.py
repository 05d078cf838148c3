"""The table and the figures of the decoding benchmark."""

from __future__ import annotations

from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from benchmarks.decoding.measuring import Measured, first_differences
from benchmarks.decoding.settings import Setting

COLUMNS = {
    "method": "method",
    "precision": "weights",
    "draft": "draft",
    "policy": "policy",
    "exit_layer": "E",
    "num_speculations": "d",
    "batch": "batch",
    "tokens_per_second": "tokens/s",
    "over_autoregressive": "over own\nautoregr.",
    "over_autoregressive_quartiles": "(middle\nhalf)",
    "over_generate": "over\ngenerate",
    "acceptance_rate": "accept-\nance_rate",
    "tokens_per_round": "tokens_\nper_round",
    "share_of_ideal": "share\nof ideal",
    "peak_mib": "peak\nMiB",
    "mismatches": "mis-\nmatches",
    "accepted_counts": "rounds that accepted 0, 1, …",
}


def print_records(records: list[dict], console: Console) -> None:
    table = Table(*COLUMNS.values(), title=f"Decoding with {records[0]['model']}", title_justify="left")
    for column in table.columns[4:-1]:
        column.justify = "right"
    for record in records:
        table.add_row(*(cell(record[key]) for key in COLUMNS))
    console.print(table)


def cell(value) -> str:
    if isinstance(value, dict):
        return " ".join(str(value.get(str(count), 0)) for count in range(max(map(int, value), default=-1) + 1))
    if isinstance(value, tuple):
        return "-".join(map(cell, value))
    if isinstance(value, float):
        return f"{value:.2f}" if value < 100 else f"{value:.0f}"
    return "" if value is None else str(value)


def print_differences(measured: Measured, reference: dict, precision: str, console: Console) -> None:
    """Where the texts of a setting leave those of `generate`; a fixed exit's are its own."""
    order = {prompt: number for number, prompt in enumerate(reference, start=1)}
    for setting in measured.runs:
        if setting.precision == precision and setting.method != "fixed_exit":
            found = first_differences(measured, setting, reference)
            if found:
                places = ", ".join(f"prompt {order[prompt]} from token {token + 1}" for prompt, token in found.items())
                console.print(f"{setting} differs from generate: {places}")


def best_of_each(records: list[dict], kind_of: tuple[str, ...], key: str) -> list[dict]:
    """Of the records that are alike in the fields `kind_of`, the one with the highest `key`."""
    best: dict[tuple, dict] = {}
    for record in records:
        if record[key] is not None:
            kind = tuple(record[field] for field in kind_of)
            if kind not in best or record[key] > best[kind][key]:
                best[kind] = record
    return list(best.values())


def speedup_figure(records: list[dict]) -> Figure:
    """Bars: tokens per second over transformers' `generate`, the best setting of each method."""
    best = best_of_each(records, ("method", "precision", "draft", "policy"), "over_generate")
    best.sort(key=lambda record: record["over_generate"])
    figure = Figure(figsize=(9, 1 + 0.28 * len(best)), layout="constrained")
    axes = figure.subplots()
    labels = [str(setting_of(record)) for record in best]
    bars = axes.barh(labels, [record["over_generate"] for record in best], color=[color(record) for record in best])
    axes.bar_label(bars, fmt="%.2f", padding=3)
    axes.margins(x=0.1)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xlabel(f"speed-up over transformers generate, {records[0]['model']}")
    return figure


def color(record: dict) -> str:
    if record["method"] == "fixed_exit":  # another text
        return "lightgray"
    if record["method"].startswith("hf_"):
        return "tab:orange"
    return "tab:green" if record["method"] == "llama_cpp" else "tab:blue"


def setting_of(record: dict) -> Setting:
    return Setting(**{name: record[name] for name in Setting.__dataclass_fields__})


def batch_figure(rates: dict[Setting, dict[int, tuple[float, float]]], model: str) -> Figure:
    """Lines: tokens per second against the batch, measured and as the cost model says.

    Args:
        rates: setting -> batch -> measured and predicted tokens per second.
    """
    figure = Figure(figsize=(8, 6), layout="constrained")
    axes = figure.subplots()
    for setting, points in rates.items():
        batches, values = zip(*sorted(points.items()), strict=True)
        measured, predicted = zip(*values, strict=True)
        (line,) = axes.plot(batches, measured, marker="o", label=str(setting))
        axes.plot(batches, predicted, linestyle="--", color=line.get_color())
    axes.set_xscale("log", base=2)
    ticks = sorted({batch for points in rates.values() for batch in points})
    axes.set_xticks(ticks, labels=map(str, ticks))
    axes.set_xlabel("batch")
    axes.set_ylabel("tokens per second after the prompts")
    axes.set_title(f"{model}; dashed: the cost model's prediction")
    figure.legend(loc="outside lower center")
    return figure
