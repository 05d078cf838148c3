"""A Settling as one HTML file that needs no network: settling.html with the numbers put in."""

from __future__ import annotations

import json
from importlib.resources import files

import matplotlib

from lskip.evaluation.layers.settling import Settling
from lskip.utils.untrusted import printable

_PLACE = "__SETTLING__"


def settling_page(settling: Settling, spellings: dict[int, str], title: str) -> str:
    """The page: every token coloured by the layer at which its prediction settles, each layer's top tokens on hover.

    Args:
        spellings: of every token that is shown.
        title: what was read by which model.
    """
    template = files("lskip.evaluation.layers").joinpath("settling.html").read_text(encoding="utf-8")
    text = json.dumps(_content(settling, spellings, title), ensure_ascii=False, separators=(",", ":"))
    # Inside <script> only "<" can end it or change how it is read; in JSON it stands in strings alone.
    return template.replace(_PLACE, text.replace("<", "\\u003c"))


def token_ids(settling: Settling) -> list[int]:
    """Every token that the page shows."""
    return sorted({*settling.input_ids.tolist(), *settling.top_ids.flatten().tolist()})


def _content(settling: Settling, spellings: dict[int, str], title: str) -> dict:
    num_layers = len(settling.top_ids)
    first, *targets = settling.input_ids.tolist()
    settled, returns, loses = (part.tolist() for part in (settling.settled, settling.returns, settling.loses))
    tops = _tops(settling)
    columns = zip(targets, settled, returns, loses, tops, strict=True)
    names = ("id", "settled", "returns", "loses", "layers")
    return {
        "title": printable(title),
        "colors": layer_colors(num_layers),
        "spellings": spellings,
        "tokens": [{"id": first}, *(dict(zip(names, column, strict=True)) for column in columns)],
    }


def _tops(settling: Settling) -> list[list[dict]]:
    """For each position, for each layer: {"top": [[token, probability], …], "target": probability}."""
    ids, probabilities = settling.top_ids.transpose(0, 1).tolist(), settling.probabilities.transpose(0, 1).tolist()
    rows = zip(ids, probabilities, settling.target_probabilities.T.tolist(), strict=True)
    return [
        [
            {"top": [[token, _short(p)] for token, p in zip(tokens, shares, strict=True)], "target": _short(target)}
            for tokens, shares, target in zip(*row, strict=True)
        ]
        for row in rows
    ]


def _short(probability: float) -> float:
    return float(f"{probability:.3g}")


def layer_colors(num_layers: int) -> list[str]:
    """One colour a layer, from dark blue to yellow: the colour-blind see cividis as others do."""
    scale = matplotlib.colormaps["cividis"]
    return [matplotlib.colors.to_hex(scale(layer / max(num_layers - 1, 1))) for layer in range(num_layers)]
