"""The figure of a sweep: speed-up over exit_layer and num_speculations."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lskip.evaluation.layers.figure import drawn

COLORS = "cividis"  # legible with red-green colour blindness
LINES = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")  # Okabe and Ito
LEVELS = 12
MARKS = "osD^vP"

Records = Sequence[dict[str, Any]]


def sweep_figure(task: str, model: str, records: Records) -> Figure:
    """Return a map for each draft with two exit layers or more, and lines over num_speculations for all others."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for record in records:
        groups.setdefault((record["draft"], record["policy"]), []).append(record)
    maps = {name: group for name, group in groups.items() if is_map(group)}
    lines = {name: group for name, group in groups.items() if name not in maps}
    count = len(maps) + bool(lines)
    figure = Figure(figsize=(1 + 4.6 * count, 4.2), layout="constrained")
    panels = list(figure.subplots(1, count, squeeze=False)[0])
    speedups = [record["times"]["speedup"] for record in records]
    known = [speedup for speedup in speedups if math.isfinite(speedup)] or [1.0]
    levels = np.linspace(math.floor(min(known) * 20) / 20, math.ceil(max(known) * 20 + 1e-9) / 20 + 0.01, LEVELS)
    shown = None
    for axes, (name, group) in zip(panels, maps.items(), strict=False):
        shown = draw_map(axes, group, levels, max(known))
        axes.set_title(title_of(*name), fontsize=10)
    if shown is not None:
        figure.colorbar(shown, ax=panels[: len(maps)], label="speed-up over autoregressive", format="%.2f")
    if lines:
        draw_lines(panels[-1], lines)
    figure.suptitle(f"{drawn(model)} on {drawn(task)}", fontsize=11)
    return figure


def title_of(draft: str, policy: str) -> str:
    return f"draft {draft}" if policy == "FixedDraft" else f"draft {draft}, {policy}"


def is_map(group: Records) -> bool:
    """Return whether exit_layer and num_speculations both vary."""
    exits = {record["exit_layer"] for record in group}
    return None not in exits and len(exits) > 1 and len({record["num_speculations"] for record in group}) > 1


def draw_map(axes: Axes, group: Records, levels: np.ndarray, best: float):
    """Draw contours over the grid, each cell's value at its place, the best of all cells framed."""
    exits = sorted({record["exit_layer"] for record in group})
    counts = sorted({record["num_speculations"] for record in group})
    found = {(r["exit_layer"], r["num_speculations"]): r["times"]["speedup"] for r in group}
    table = np.array([[found.get((exit_layer, count), math.nan) for count in counts] for exit_layer in exits])
    table = np.ma.masked_invalid(table)  # no time could be measured there
    shown = axes.contourf(counts, exits, table, levels=levels, cmap=COLORS)
    if table.min() < 1 < table.max():
        axes.contour(counts, exits, table, levels=[1.0], colors="white", linewidths=1.5, linestyles="--")
    for (exit_layer, count), speedup in found.items():
        frame = {"boxstyle": "round", "fc": "white", "ec": "black" if speedup == best else "none", "alpha": 0.85}
        weight = "bold" if speedup == best else "normal"
        axes.text(count, exit_layer, f"{speedup:.2f}", ha="center", va="center", fontsize=8, bbox=frame, weight=weight)
    axes.set(xlabel="num_speculations", ylabel="exit_layer", xticks=counts, yticks=exits)
    axes.use_sticky_edges = False  # otherwise the values at the edges lie over the ticks
    axes.margins(0.12)
    return shown


def draw_lines(axes: Axes, lines: dict[tuple[str, str], Records]) -> None:
    for number, (name, group) in enumerate(lines.items()):
        by_exit: dict[int | None, list[tuple[int, float]]] = {}
        for record in group:
            point = record["num_speculations"], record["times"]["speedup"]
            by_exit.setdefault(record["exit_layer"], []).append(point)
        for turn, (exit_layer, points) in enumerate(by_exit.items()):
            label = title_of(*name) + ("" if exit_layer is None else f", exit_layer {exit_layer}")
            style = {"color": LINES[(number + turn) % len(LINES)], "marker": MARKS[(number + turn) % len(MARKS)]}
            axes.plot(*zip(*sorted(points), strict=True), label=label, **style)
    axes.axhline(1, color="black", linewidth=0.8, linestyle="--")
    axes.set(xlabel="num_speculations", ylabel="speed-up over autoregressive")
    counts = sorted({record["num_speculations"] for group in lines.values() for record in group})
    axes.set_xticks(counts)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
