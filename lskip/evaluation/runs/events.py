"""The layer report of a run's last validation, read from its TensorBoard event files."""

from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.compat.tensorflow_stub import errors
from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import PyRecordReader_New

from lskip.models.readout import LayerReport
from lskip.utils.console import warn

_PERPLEXITY, _AGREEMENT, _NEEDED = "val/ppl/layer_", "val/agreement/layer_", "val/layers_needed"
_FILES = "events.out.tfevents.*"


def last_validation(folder: Path) -> tuple[int, LayerReport] | None:
    """Return (optimizer steps, report) of the last completely logged validation; None if there is none.

    Raises:
        ValueError: unreadable files, or curves that lskip did not log.
    """
    paths = sorted(folder.glob(_FILES))
    if not paths:
        return None
    for path in paths:
        _warn_if_damaged(path)
    # 0 keeps all values: a stopped run may have logged the last step for some layers only.
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    tags = [tag for tag in events.Tags()["scalars"] if tag.startswith((_PERPLEXITY, _AGREEMENT)) or tag == _NEEDED]
    curves = {tag: {event.step: event.value for event in events.Scalars(tag)} for tag in tags}
    if not any(tag.startswith(_PERPLEXITY) for tag in curves):
        return None
    return _report(folder, curves)


def _report(folder: Path, curves: dict[str, dict[int, float]]) -> tuple[int, LayerReport]:
    perplexities, agreements = (_by_layer(curves, start) for start in (_PERPLEXITY, _AGREEMENT))
    steps = set.intersection(*(set(curve) for curve in curves.values()))
    expected = list(range(1, len(perplexities) + 1))
    whole = _NEEDED in curves and expected and list(perplexities) == list(agreements) == expected
    if not whole or not steps:
        said = f"the values of {_PERPLEXITY}N, {_AGREEMENT}N (for N = 1, 2 …) and {_NEEDED} are not whole"
        raise ValueError(f"runs: '{folder}' was not logged by lskip: {said}")
    step = max(steps)
    perplexity, agreement = ([curve[step] for curve in found.values()] for found in (perplexities, agreements))
    needed = curves[_NEEDED][step]
    if min(perplexity) < 0 or min(agreement) < 0 or max(agreement) > 1 or needed < 0 or needed > len(expected):
        raise ValueError(f"runs: '{folder}' was not logged by lskip: perplexities below 0, or shares beyond 0 to 1")
    # Lightning logs the validation after step 1 as step 0.
    return step + 1, LayerReport(perplexity, agreement, needed)


def _by_layer(curves: dict[str, dict[int, float]], start: str) -> dict[int, dict[int, float]]:
    """Return {layer: curve}, in the order of the layers."""
    ends = {tag: tag.removeprefix(start) for tag in curves if tag.startswith(start)}
    layers = {int(end): tag for tag, end in ends.items() if end.isascii() and end.isdecimal() and len(end) < 9}
    return {layer: curves[layers[layer]] for layer in sorted(layers)}


def _warn_if_damaged(path: Path) -> None:
    """Warn if a file has a damaged record, after which TensorBoard's reader silently stops.

    A file that ends within a record passes: the run was killed or is not finished.
    """
    if not path.is_file():
        raise ValueError(f"runs: '{path}' is not a file")
    reader = PyRecordReader_New(str(path))
    try:
        while True:
            reader.GetNext()
    except errors.OutOfRangeError:
        pass
    except errors.DataLossError as error:
        if "crc32" in str(error):
            warn(f"runs: '{path}' is damaged: what was logged after that is not seen")
