"""Figures of the claims benchmark, with colour-blind safe markers and perplexity on a log scale."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator

# Okabe and Ito; a mark and a line style each, so that grey print works too.
STYLES = [("#0072B2", "o", "-"), ("#D55E00", "s", "--"), ("#009E73", "^", "-."), ("#CC79A7", "D", ":")]


def _axes(title: str, x: str, y: str, **more) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(6.5, 4.2), layout="constrained")
    axes = figure.subplots()
    axes.set(title=title, xlabel=x, ylabel=y, **more)
    axes.grid(alpha=0.3, which="both")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if axes.get_yscale() == "log":
        axes.yaxis.set_minor_locator(LogLocator(subs=(2, 3, 5, 7)))  # more would print over each other
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}")
    return figure, axes


def _draw(axes: Axes, values: Sequence[Sequence[float]], label: str, style: tuple[str, str, str]) -> None:
    """Mean over seeds by layer, with standard errors."""
    array = np.array(values)
    error = array.std(0, ddof=1) / math.sqrt(len(array)) if len(array) > 1 else None
    color, marker, line = style
    layers = range(1, array.shape[1] + 1)
    axes.errorbar(layers, array.mean(0), error, label=label, color=color, marker=marker, linestyle=line, capsize=3)


def by_depth(curves: Mapping[str, list[list[float]]]) -> Figure:
    """Perplexity against layer, a line for each arm: arm -> seeds -> loss of every layer in nats."""
    figure, axes = _axes("Perplexity by depth", "layer", "perplexity, held-out", yscale="log")
    for (name, seeds), style in zip(curves.items(), STYLES, strict=True):
        _draw(axes, np.exp(seeds), name, style)
    axes.legend()
    return figure


def over_time(readings: list[dict]) -> Figure:
    """Perplexity of a quarter, half, three quarters and all of the layers while plain training goes on."""
    figure, axes = _axes("Plain training", "optimizer step", "perplexity, held-out", yscale="log")
    layers = len(readings[0]["loss"])
    shown = [max(layers * part // 4, 1) for part in (1, 2, 3, 4)]
    steps = [reading["step"] for reading in readings]
    for layer, (color, marker, line) in zip(shown, STYLES, strict=True):
        perplexity = [math.exp(reading["loss"][layer - 1]) for reading in readings]
        axes.plot(steps, perplexity, label=f"layer {layer}", color=color, marker=marker, linestyle=line, markersize=4)
    axes.legend()
    return figure


def kept_by_depth(kept: Mapping[str, list[list[float]]]) -> Figure:
    """What each exit keeps of the last layer's score, a line for each task."""
    figure, axes = _axes("Score of an exit against the last layer's", "layer", "share kept above chance")
    axes.axhline(0, color="black", linewidth=0.8)
    for (name, seeds), style in zip(kept.items(), STYLES, strict=False):
        _draw(axes, seeds, name, style)
    axes.legend()
    return figure
