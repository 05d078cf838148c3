"""Losses and predictions of every exit on a text, and the metric that aggregates them by layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torchmetrics import Metric

from lskip.losses import rows_at_once
from lskip.models.decoder import Decoder
from lskip.models.rounds import first_of_texts, round_starts
from lskip.models.scored import scored_positions

if TYPE_CHECKING:
    from lskip.models.exit_adapter import ExitAdapter
    from lskip.models.exit_heads import TrainedExits

LogitsReader = Callable[[Tensor, Tensor], tuple[Tensor, ...]]
NUM_SPECULATIONS = (4, 8)  # d, for which tokens per round are reported


class Readout(NamedTuple):
    """Losses and predictions of exits at the same N scored positions.

    Attributes:
        losses: [exits, N], cross-entropy in nats, at least float32.
        predictions: [exits, N], the argmax token.
        positions: [N], ascending, where they are in the flattened batch.
    """

    losses: Tensor
    predictions: Tensor
    positions: Tensor


def read_exits(
    decoder: Decoder,
    input_ids: Tensor,
    labels: Tensor | None,
    exits: Sequence[int],
    trained: TrainedExits | None = None,
    position_ids: Tensor | None = None,
) -> Readout:
    """Return losses and predictions of each exit, as `read_logits` with `score_logits`.

    Args:
        position_ids: [B, S], of rows of several documents (`Decoder.enter`); None: each row is one.
    """
    positions, targets = scored_positions(input_ids, labels)
    how = {"trained": trained, "position_ids": position_ids}
    return Readout(*read_positions(decoder, input_ids, positions, targets, exits, score_logits, **how), positions)


def score_logits(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return cross-entropy in nats [n] and argmax [n] of logits [n, V]."""
    return cross_entropy(logits, targets, reduction="none"), logits.argmax(-1)


def read_logits(
    decoder: Decoder,
    input_ids: Tensor,
    labels: Tensor | None,
    exits: Sequence[int],
    read: LogitsReader,
    trained: TrainedExits | None = None,
) -> list[Tensor]:
    """Return what `read` computes from the logits of each exit, in one pass through the blocks.

    At most one chunk of one exit's logits is in memory.

    Args:
        exits: exit layers, 1-based, ascending.
        read: (logits [n, V], at least float32; targets [n]) -> tensors [n, …].
        trained: exit heads, applied before norm and head.

    Returns:
        Each tensor of `read` for all exits and all N scored positions: [exits, N, …].
    """
    return read_positions(decoder, input_ids, *scored_positions(input_ids, labels), exits, read, trained)


def read_positions(
    decoder: Decoder,
    input_ids: Tensor,
    positions: Tensor,
    targets: Tensor,
    exits: Sequence[int],
    read: LogitsReader,
    trained: TrainedExits | None = None,
    adapter: ExitAdapter | None = None,
    position_ids: Tensor | None = None,
) -> list[Tensor]:
    """Return the same as `read_logits`, for given positions.

    Args:
        positions: [N] into the B*S flattened states, in any order, repeated or not.
        targets: [N], the token to score at each.
        adapter: its exit is read through it. It joins no last states, and knows all tokens.
        position_ids: as in `read_exits`; not with an adapter.
    """
    wanted = {decoder.block_index(exit_layer) for exit_layer in exits}
    x, inputs = decoder.enter(input_ids, position_ids)
    rows = []
    for block in range(max(wanted) + 1):
        x = decoder.block(block, x, inputs)
        if block in wanted and adapter is not None and block + 1 == adapter.shape.exit_layer:
            body, joined = Decoder(adapter.body), adapter.joined(x, None)
            states = adapter.run(joined, body.block_inputs(joined)).flatten(0, 1)[positions]
            rows.append(_read_in_chunks(body, states, targets, read))
        elif block in wanted:
            states = x.flatten(0, 1)[positions]
            states = states if trained is None else trained.translate(block + 1, states)
            rows.append(_read_in_chunks(decoder, states, targets, read))
    return [torch.stack(parts) for parts in zip(*rows, strict=True)]


def _read_in_chunks(decoder: Decoder, states: Tensor, targets: Tensor, read: LogitsReader) -> list[Tensor]:
    chunks = []
    step = rows_at_once(decoder.vocab_size, states.device)
    for start in range(0, max(len(states), 1), step):  # one empty chunk where nothing is scored
        logits = decoder.decode(states[start : start + step])
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        chunks.append(read(logits, targets[start : start + step]))
    return [torch.cat(parts) for parts in zip(*chunks, strict=True)]


class LayerReport(NamedTuple):
    """Perplexity, agreement and tokens per round of every layer of a model on a text.

    Attributes:
        perplexity: one for each layer; inf where it exceeds the range of a float.
        agreement: share of positions where the layer's argmax is the last layer's.
        layers_needed: mean depth (in layers) after which the argmax no longer changes.
        tokens_per_round: d -> one for each layer: what self-speculation would make of this text, if the layer drafted
            d tokens a round and the last one said what follows; empty where it was not measured.

    All are NaN where logits are NaN, whose argmax means nothing.
    """

    perplexity: list[float]
    agreement: list[float]
    layers_needed: float
    tokens_per_round: Mapping[int, list[float]] = MappingProxyType({})

    def layers(self) -> list[dict]:
        """Return {"layer", "perplexity", "agreement", "tokens_per_round_4", …} for each layer, first to last."""
        columns = {"perplexity": self.perplexity, "agreement": self.agreement}
        columns |= {f"tokens_per_round_{d}": values for d, values in self.tokens_per_round.items()}
        rows = enumerate(zip(*columns.values(), strict=True), start=1)
        return [{"layer": n, **dict(zip(columns, row, strict=True))} for n, row in rows]


class LayerReportMetric(Metric):
    """A metric that accumulates readouts of all layers, over batches and ranks, into a LayerReport."""

    full_state_update = False

    def __init__(self, num_layers: int):
        super().__init__()
        # Integer counts are exact at any size; Apple's GPUs lack float64.
        self.add_state("loss", torch.zeros(num_layers), dist_reduce_fx="sum")
        self.add_state("agree", torch.zeros(num_layers, dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("needed", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")
        rounds = torch.zeros(len(NUM_SPECULATIONS), num_layers, dtype=torch.long)
        self.add_state("rounds", rounds, dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, readout: Readout) -> None:
        agree = readout.predictions == readout.predictions[-1]
        self.loss += readout.losses.sum(1)
        self.agree += agree.sum(1)
        self.needed += settled_depth(agree).sum()
        first = first_of_texts(readout.positions)
        self.rounds += torch.stack([round_starts(agree, first, d).sum(1) for d in NUM_SPECULATIONS])
        self.count += agree.shape[1]

    def compute(self) -> LayerReport:
        mean, agreement = (self.loss / self.count).tolist(), (self.agree / self.count).tolist()
        unknown = [math.isnan(loss) for loss in mean]

        def known(values: list[float]) -> list[float]:
            return [math.nan if unknown[n] or unknown[-1] else value for n, value in enumerate(values)]

        return LayerReport(
            perplexity=[math.inf if loss > 709 else math.exp(loss) for loss in mean],
            agreement=known(agreement),
            layers_needed=math.nan if any(unknown) else (self.needed / self.count).item(),
            tokens_per_round=dict(zip(NUM_SPECULATIONS, map(known, (self.count / self.rounds).tolist()), strict=True)),
        )


def settled_depth(agree: Tensor) -> Tensor:
    """Return the depth [N] (1-based) from which on every layer agrees with the last, for bool [L, N]."""
    still_agreeing = agree.flip(0).cumprod(0)  # from the last layer down: 1 until the first disagreement
    return len(agree) + 1 - still_agreeing.sum(0)


def first_depth(hits: Tensor) -> Tensor:
    """Return the first depth [N] (1-based) that hits, L + 1 where none does, for bool [L, N]."""
    return 1 + (hits.cumsum(0) == 0).sum(0)


@torch.inference_mode()
def report_layers(decoder: Decoder, batches: Iterable[Tensor]) -> LayerReport:
    """Return the report of all layers on batches of token ids [B, S]."""
    metric = LayerReportMetric(decoder.num_layers).to(decoder.device)
    for input_ids in batches:
        layers = range(1, decoder.num_layers + 1)
        metric.update(read_exits(decoder, input_ids.to(decoder.device), None, layers))
    return metric.compute()
