"""A run in short: what it was asked to do, and every layer at its last validation, from the files that it left."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lskip.evaluation.run_settings import run_settings
from lskip.readout import LayerReport
from lskip.untrusted import parse_yaml, read_text

_PERPLEXITY, _AGREEMENT, _NEEDED = "val/ppl/", "val/agreement/", "val/layers_needed"


@dataclass(frozen=True)
class RunSummary:
    """One run.

    Attributes:
        settings: as run_settings; empty for a run that left no config.yaml.
        steps: optimizer steps before the last validation; None where it was made by `lskip validate`, which knows none.
        report: of that validation.
    """

    settings: dict[str, str | float | int | bool]
    steps: int | None
    report: LayerReport

    @property
    def middle_layer(self) -> int:
        """1-based, half the layers rounded up."""
        return (len(self.report.perplexity) + 1) // 2


def read_run(folder: Path) -> RunSummary:
    """The run in `folder`: its last validation while training, or else the last `lskip validate` with this run_folder.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: no validation has left numbers of its layers there.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"runs: there is no folder '{folder}'")
    settings = _settings(folder / "config.yaml")
    if (measured := _last_validation(folder)) is not None:
        return RunSummary(settings, *measured)
    if (measured := _last_validation(folder / "validate")) is not None:
        return RunSummary(settings, None, measured[1])
    command = f"lskip validate --model {folder}"
    raise ValueError(f"runs: '{folder}' has no numbers of its layers; this makes them: {command}")


def _settings(path: Path) -> dict[str, str | float | int | bool]:
    if not path.is_file():
        return {}
    config = parse_yaml(read_text(path, "runs"), f"runs: '{path}'")
    if not isinstance(config, dict):
        raise ValueError(f"runs: '{path}' is not the config of a run")
    return run_settings(config)


def _last_validation(folder: Path) -> tuple[int, LayerReport] | None:
    if not any(folder.glob("events.out.tfevents.*")):
        return None
    # One value of each curve: the last is always kept.
    events = EventAccumulator(str(folder), size_guidance={"scalars": 1}).Reload()
    curves = {tag: events.Scalars(tag)[-1] for tag in events.Tags()["scalars"]}
    perplexity, agreement = (_by_layer(curves, start) for start in (_PERPLEXITY, _AGREEMENT))
    if not perplexity:
        return None
    # Lightning counts from 0: what it validates after step 1 has the number 0.
    return curves[_NEEDED].step + 1, LayerReport(perplexity, agreement, curves[_NEEDED].value)


def _by_layer(curves: dict, start: str) -> list[float]:
    """Values of the curves whose names begin so, first layer to last (as numbers: 100 comes after 99)."""
    tags = sorted((tag for tag in curves if tag.startswith(start)), key=lambda tag: int(tag.rpartition("_")[2]))
    return [curves[tag].value for tag in tags]
