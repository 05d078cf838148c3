"""The table and the figure of a LayerReport, and functions that all figures share."""

import io
import warnings
from collections.abc import Mapping

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter
from rich.console import Console

from lskip.models.readout import LayerReport
from lskip.utils.console import plain_table
from lskip.utils.untrusted import printable

LONGEST = 60  # characters of a name in a figure


def print_layers(report: LayerReport, console: Console, title: str = "Layers") -> None:
    """Print one row per layer (perplexity, agreement with the last layer, tokens per round), then layers_needed."""
    rounds = [f"tokens_per_\nround, d = {d}" for d in report.tokens_per_round]
    table = plain_table("layer", "perplexity", "agreement", *rounds, title=title)
    for row in report.layers():
        layer, perplexity, *others = row.values()
        table.add_row(str(layer), f"{perplexity:.4g}", *(f"{value:.2f}" for value in others))
    console.print(table)
    console.print(f"layers_needed: {report.layers_needed:.1f} of {len(report.perplexity)}")


def perplexity_figure(reports: Mapping[str, LayerReport]) -> Figure:
    """Draw perplexity (log scale) by layer, one line for each named report."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for name, report in reports.items():
        layers = range(1, len(report.perplexity) + 1)
        axes.plot(layers, report.perplexity, marker="o", markersize=3, label=drawn(name))
    axes.set(xlabel="layer", ylabel="perplexity", title="Perplexity by depth")
    scale_by_factors(axes)
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def scale_by_factors(axes: Axes) -> None:
    """Make the y axis logarithmic, with labels between powers of ten if it spans only a few."""
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    between = (1, 1.5, 2, 3, 5, 7) if high < 20 * low else (1, 2, 5) if high < 1e5 * low else (1,)
    axes.yaxis.set_major_locator(LogLocator(subs=between))
    axes.yaxis.set_major_formatter(lambda value, position: f"{value:.12g}" if value < 1e6 else f"{value:.0e}")
    axes.yaxis.set_minor_formatter(NullFormatter())


def drawn(name: str, longest: int = LONGEST) -> str:
    """Return a name as matplotlib should draw it: $ (a formula) and a leading _ (no legend) are escaped."""
    shown = printable(name, keep="")
    shown = shown if len(shown) <= longest else f"{shown[: longest - 1]}…"
    shown = shown.replace("$", r"\$")
    return f" {shown}" if shown.startswith("_") else shown


def image_of(figure: Figure, kind: str = "png", dpi: int = 150) -> bytes:
    """Return the bytes of an image file of `figure`."""
    image = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")  # a name in a script that the font lacks
        figure.savefig(image, format=kind, dpi=dpi)
    return image.getvalue()
