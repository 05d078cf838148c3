"""`lskip compare`: runs side by side."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table

from lskip.evaluation.run_summary import RunSummary, read_run
from lskip.layer_figure import perplexity_figure

IMAGES = (".png", ".svg", ".pdf")


def compare(runs: list[str], /, figure: str = "compare.png") -> None:
    """Print runs side by side, and draw their perplexity by depth in one figure.

    Args:
        runs: run folders of `lskip fit`.
        figure: image file to write.
    """
    path = _image(Path(figure))
    summaries = {name: read_run(Path(folder).expanduser()) for name, folder in zip(_names(runs), runs, strict=True)}
    Console().print(runs_table(summaries))
    perplexity_figure({name: summary.report for name, summary in summaries.items()}).savefig(path, dpi=150)
    print(f"figure: {path}")


def runs_table(summaries: dict[str, RunSummary]) -> Table:
    """One column a run: how it was trained, and its last and middle layer."""
    table = Table(title="Runs", title_justify="left")
    table.add_column("")
    for name in summaries:
        table.add_column(name, justify="right")
    described = [_describe(summary) for summary in summaries.values()]
    for row in described[0]:
        table.add_row(row, *(cells[row] for cells in described))
    return table


def _image(path: Path) -> Path:
    if path.suffix not in IMAGES:
        raise ValueError(f"figure: '{path}' does not end in one of {', '.join(IMAGES)}")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"figure: there is no folder '{path.parent}'")
    return path


def _describe(summary: RunSummary) -> dict[str, str]:
    report, middle = summary.report, summary.middle_layer
    return {
        "curriculum": _method(summary, "early_exit_loss", "curriculum", "curriculum.period"),
        "e_scale": _method(summary, "early_exit_loss", "e_scale"),
        "dropout p_max": _method(summary, "layer_dropout", "p_max"),
        "dropout depth, time": _method(summary, "layer_dropout", "depth", "time"),
        "data": Path(str(summary.settings.get("data.source", "?"))).name,
        "steps": "?" if summary.steps is None else str(summary.steps),
        "last layer's perplexity": f"{report.perplexity[-1]:.4g}",
        "middle layer's perplexity": f"{report.perplexity[middle - 1]:.4g} (layer {middle})",
        "middle layer's agreement": f"{report.agreement[middle - 1]:.2f}",
        "layers_needed": f"{report.layers_needed:.1f} of {len(report.perplexity)}",
    }


def _method(summary: RunSummary, method: str, *arguments: str) -> str:
    """Arguments of a method that a run was trained with; - where it was trained without."""
    if not summary.settings:
        return "?"
    given = [summary.settings.get(f"{method}.{argument}") for argument in arguments]
    return " ".join(str(value) for value in given if value is not None) or "-"


def _names(runs: list[str]) -> list[str]:
    """The folders' own names where they tell the runs apart, else their paths."""
    paths = [Path(run) for run in runs]
    if len(set(paths)) < len(paths):
        raise ValueError(f"runs: one is named twice: {', '.join(runs)}")
    names = [path.resolve().name for path in paths]
    return names if len(set(names)) == len(names) else [str(path) for path in paths]
