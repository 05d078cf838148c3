"""What every layer said at a run's last validation, out of the event files that TensorBoard reads too."""

from __future__ import annotations

import sys
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.compat.tensorflow_stub import errors
from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import PyRecordReader_New

from lskip.models.readout import LayerReport
from lskip.utils.untrusted import printable

_PERPLEXITY, _AGREEMENT, _NEEDED = "val/ppl/layer_", "val/agreement/layer_", "val/layers_needed"
_FILES = "events.out.tfevents.*"


def last_validation(folder: Path) -> tuple[int, LayerReport] | None:
    """(optimizer steps before it, what it measured) of the last validation that is logged whole; None if there is none.

    Raises:
        ValueError: files that cannot be read, or curves that lskip does not log.
    """
    paths = sorted(folder.glob(_FILES))
    if not paths:
        return None
    for path in paths:
        _warn_if_damaged(path)
    # 0: all values, since a stopped run may have logged the last ones of some layers alone.
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
    # Lightning counts from 0: what it validates after step 1 has the number 0.
    return step + 1, LayerReport(perplexity, agreement, needed)


def _by_layer(curves: dict[str, dict[int, float]], start: str) -> dict[int, dict[int, float]]:
    """Layer -> its curve, first layer to last (as numbers: 100 comes after 99)."""
    ends = {tag: tag.removeprefix(start) for tag in curves if tag.startswith(start)}
    layers = {int(end): tag for tag, end in ends.items() if end.isascii() and end.isdecimal() and len(end) < 9}
    return {layer: curves[layers[layer]] for layer in sorted(layers)}


def _warn_if_damaged(path: Path) -> None:
    """Says of what follows a damaged record, which TensorBoard's reader leaves out in silence, that it is not seen.

    A file that ends within a record is no such thing: so does that of a run that was killed, or still goes on.
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
            said = "is damaged: what was logged after that is not seen"
            print(f"warning: runs: '{printable(str(path))}' {said}", file=sys.stderr)
