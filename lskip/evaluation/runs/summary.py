"""The summary of a run, read from its folder: settings, steps, and the layer report of its last validation."""

import shlex
from dataclasses import dataclass
from pathlib import Path

from lskip.evaluation.runs.events import last_validation
from lskip.evaluation.runs.settings import run_settings
from lskip.models.pretrained import LAST_CHECKPOINT, read_checkpoint
from lskip.models.readout import LayerReport
from lskip.utils.untrusted import parse_yaml, read_text


@dataclass(frozen=True)
class RunSummary:
    """Settings, steps and layer report of a run.

    Attributes:
        settings: of run_settings, with the data that the report is on; empty without config.yaml.
        steps: optimizer steps before the last validation; None: unknown.
        report: of that validation.
        trained: optimizer steps of the checkpoint; None: unknown.
    """

    settings: dict[str, str | float | int | bool]
    steps: int | None
    report: LayerReport
    trained: int | None = None

    @property
    def middle_layer(self) -> int:
        """Half the layers, rounded up; 1-based."""
        return (len(self.report.perplexity) + 1) // 2


def read_run(folder: Path) -> RunSummary:
    """Return the summary of the run in `folder`, of its last validation in training, else of its last `lskip validate`.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: no validation is logged there.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"runs: there is no folder '{folder}'")
    settings = _settings(folder / "config.yaml")
    if (measured := last_validation(folder)) is not None:
        return RunSummary(settings, *measured, trained=steps_of(folder))
    if (measured := last_validation(folder / "validate")) is not None:
        steps, report = measured
        of_before = steps == 1  # lskip logged every `lskip validate` as that of the first step
        read = _with_data_of(settings, folder / "validate")
        return RunSummary(read, None if of_before else steps, report, trained=steps_of(folder))
    command = f"lskip validate --model {shlex.quote(str(folder))}"
    raise ValueError(f"runs: '{folder}' has no numbers of its layers; this makes them: {command}")


def _with_data_of(settings: dict, folder: Path) -> dict:
    """Return the settings with the data that `lskip validate` read in place of the run's."""
    read = {key: value for key, value in _settings(folder / "config.yaml").items() if key.startswith("data.")}
    if not settings or not read:
        return settings
    return {key: value for key, value in settings.items() if not key.startswith("data.")} | read


def _settings(path: Path) -> dict[str, str | float | int | bool]:
    if not path.is_file():
        return {}
    config = parse_yaml(read_text(path, "runs"), f"runs: '{path}'")
    if not isinstance(config, dict):
        raise ValueError(f"runs: '{path}' is not the config of a run")
    return run_settings(config)


def steps_of(folder: Path) -> int | None:
    """Return the optimizer steps of a run's checkpoint; None if it cannot be read."""
    path = folder / LAST_CHECKPOINT
    if not path.is_file():
        return None
    try:
        return int(read_checkpoint(path)["global_step"])
    except ValueError:
        return None
