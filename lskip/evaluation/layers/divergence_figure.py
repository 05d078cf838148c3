"""The table and the figure of a DivergenceReport."""

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from rich.console import Console

from lskip.evaluation.layers.divergence import DivergenceReport
from lskip.evaluation.layers.figure import drawn, scale_by_factors
from lskip.utils.console import plain_table

# Okabe and Ito's colour-blind safe palette; every line also has its own marker.
BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#6B6B6B"


def print_divergence(report: DivergenceReport, console: Console, title: str) -> None:
    """Print one row per layer, then the summary."""
    names = ("layer", "perplexity", "agreement", "accuracy", "entropy, nats", "settled at", "first right at")
    table = plain_table(*names, title=title)
    for row in report.layers():
        shares = (f"{row[name]:.1%}" for name in ("settled_at", "first_right_at"))
        measured = (f"{row['perplexity']:.4g}", f"{row['agreement']:.2f}", f"{row['accuracy']:.2f}")
        table.add_row(str(row["layer"]), *measured, f"{row['entropy']:.2f}", *shares)
    console.print(table)
    for line in summary(report):
        console.print(line, highlight=False, soft_wrap=True)


def summary(report: DivergenceReport) -> list[str]:
    """Return the mean depths and the savings of an ideal exit, in sentences."""
    layers = report.num_layers
    lines = [
        f"layers_needed {report.layers_needed:.1f} of {layers}: the mean depth from which on the prediction no longer "
        f"changes (it is first the last layer's at {report.first_agreeing_depth:.1f}); an exit there would save "
        f"{report.ideal_saving:.0%} of the layers"
    ]
    if report.first_right_depth is None:
        return [*lines, "no layer is ever right about the next token"]
    return [
        *lines,
        f"some layer is right about the next token at {report.ever_right:.0%} of the positions, there first at depth "
        f"{report.first_right_depth:.1f}; an exit there would save {report.ideal_saving_first_right:.0%} of theirs",
    ]


def divergence_figure(report: DivergenceReport, title: str) -> Figure:
    """Draw perplexity (log scale), agreement and accuracy, entropy, and the histogram of depths, each by layer."""
    figure = Figure(figsize=(10, 7), layout="constrained")
    figure.suptitle(drawn(title, 110))
    (perplexity, agreement), (entropy, depths) = figure.subplots(2, 2)
    layers = range(1, report.num_layers + 1)
    perplexity.plot(layers, report.perplexity, color=BLUE, marker="o", markersize=4)
    perplexity.set(title="Perplexity", ylabel="perplexity (log scale)")
    scale_by_factors(perplexity)
    _draw_agreement(agreement, report)
    entropy.plot(layers, report.entropy, color=BLUE, marker="o", markersize=4)
    entropy.set(title="Entropy of the layer's distribution", ylabel="mean entropy (nats)", ylim=(0, None))
    _draw_depths(depths, report)
    for axes in (perplexity, agreement, entropy, depths):
        axes.set(xlabel="layer", xlim=(0.4, report.num_layers + 0.6))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
    return figure


def _draw_agreement(axes: Axes, report: DivergenceReport) -> None:
    layers = range(1, report.num_layers + 1)
    lines = (("the last layer's prediction (agreement)", report.agreement, BLUE, "o"),)
    lines += (("the token that follows (accuracy)", report.accuracy, ORANGE, "s"),)
    for label, shares, color, marker in lines:
        axes.plot(layers, shares, color=color, marker=marker, markersize=4, label=label)
    axes.set(title="How often the layer's prediction is …", ylabel="share of positions", ylim=(0, 1.03))
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.legend(loc="upper left", framealpha=1)


def _draw_depths(axes: Axes, report: DivergenceReport) -> None:
    layers = range(1, report.num_layers + 1)
    axes.bar(layers, report.settled_at, color=BLUE, alpha=0.85, width=0.8, label="settles (layers needed)")
    label = f"is first right ({report.ever_right:.0%} ever are)"
    axes.plot(layers, report.first_right_at, color=ORANGE, marker="s", markersize=4, label=label)
    mean, saving = report.layers_needed, report.ideal_saving
    label = f"mean layers needed {mean:.1f}: {saving:.0%} would be saved"
    axes.axvline(mean, color=GREY, linestyle="--", label=label)
    axes.set(title="Layer at which a prediction …", ylabel="share of positions")
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.legend(loc="upper left", framealpha=1)
