"""The layer report of a run's last validation, read from its TensorBoard event files."""

from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.compat.tensorflow_stub import errors
from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import PyRecordReader_New

from lskip.models.readout import NUM_SPECULATIONS, LayerReport
from lskip.utils.console import warn

_PERPLEXITY, _AGREEMENT, _NEEDED = "val/ppl/layer_", "val/agreement/layer_", "val/layers_needed"
_ROUNDS = {d: f"val/tokens_per_round_{d}/layer_" for d in NUM_SPECULATIONS}  # older runs have none
_LAYERS = (_PERPLEXITY, _AGREEMENT, *_ROUNDS.values())
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
    tags = [tag for tag in events.Tags()["scalars"] if tag.startswith(_LAYERS) or tag == _NEEDED]
    curves = {tag: {event.step: event.value for event in events.Scalars(tag)} for tag in tags}
    if not any(tag.startswith(_PERPLEXITY) for tag in curves):
        return None
    return _report(folder, curves)


def _report(folder: Path, curves: dict[str, dict[int, float]]) -> tuple[int, LayerReport]:
    perplexities, agreements = (_by_layer(curves, start) for start in (_PERPLEXITY, _AGREEMENT))
    rounds = {d: found for d, start in _ROUNDS.items() if (found := _by_layer(curves, start))}
    steps = set.intersection(*(set(curve) for curve in curves.values()))
    expected = list(range(1, len(perplexities) + 1))
    whole = _NEEDED in curves and expected
    whole = whole and all(list(found) == expected for found in (perplexities, agreements, *rounds.values()))
    if not whole or not steps:
        said = f"the values of {_PERPLEXITY}N, {_AGREEMENT}N (for N = 1, 2 …) and {_NEEDED} are not whole"
        raise ValueError(f"runs: '{folder}' was not logged by lskip: {said}")
    step = max(steps)
    perplexity, agreement = (_at(step, found) for found in (perplexities, agreements))
    needed, tokens = curves[_NEEDED][step], {d: _at(step, found) for d, found in rounds.items()}
    if min(perplexity) < 0 or min(agreement) < 0 or max(agreement) > 1 or needed < 0 or needed > len(expected):
        raise ValueError(f"runs: '{folder}' was not logged by lskip: perplexities below 0, or shares beyond 0 to 1")
    if any(value < 1 or value > d + 1 for d, values in tokens.items() for value in values):
        raise ValueError(f"runs: '{folder}' was not logged by lskip: tokens per round beyond 1 to d + 1")
    # Lightning logs the validation after step 1 as step 0.
    return step + 1, LayerReport(perplexity, agreement, needed, tokens)


def _at(step: int, curves: dict[int, dict[int, float]]) -> list[float]:
    """Return the value of each layer's curve at a step."""
    return [curve[step] for curve in curves.values()]


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
