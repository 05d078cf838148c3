"""What every exit says about a text: losses and predictions, and the metric that sums them up by layer."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torchmetrics import Metric

from lskip.decoder import Decoder
from lskip.losses import rows_at_once


class Readout(NamedTuple):
    """Every exit on the same N scored positions.

    Attributes:
        losses: [exits, N], cross-entropy in nats, at least float32.
        predictions: [exits, N], the most probable token.
    """

    losses: Tensor
    predictions: Tensor


def scored_positions(input_ids: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor]:
    """Which states predict a scored token: (indices [N] into the B*S flattened positions, their targets [N]).

    Args:
        input_ids: [B, S].
        labels: [B, S] aligned with input_ids as in transformers, -100 where not scored; None: all are.
    """
    labels = input_ids if labels is None else labels
    targets = torch.full_like(labels, -100)
    targets[:, :-1] = labels[:, 1:]  # the state at s predicts token s + 1; the last predicts nothing known
    targets = targets.flatten()
    positions = (targets != -100).nonzero().squeeze(1)
    return positions, targets[positions]


def read_exits(decoder: Decoder, input_ids: Tensor, labels: Tensor | None, exits: Sequence[int]) -> Readout:
    """One pass through the blocks that decodes each exit as it goes by.

    Args:
        exits: exit layers, 1-based, ascending.

    Never more than a chunk of one exit's logits is alive.
    """
    positions, targets = scored_positions(input_ids, labels)
    wanted = {decoder.block_index(exit_layer) for exit_layer in exits}
    x = decoder.embed(input_ids)
    inputs = decoder.block_inputs(x)
    rows = []
    for block in range(max(wanted) + 1):
        x = decoder.block(block, x, inputs)
        if block in wanted:
            rows.append(_decode(decoder, x.flatten(0, 1)[positions], targets))
    losses, predictions = zip(*rows, strict=True)
    return Readout(torch.stack(losses), torch.stack(predictions))


def _decode(decoder: Decoder, states: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    losses, predictions = [], []
    step = rows_at_once(decoder.vocab_size)
    for start in range(0, len(states), step):
        logits = decoder.decode(states[start : start + step])
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        losses.append(cross_entropy(logits, targets[start : start + step], reduction="none"))
        predictions.append(logits.argmax(-1))
    if not losses:
        return states.new_empty(0, dtype=torch.float32), targets.new_empty(0)
    return torch.cat(losses), torch.cat(predictions)


class LayerReport(NamedTuple):
    """Every layer of a model on a text.

    Attributes:
        perplexity: one a layer; inf where it exceeds what a float holds.
        agreement: share of positions where the layer's argmax is the last layer's.
        layers_needed: mean depth (in layers) after which the argmax no longer changes.
    """

    perplexity: list[float]
    agreement: list[float]
    layers_needed: float

    def layers(self) -> list[dict]:
        """One record a layer, first to last: {"layer", "perplexity", "agreement"}."""
        rows = enumerate(zip(self.perplexity, self.agreement, strict=True), start=1)
        return [{"layer": n, "perplexity": ppl, "agreement": agree} for n, (ppl, agree) in rows]


class LayerReportMetric(Metric):
    """Accumulates readouts of all layers over batches and ranks into a LayerReport."""

    full_state_update = False

    def __init__(self, num_layers: int):
        super().__init__()
        # Counts are whole numbers, exact at any size; no float64, which Apple's GPUs lack.
        self.add_state("loss", torch.zeros(num_layers), dist_reduce_fx="sum")
        self.add_state("agree", torch.zeros(num_layers, dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("needed", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, readout: Readout) -> None:
        agree = readout.predictions == readout.predictions[-1]
        self.loss += readout.losses.sum(1)
        self.agree += agree.sum(1)
        self.needed += settled_depth(agree).sum()
        self.count += agree.shape[1]

    def compute(self) -> LayerReport:
        mean = (self.loss / self.count).tolist()
        return LayerReport(
            perplexity=[math.exp(loss) if loss < 709 else math.inf for loss in mean],
            agreement=(self.agree / self.count).tolist(),
            layers_needed=(self.needed / self.count).item(),
        )


def settled_depth(agree: Tensor) -> Tensor:
    """The depth (1-based) from which on every layer agrees with the last: bool [L, N] -> int [N]."""
    still_agreeing = agree.flip(0).cumprod(0)  # from the last layer down: 1 until the first disagreement
    return len(agree) + 1 - still_agreeing.sum(0)


@torch.inference_mode()
def report_layers(decoder: Decoder, batches: Iterable[Tensor]) -> LayerReport:
    """All layers of a model on a text, in one pass: batches of token ids [B, S] -> report."""
    metric = LayerReportMetric(decoder.num_layers).to(decoder.device)
    for input_ids in batches:
        layers = range(1, decoder.num_layers + 1)
        metric.update(read_exits(decoder, input_ids.to(decoder.device), None, layers))
    return metric.compute()
