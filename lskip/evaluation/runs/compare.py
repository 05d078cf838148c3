"""`lskip compare`: runs side by side."""

import math
from pathlib import Path
from typing import Any

from rich.table import Table

from lskip.evaluation.layers.figure import LONGEST, image_of, perplexity_figure
from lskip.evaluation.runs.summary import RunSummary, read_run
from lskip.models.readout import NUM_SPECULATIONS, LayerReport
from lskip.utils.console import plain_console, plain_table
from lskip.utils.output_files import check_output_file, write_bytes
from lskip.utils.user_paths import user_path

IMAGES = (".png", ".svg", ".pdf")
NOT_TOLD = "- (NaN)"  # what layers with NaN losses predict means nothing


def compare(runs: list[str], /, figure: str = "compare.png") -> None:
    """Print runs side by side, and draw their perplexity by depth in one figure.

    Args:
        runs: run folders of `lskip fit`.
        figure: image file to write.
    """
    path = _image(user_path(figure, "figure"))
    folders = [user_path(run, "runs") for run in runs]
    summaries = {name: read_run(folder) for name, folder in zip(_names(runs, folders), folders, strict=True)}
    console = plain_console()
    console.print(runs_table(summaries))
    drawing = perplexity_figure({name: summary.report for name, summary in summaries.items()})
    write_bytes(path, image_of(drawing, path.suffix[1:]))
    console.print(f"figure: {path}", soft_wrap=True)


def runs_table(summaries: dict[str, RunSummary]) -> Table:
    """Return a table with one column per run: its settings, and its last and middle layer."""
    table = plain_table("", *summaries, title="Runs", right=1)
    described = [_describe(summary) for summary in summaries.values()]
    for row in described[0]:
        table.add_row(row, *(_short(cells[row]) for cells in described))
    return table


def _short(cell: str) -> str:
    return cell if len(cell) <= LONGEST else f"{cell[: LONGEST - 1]}…"


def _image(path: Path) -> Path:
    if path.suffix not in IMAGES:
        raise ValueError(f"figure: '{path}' does not end in one of {', '.join(IMAGES)}")
    check_output_file(path, "figure")
    return path


def _describe(summary: RunSummary) -> dict[str, str]:
    report, middle = summary.report, summary.middle_layer
    told = not any(map(math.isnan, report.perplexity))
    return {
        "curriculum": _method(summary, "early_exit_loss", "curriculum", "curriculum.period"),
        "e_scale": _method(summary, "early_exit_loss", "e_scale"),
        "shares": _method(summary, "early_exit_loss", "shares"),
        "exit_target": str(summary.settings.get("exit_target", "?")),
        "dropout p_max": _method(summary, "layer_dropout", "p_max"),
        "dropout depth, time": _method(summary, "layer_dropout", "depth", "time"),
        "dropout scale_kept": _method(summary, "layer_dropout", "scale_kept"),
        "data": _source(summary.settings.get("data.source", "?")),
        "steps": _steps(summary),
        "last layer's perplexity": f"{report.perplexity[-1]:.4g}",
        "middle layer's perplexity": f"{report.perplexity[middle - 1]:.4g} (layer {middle})",
        "middle layer's agreement": f"{report.agreement[middle - 1]:.2f}" if told else NOT_TOLD,
        **{
            f"middle layer's tokens_per_round, d = {d}": _tokens_per_round(report, d, middle) if told else NOT_TOLD
            for d in NUM_SPECULATIONS
        },
        "layers_needed": f"{report.layers_needed:.1f} of {len(report.perplexity)}" if told else NOT_TOLD,
    }


def _source(source: Any) -> str:
    """Return the name of what a run was trained on; of several sources with their weights."""
    if not isinstance(source, list):
        return Path(str(source)).name
    entries = (each if isinstance(each, dict) else {"source": each} for each in source)
    return " + ".join(f"{each.get('weight', 1)} x {_source(each.get('source', '?'))}" for each in entries)


def _tokens_per_round(report: LayerReport, num_speculations: int, layer: int) -> str:
    """Return a layer's tokens per round; "-" if the run was validated before they were measured."""
    values = report.tokens_per_round.get(num_speculations)
    return "-" if values is None else f"{values[layer - 1]:.2f}"


def _steps(summary: RunSummary) -> str:
    """Return the steps at the last validation, and the run's steps if it went on after that."""
    if summary.steps is None:
        return "?"
    on = summary.trained is not None and summary.trained > summary.steps
    return f"{summary.steps} of {summary.trained}" if on else str(summary.steps)


def _method(summary: RunSummary, method: str, *arguments: str) -> str:
    """Return the arguments of a method in a run's settings; "-" if it was trained without, "?" if unknown."""
    if not summary.settings:
        return "?"
    given = [summary.settings.get(f"{method}.{argument}") for argument in arguments]
    return " ".join(str(value) for value in given if value is not None) or "-"


def _names(runs: list[str], folders: list[Path]) -> list[str]:
    """Return the names of the folders, or their paths if two have the same name."""
    paths = [folder.resolve() for folder in folders]
    if len(set(paths)) < len(paths):
        raise ValueError(f"runs: one is named twice: {', '.join(runs)}")
    names = [path.name for path in paths]
    return names if len(set(names)) == len(names) else runs
