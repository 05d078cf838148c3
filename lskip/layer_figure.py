"""A LayerReport for eyes: the table, and the figure of perplexity by depth."""

from __future__ import annotations

from collections.abc import Mapping

from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from lskip.readout import LayerReport


def print_layers(report: LayerReport, console: Console, title: str = "Layers") -> None:
    """Print one line a layer: perplexity, agreement with the last layer; then layers_needed."""
    table = Table(title=title, title_justify="left")
    for name in ("layer", "perplexity", "agreement"):
        table.add_column(name, justify="right")
    for row in report.layers():
        table.add_row(str(row["layer"]), f"{row['perplexity']:.4g}", f"{row['agreement']:.2f}")
    console.print(table)
    console.print(f"layers_needed: {report.layers_needed:.1f} of {len(report.perplexity)}")


def perplexity_figure(reports: Mapping[str, LayerReport]) -> Figure:
    """Perplexity (log scale) against layer, one line for each named report."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for name, report in reports.items():
        axes.plot(range(1, len(report.perplexity) + 1), report.perplexity, marker="o", markersize=3, label=name)
    axes.set(xlabel="layer", ylabel="perplexity", yscale="log", title="Perplexity by depth")
    axes.grid(alpha=0.3)
    axes.legend()
    return figure
