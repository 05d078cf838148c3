"""The figure of quality against mean layers, and the table of thresholds."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Okabe and Ito's colours, told apart by colour-blind eyes too; shapes and dashes say the same once more.
LINES = {
    ("DeeBERT", "Entropy"): ("DeeBERT, entropy", "#D55E00", "s", "-"),
    ("BERxiT", "LearnedExit"): ("BERxiT, learned to exit", "#0072B2", "^", "-"),
    ("CALM", "Margin"): ("CALM, margin", "#009E73", "D", "-"),
    ("CALM", "Saturation"): ("CALM, saturation", "#009E73", "d", ":"),
    ("LayerSkip", "fixed"): ("LayerSkip, fixed exit", "#000000", "o", "--"),
    ("LayerSkip", "Margin"): ("LayerSkip, margin", "#CC79A7", "v", "-"),
    ("LayerSkip", "Saturation"): ("LayerSkip, saturation", "#CC79A7", ">", ":"),
}
EXTRA = ("DeeBERT", "fixed"), ("DeeBERT, fixed exit (no entropy here)", "#D55E00", "x", "--")
PANELS = {  # task -> title, what is drawn, its label, whether on a log scale
    "generation": ("Generation: held-out Python source", "perplexity", "perplexity (lower is better)", True),
    "classification": ("Classification: intent of a sentence", "accuracy", "accuracy (higher is better)", False),
    "regression": ("Regression: duration in a sentence", "error", "mean |error| of ln hours (lower is better)", True),
}
COLUMNS = ("task", "method", "criterion", "threshold", "mean_layers", "perplexity", "accuracy", "error")


def figure(records: list[dict]) -> Figure:
    """One panel a task that has records; records are rows of COLUMNS."""
    tasks = [task for task in PANELS if any(record["task"] == task for record in records)]
    drawing = Figure(figsize=(5.2 * len(tasks), 5.4), layout="constrained")
    handles = {}
    for axes, task in zip(drawing.subplots(1, len(tasks), squeeze=False)[0], tasks, strict=True):
        draw(axes, task, [record for record in records if record["task"] == task])
        handles |= {line.get_label(): line for line in axes.get_lines()}
    drawing.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, frameon=False)
    return drawing


def draw(axes: Axes, task: str, records: list[dict]) -> None:
    title, quality, label, log = PANELS[task]
    lines = dict([EXTRA]) | LINES if task == "regression" else LINES
    for (method, criterion), (name, colour, shape, dash) in lines.items():
        rows = [row for row in records if (row["method"], row["criterion"]) == (method, criterion)]
        points = sorted((row["mean_layers"], row[quality]) for row in rows)
        if points:
            style = {"color": colour, "marker": shape, "linestyle": dash, "markersize": 4, "linewidth": 1.3}
            axes.plot(*zip(*points, strict=True), label=name, **style)
    drafts = [row for row in records if row["method"] == "LayerSkip" and row["criterion"].startswith("self")]
    if drafts:
        best = min(drafts, key=lambda row: row["mean_layers"])
        style = {"color": "#000000", "marker": "*", "markersize": 13, "linestyle": "none"}
        axes.plot(best["mean_layers"], best[quality], label="LayerSkip, self-speculative", **style)
    axes.set(xlabel="mean layers (of a text or token)", ylabel=label, title=title)
    if log:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}")
        axes.tick_params(axis="y", which="minor", labelsize=7)
    axes.grid(which="both", alpha=0.3)
