"""Drafting with an exit adapter: how it is run, and what it knows of the texts under way."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lskip.decoder import Decoder
from lskip.exit_adapter import ExitAdapter, side_by_side
from lskip.inference.cache import KVCache
from lskip.inference.form_choice import STEPS_AND_VERIFICATION, choose_form, fastest
from lskip.inference.lean_blocks import obstacle, sample_weights
from lskip.inference.lean_step import LeanStep
from lskip.inference.module_step import ModuleStep
from lskip.inference.quantized import DynamicInt8, Int8, obstacle_to_rounding
from lskip.inference.weights import Form, Plain

if TYPE_CHECKING:
    from lskip.inference.engine import Step


class AdapterStep:
    """An exit adapter made ready for decoding. It only drafts: where int8 works, its blocks and head are rounded.

    Attributes:
        shape: its AdapterShape.
        step: runs its blocks, norm and head.
        token_ids: [W], the words that it knows; None: all.
    """

    def __init__(self, adapter: ExitAdapter):
        """Converts the weights; `adapter` is left as it is."""
        self.shape, self.hidden_size = adapter.shape, adapter.join.out_features
        self.step = build_adapter_step(Decoder(adapter.body))
        self.vocab_size = adapter.made_for["vocab_size"]
        self.token_ids = None if len(adapter.token_ids) == self.vocab_size else adapter.token_ids
        weight, bias = adapter.join.weight.detach(), adapter.join.bias.detach()
        # Not rounded: a row's one large number, for what goes straight through, would set the scale of all others.
        form = choose_form("auto", [weight])
        self.join, self.join_dtype = form(weight, bias), form.inner_dtype or weight.dtype

    def joined(self, exit_states: Tensor, last_states: Tensor | None) -> Tensor:
        """The input of its first block [A, n, D], from [A, n, D] each, as ExitAdapter.joined."""
        last_states = None if last_states is None else last_states.to(self.step.dtype)
        rows = side_by_side(exit_states.to(self.step.dtype), last_states).flatten(0, 1)
        return self.join(rows.to(self.join_dtype)).to(self.step.dtype).view(exit_states.shape)

    def decode(self, x: Tensor) -> Tensor:
        """States of its last block [A, n, D] -> logits [A, n, V], -inf for words that it does not know."""
        logits = self.step.decode(x)
        if self.token_ids is None:
            return logits
        everywhere = logits.new_full((*x.shape[:-1], self.vocab_size), float("-inf"))
        return everywhere.index_copy_(-1, self.token_ids, logits)

    @property
    def nbytes(self) -> int:
        """Bytes of all its weights."""
        return sum(self.step.memory().values()) + self.join.nbytes


class AdapterLanes:
    """What an adapter knows of the texts in a batch's lanes.

    Whatever drafts, it is shown every row that a text keeps (`observe`), so that it may draft at any time: row p of
    its own cache comes of the exit's state of token p and of the last layer's of token p-1.

    Attributes:
        cache: of its own blocks, with the lengths of the model's.
        last: [lanes, 1, D], the last layer's state, after the final norm, of the token before each pending one; zeros
            where there is none. None where the adapter joins none.
    """

    def __init__(self, adapter: AdapterStep, cache: KVCache, last: Tensor | None):
        self.adapter, self.cache, self.last = adapter, cache, last
        self.exit_layer = adapter.shape.exit_layer

    @classmethod
    def beside(cls, model_cache: KVCache, adapter: AdapterStep) -> AdapterLanes:
        """For the texts that the model has in `model_cache`, before there are any."""
        lanes, dtype, device = len(model_cache.lengths), adapter.step.dtype, adapter.step.device
        cache = adapter.step.new_cache(lanes, model_cache.slots)
        cache.lengths = model_cache.lengths
        last = torch.zeros(lanes, 1, adapter.hidden_size, dtype=dtype, device=device)
        return cls(adapter, cache, last if adapter.shape.joins_last_state else None)

    def begin(self, lane: int) -> AdapterLanes:
        """A view of one lane's memory, for a new text."""
        last = None if self.last is None else self.last[lane : lane + 1].zero_()
        return AdapterLanes(self.adapter, self.cache.lane(lane), last)

    def observe(
        self, exit_states: Tensor, last_states: Tensor, starts: list[int], accepted: list[int] | None = None
    ) -> None:
        """Takes in what the model has run and the texts keep.

        Args:
            exit_states: [A, n, D] after `exit_layer` blocks; those of lane a stand from starts[a] on.
            last_states: [A, n, D] after the last block and the final norm.
            accepted: lane a keeps its first row and so many more; None: all.
        """
        accepted = [exit_states.shape[1] - 1] * len(starts) if accepted is None else accepted
        rows = 1 + max(accepted)  # where another lane keeps more, a lane's row lies beyond its text, to be written over
        before = None
        if self.last is not None:
            last, lanes = self.last[: len(starts)], torch.arange(len(starts))
            before = torch.cat([last, last_states[:, : rows - 1].to(last.dtype)], 1)
            last[:, 0] = last_states[lanes, accepted].to(last.dtype)
        x, top = self.adapter.joined(exit_states[:, :rows], before), self.adapter.shape.num_blocks - 1
        x = self.adapter.step.run(x, self.cache, starts, 0, top)
        self.adapter.step.fill(x, self.cache, starts, top, top + 1)  # nothing reads what the last block would give

    def reader(self) -> Callable[[Tensor, list[int]], Tensor]:
        """Decodes a draft's exit states one after another: ([A, 1, D], starts) -> logits [A, 1, V].

        From the second on, its own state of the token before stands in for the last layer's.
        """
        adapter, last = self.adapter, self.last

        def decode(exit_states: Tensor, starts: list[int]) -> Tensor:
            nonlocal last
            before = None if last is None else last[: len(starts)]
            x = adapter.joined(exit_states, before)
            x = adapter.step.run(x, self.cache, starts, 0, adapter.shape.num_blocks)
            last = None if last is None else adapter.step.norm(x)
            return adapter.decode(x)

        return decode

    def move(self, source: int, target: int) -> None:
        """Gives lane `target`, whose text has ended, what lane `source` holds."""
        self.cache.move(source, target)
        if self.last is not None:
            self.last[target] = self.last[source]


def build_adapter_step(decoder: Decoder) -> Step:
    """Its blocks and head: LeanStep, in int8 where that works here; else the modules themselves."""
    if obstacle(decoder) is not None:
        return ModuleStep(decoder)
    step = LeanStep(decoder, choose_adapter_form(sample_weights(decoder)))
    # It never embeds a token, and would keep the head's original for that; one row is for those who time it.
    step.embedding = step.embedding[:1].clone()
    return step


def choose_adapter_form(samples: list[Tensor]) -> Form:
    """The faster kind of int8 that works on all `samples` [out, in]; Plain where none does."""
    kinds = (DynamicInt8, Int8)
    usable = [kind for kind in kinds if all(obstacle_to_rounding(kind, sample) is None for sample in samples)]
    # It drafts a row at a time, and is shown all rows of a verification at once.
    return fastest(usable, samples, STEPS_AND_VERIFICATION) if usable else Plain
