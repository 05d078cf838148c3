"""FLOPs of training, counted from what ran: the one account of `lskip plan` and of `train/mfu`."""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass, field

from torch import nn

from lskip.models.decoder import Decoder
from lskip.models.exit_heads import TrainedExits
from lskip.models.families import head_dim_of

# Of one device, dense products in bfloat16 or float16, by a part of its name; the makers' data sheets.
PEAKS = {
    "GB200": 2500e12,
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "GH200": 989e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
}
IN_16_BITS = ("bf16", "16-")  # beginnings of Lightning's names of precisions whose products run at that peak


def known_peak(device_name: str, precision: str) -> float | None:
    """Return the most FLOPs a second of a device, by its name, in a precision of Lightning's; None: not known here."""
    if not str(precision).startswith(IN_16_BITS):
        return None
    return next((peak for name, peak in PEAKS.items() if re.search(rf"\b{name}\b", device_name)), None)


@dataclass
class Work:
    """What training steps computed, in counts; means over a run need not be whole.

    Attributes:
        tokens: that were embedded.
        pairs: of a token and a token of its row, those that causal attention hides among them.
        block_tokens, block_pairs: the same of each block, of the sequences that it ran on.
        early_rows: decoded rows of exits but the last.
        last_rows: decoded rows of the last exit.
    """

    tokens: float = 0.0
    pairs: float = 0.0
    block_tokens: defaultdict[int, float] = field(default_factory=lambda: defaultdict(float))
    block_pairs: defaultdict[int, float] = field(default_factory=lambda: defaultdict(float))
    early_rows: float = 0.0
    last_rows: float = 0.0

    def embed(self, sequences: float, length: int) -> None:
        """Count sequences that enter the model."""
        self.tokens += sequences * length
        self.pairs += sequences * length**2

    def run(self, block: int, sequences: float, length: int) -> None:
        """Count sequences that a block runs on."""
        self.block_tokens[block] += sequences * length
        self.block_pairs[block] += sequences * length**2

    def decode(self, rows: float, last: bool) -> None:
        """Count decoded rows of the last exit, or of another."""
        if last:
            self.last_rows += rows
        else:
            self.early_rows += rows


@dataclass(frozen=True)
class TrainingFlops:
    """FLOPs of a model's parts, forward and backward: two for a multiplication and an addition.

    Only products count, as in torch.utils.flop_counter: matrices, and attention over all tokens of a row, those that a
    mask hides too. What gradient checkpointing computes again does not count, as in every MFU.

    Attributes:
        embed: of a token, before the first block (OPT's projection).
        blocks: of a token, of the matrices of each block.
        attention: of a pair of tokens, of each block.
        early_row, last_row: of a decoded row of an early exit, and of the last.
        teacher_token, teacher_pair: of the frozen copy that an anchor reads.
    """

    embed: float
    blocks: tuple[float, ...]
    attention: tuple[float, ...]
    early_row: float
    last_row: float
    teacher_token: float = 0.0
    teacher_pair: float = 0.0

    def of(self, work: Work) -> dict[str, float]:
        """Return the FLOPs of `work` by part: blocks, attention, exits (heads and logits), teacher."""
        return {
            "blocks": self.embed * work.tokens + sum(self.blocks[b] * n for b, n in work.block_tokens.items()),
            "attention": sum(self.attention[b] * n for b, n in work.block_pairs.items()),
            "exits": self.early_row * work.early_rows + self.last_row * work.last_rows,
            "teacher": self.teacher_token * work.tokens + self.teacher_pair * work.pairs,
        }


def training_flops(
    decoder: Decoder, exits: TrainedExits | None = None, self_teaching: bool = False, anchored: bool = False
) -> TrainingFlops:
    """Return the FLOPs of a model as it is trained: frozen weights, and what lies below all trained ones, cost less.

    Args:
        exits: its trained exits.
        self_teaching: each early exit's rows read the last layer's logits too.
        anchored: a frozen copy of the model reads all tokens, and its last layer's logits are computed.
    """
    trains = decoder.embedding.weight.requires_grad
    embed = _products(decoder.project_in, trains)
    width = decoder.config.num_attention_heads * head_dim_of(decoder.config)
    blocks, attention = [], []
    for block in decoder.blocks:
        trains = trains or any(part.requires_grad for part in block.parameters())
        blocks.append(_products(block, trains))
        attention.append(4 * width * (3 if trains else 1))  # q with k, weights with v; backward: twice that
    project = decoder.project_out
    logits = 2 * decoder.head_weight.numel()
    row = logits * (2 + decoder.head_weight.requires_grad) + _products(project, True)
    early = row + logits * self_teaching
    if exits is not None and exits.heads is not None:
        early += _products(exits.heads.maps[0], True) if len(exits.heads.maps) else 0
    if exits is not None and exits.classifier is not None:  # whether the exit is right: one more look at its logits
        early += logits + _forward(project)
        early += _forward(exits.heads.maps[0]) if exits.heads is not None and len(exits.heads.maps) else 0
    teacher = _forward(decoder.project_in) + sum(map(_forward, decoder.blocks)) if anchored else 0
    return TrainingFlops(
        embed,
        tuple(blocks),
        tuple(attention),
        early,
        row + (logits + _forward(project)) * anchored,
        teacher,
        4 * width * len(blocks) * anchored,
    )


def _forward(module: nn.Module | None) -> float:
    """Return the FLOPs of a module's matrices for one row, forward alone."""
    return 0 if module is None else sum(2 * each.numel() for each in module.parameters() if each.ndim == 2)


def _products(module: nn.Module | None, trains: bool) -> float:
    """Return the FLOPs of a module's matrices for one row, forward and backward.

    Args:
        trains: whether its input has a gradient, or one of its own weights trains.
    """
    if module is None:
        return 0
    matrices = [each for each in module.parameters() if each.ndim == 2]
    return sum(2 * each.numel() * (1 + trains + each.requires_grad) for each in matrices)
