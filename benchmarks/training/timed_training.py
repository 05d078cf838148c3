"""The model, the batch and the timed functions of the train-step benchmark."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from lskip.callbacks import EarlyExitLoss, LayerDropout
from lskip.curricula import Rotational
from lskip.layer_dropout import draw_dropped, run_kept_rows
from lskip.losses import head_loss
from lskip.models.scored import scored_positions
from lskip.module import LayerSkipModule
from lskip.schedules import Constant
from lskip.training.step_gradients import settle_gradients

PERIOD, STEP = 4, 1  # of 12 layers the exits 2, 6, 10 (1-based) are on, and the last


@dataclass(frozen=True)
class Sizes:
    """The model, the batch and how often each kind of step runs.

    Attributes:
        exit_rows: rows of each exit in the table by vocabulary.
        vocabularies: of that table; the plain loop is measured where all its logits fit into `plain_loop_bytes`.
    """

    layers: int = 12
    vocabulary: int = 8192
    hidden: int = 256
    intermediate: int = 768
    heads: int = 4
    batch: int = 16
    length: int = 256
    rounds: int = 5
    p_max: float = 0.5
    position_share: float = 0.125
    exit_rows: int = 2048
    exits: int = 4
    vocabularies: tuple[int, ...] = (4096, 8192, 32768, 131072)
    plain_loop_bytes: int = 2**30


QUICK = Sizes(
    vocabulary=512, hidden=32, intermediate=64, length=16, rounds=2, exit_rows=256, vocabularies=(512, 1024)
)  # fmt: skip


@dataclass(frozen=True)
class Kind:
    """A kind of step.

    Attributes:
        plain_loop: decode the exits one after the other, each with its logits and autograd.
    """

    dropout: bool = False
    exits: bool = False
    position_share: float = 1.0
    plain_loop: bool = False


def kinds_of_step(sizes: Sizes) -> dict[str, Kind]:
    return {
        "plain": Kind(),
        "dropout": Kind(dropout=True),
        "exits": Kind(exits=True),
        "exits and dropout": Kind(dropout=True, exits=True),
        "exits, sampled": Kind(exits=True, position_share=sizes.position_share),
        "exits, plain loop": Kind(exits=True, plain_loop=True),
    }


def model_config(sizes: Sizes) -> dict:
    return {
        "model_type": "llama",
        "vocab_size": sizes.vocabulary,
        "hidden_size": sizes.hidden,
        "intermediate_size": sizes.intermediate,
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": sizes.heads,
        "num_key_value_heads": sizes.heads,
        "max_position_embeddings": sizes.length,
        "tie_word_embeddings": True,
    }


class Trained:
    """A model in training: weights, optimizer and one batch, and the work that is timed."""

    def __init__(self, sizes: Sizes, device: torch.device):
        torch.manual_seed(0)
        self.sizes, self.device = sizes, device
        self.module = LayerSkipModule(model_config(sizes)).to(device)
        self.optimizer = torch.optim.AdamW(self.module.parameters(), lr=1e-4)
        self.ids = torch.randint(0, sizes.vocabulary, (sizes.batch, sizes.length), device=device)
        self.rates = LayerDropout(sizes.p_max, Constant()).drop_rates(STEP, None, sizes.layers)
        self.exit_weights = EarlyExitLoss(0.2, Rotational(PERIOD)).exit_weights(STEP, None, sizes.layers)

    def step(self, kind: Kind, micro_batch: int) -> None:
        """Forward, backward and the optimizer."""
        module, no_exits = self.module, [0.0] * (self.sizes.layers - 1) + [1.0]
        module.drop_rates.write(self, self.rates if kind.dropout else [0.0] * self.sizes.layers)
        module.exit_weights.write(self, self.exit_weights if kind.exits else no_exits)
        module.position_share = kind.position_share
        if kind.plain_loop:
            loss = self._plain_loop()
        else:
            loss, _ = module.early_exit_loss({"input_ids": self.ids}, micro_batch)
        loss.backward()
        if not kind.plain_loop:
            settle_gradients(module.optional_parts(), module.took_part)
            module.took_part.begin_step()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def _plain_loop(self) -> Tensor:
        decoder = self.module.decoder
        x, loss = decoder.embed(self.ids), 0.0
        inputs = decoder.block_inputs(x)
        for block, weight in enumerate(self.exit_weights):
            x = decoder.block(block, x, inputs)
            if weight > 0:
                logits = decoder.decode(x[:, :-1])
                loss = loss + weight * cross_entropy(logits.flatten(0, 1), self.ids[:, 1:].flatten())
        return loss

    def blocks(self, dropout: bool, micro_batch: int) -> None:
        """The blocks alone, forward and backward."""
        decoder = self.module.decoder
        x = start = decoder.embed(self.ids).detach().requires_grad_()
        inputs = decoder.block_inputs(x)
        for block, rate in enumerate(self.rates):
            dropped = draw_dropped(self.module.seed, micro_batch, block, len(x), rate if dropout else 0.0)
            x = run_kept_rows(partial(decoder.block, block), x, inputs, dropped)
        x.backward(start.detach())
        self.optimizer.zero_grad(set_to_none=True)

    def drop_rate(self, micro_batch: int) -> float:
        """The share of (sequence, block) pairs that this micro-batch drops."""
        draws = [
            draw_dropped(self.module.seed, micro_batch, block, self.sizes.batch, rate)
            for block, rate in enumerate(self.rates)
        ]
        return float(np.mean(draws))

    def head(self) -> None:
        """What one more exit must do at least: the head's loss and gradients on all scored rows."""
        positions, targets = scored_positions(self.ids, None)
        states = self.module.decoder.embed(self.ids).detach().flatten(0, 1)[positions].requires_grad_()
        weights = torch.ones(len(states), device=self.device)
        head_loss(states, self.module.decoder.head_weight, None, targets, weights)

    def flops(self) -> tuple[int, int]:
        """Multiplications and additions of (the blocks, the head), forward and backward."""
        sizes = self.sizes
        tokens = sizes.batch * sizes.length
        matrices = sum(p.numel() for p in self.module.model.model.layers.parameters() if p.ndim == 2)
        attention = 2 * tokens * sizes.length * sizes.hidden * sizes.layers  # causal: half of 2 products
        scored = sizes.batch * (sizes.length - 1)
        return 3 * (2 * tokens * matrices + attention), 3 * 2 * scored * sizes.hidden * sizes.vocabulary
