"""Quality of every layer against the last one, and the layers that an ideal early exit would save."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from lskip.models.decoder import Decoder
from lskip.models.readout import first_depth, read_logits, settled_depth
from lskip.models.scored import scored_positions


@dataclass(frozen=True)
class DivergenceReport:
    """Measures of every layer on a text, each read through the final norm and the head.

    Lists have one entry per layer, shares are of all positions, depths count layers from 1.

    Attributes:
        positions: number of predicted tokens.
        perplexity: inf where it overflows a float.
        agreement: share where the layer's argmax is the last layer's.
        accuracy: share where the layer's argmax is the token that follows.
        entropy: mean entropy of the layer's distribution, in nats.
        settled_at: share whose argmax no longer changes from this layer on (layers_needed).
        first_agreeing_at: share where this is the first layer whose argmax is the last layer's.
        first_right_at: share where this is the first layer whose argmax is the token that follows.
    """

    positions: int
    perplexity: list[float]
    agreement: list[float]
    accuracy: list[float]
    entropy: list[float]
    settled_at: list[float]
    first_agreeing_at: list[float]
    first_right_at: list[float]

    @property
    def num_layers(self) -> int:
        return len(self.perplexity)

    @property
    def layers_needed(self) -> float:
        """Mean depth from which on the argmax no longer changes."""
        return _mean_depth(self.settled_at)

    @property
    def first_agreeing_depth(self) -> float:
        """Mean depth at which the argmax is first the last layer's. It may change again after that."""
        return _mean_depth(self.first_agreeing_at)

    @property
    def ever_right(self) -> float:
        """Share of positions where any layer's argmax is the token that follows."""
        return sum(self.first_right_at)

    @property
    def first_right_depth(self) -> float | None:
        """Mean depth at which the argmax is first the token that follows, where it ever is; None: nowhere."""
        return _mean_depth(self.first_right_at) / self.ever_right if self.ever_right else None

    @property
    def ideal_saving(self) -> float:
        """Share of all layers saved if each token exits at the depth where its prediction settles."""
        return 1 - self.layers_needed / self.num_layers

    @property
    def ideal_saving_first_right(self) -> float | None:
        """Share saved on positions that are ever right if each exits at the first right layer; None: there are none."""
        depth = self.first_right_depth
        return None if depth is None else 1 - depth / self.num_layers

    def layers(self) -> list[dict]:
        """Return one dict per layer, first to last, with "layer" and the attributes that are lists."""
        names = [name for name, value in vars(self).items() if isinstance(value, list)]
        columns = zip(*(getattr(self, name) for name in names), strict=True)
        return [{"layer": n, **dict(zip(names, row, strict=True))} for n, row in enumerate(columns, start=1)]

    def record(self) -> dict:
        """Return everything as plain types for JSON, with null for an infinite perplexity."""
        rows = [{**row, "perplexity": _finite(row["perplexity"])} for row in self.layers()]
        summary = ("layers_needed", "first_agreeing_depth", "first_right_depth", "ever_right")
        savings = ("ideal_saving", "ideal_saving_first_right")
        named = {name: getattr(self, name) for name in ("positions", "num_layers", *summary, *savings)}
        return {**named, "layers": rows}


def _mean_depth(shares: list[float]) -> float:
    return sum(depth * share for depth, share in enumerate(shares, start=1))


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


class _Tally(NamedTuple):
    """Sums over the positions of a batch, each [L]."""

    losses: Tensor
    agreeing: Tensor
    right: Tensor
    entropies: Tensor
    settled: Tensor
    first_agreeing: Tensor
    first_right: Tensor


@torch.inference_mode()
def report_divergence(decoder: Decoder, batches: Iterable[dict[str, Tensor]]) -> DivergenceReport:
    """Return the report on all layers, from one forward pass over each batch.

    Args:
        batches: {"input_ids", "labels"}, each [B, S]; labels are aligned with the inputs, -100 where not scored.

    Raises:
        ValueError: a loss is NaN, or nothing is scored.
    """
    tallies = [_tally(decoder, batch["input_ids"], batch["labels"]) for batch in batches]
    return _report(_Tally(*(torch.stack(parts).sum(0) for parts in zip(*tallies, strict=True))))


def require_numbers(values: Tensor, exits: Sequence[int]) -> None:
    """Raise ValueError, naming the exit, if `values` [exits, …] hold NaN: the argmax of NaN logits means nothing."""
    wrong = values.isnan().flatten(1).any(1).nonzero().flatten().tolist()
    if wrong:
        raise ValueError(
            f"model: what layer {exits[wrong[0]]} says is no number (NaN): damaged weights, or too small a dtype"
        )


def _tally(decoder: Decoder, input_ids: Tensor, labels: Tensor) -> _Tally:
    input_ids, labels = input_ids.to(decoder.device), labels.to(decoder.device)
    layers = range(1, decoder.num_layers + 1)
    losses, entropies, predictions = read_logits(decoder, input_ids, labels, layers, _measure)
    require_numbers(losses, layers)
    agree = predictions == predictions[-1]
    right = predictions == scored_positions(input_ids, labels)[1]
    # Summed in float64 on the CPU, since MPS has no float64.
    return _Tally(
        losses=losses.cpu().double().sum(1),
        agreeing=agree.sum(1).cpu(),
        right=right.sum(1).cpu(),
        entropies=entropies.cpu().double().sum(1),
        settled=_histogram(settled_depth(agree), len(agree)),
        first_agreeing=_histogram(first_depth(agree), len(agree)),
        first_right=_histogram(first_depth(right), len(agree)),
    )


def _measure(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return cross-entropy and entropy, both in nats, and the argmax of each row."""
    losses = cross_entropy(logits, targets, reduction="none")
    return losses, torch.special.entr(logits.softmax(-1)).sum(-1), logits.argmax(-1)


def _histogram(depths: Tensor, num_layers: int) -> Tensor:
    """Return how many positions have each depth, [L]; depth num_layers + 1 (never) is left out."""
    return torch.bincount(depths.cpu() - 1, minlength=num_layers + 1)[:num_layers]


def _report(tally: _Tally) -> DivergenceReport:
    positions = int(tally.settled.sum())
    if not positions:
        raise ValueError("data: no token of it is scored")
    shares = {name: (total.double() / positions).tolist() for name, total in tally._asdict().items()}
    return DivergenceReport(
        positions=positions,
        perplexity=[math.exp(loss) if loss < 709 else math.inf for loss in shares["losses"]],
        agreement=shares["agreeing"],
        accuracy=shares["right"],
        entropy=shares["entropies"],
        settled_at=shares["settled"],
        first_agreeing_at=shares["first_agreeing"],
        first_right_at=shares["first_right"],
    )
