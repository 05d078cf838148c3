"""The HTML page of a Settling: the template settling.html with its numbers, in one file without network access."""

import json
from importlib.resources import files

import matplotlib

from lskip.evaluation.layers.settling import Settling
from lskip.utils.untrusted import printable

_PLACE = "__SETTLING__"


def settling_page(settling: Settling, spellings: dict[int, str], title: str) -> str:
    """Return the page: tokens coloured by the layer at which their prediction settles, top tokens of layers on hover.

    Args:
        spellings: texts of all of token_ids(settling).
        title: of the page.
    """
    template = files("lskip.evaluation.layers").joinpath("settling.html").read_text(encoding="utf-8")
    text = json.dumps(_content(settling, spellings, title), ensure_ascii=False, separators=(",", ":"))
    # Only "<" could end the <script>; in JSON it occurs in strings only.
    return template.replace(_PLACE, text.replace("<", "\\u003c"))


def token_ids(settling: Settling) -> list[int]:
    """Return the ids of all tokens on the page, ascending."""
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
    """Return for each position and layer {"top": [[token, probability], …], "target": probability}."""
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
    """Return one colour per layer, from the colour-blind safe map cividis."""
    scale = matplotlib.colormaps["cividis"]
    return [matplotlib.colors.to_hex(scale(layer / max(num_layers - 1, 1))) for layer in range(num_layers)]
