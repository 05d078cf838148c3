"""Drafting with an exit adapter: how it is run, and what it knows of the texts under way."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lskip.inference.layers.kv_cache import KVCache
from lskip.inference.layers.layout_choice import choose_layouts
from lskip.inference.layers.linear import Plain, pack
from lskip.inference.layers.quantized import choose_draft_layouts
from lskip.inference.runners.fused_blocks import obstacle, sample_weights
from lskip.inference.runners.fused_runner import FusedRunner
from lskip.inference.runners.module_runner import ModuleRunner
from lskip.models.decoder import Decoder
from lskip.models.exit_adapter import ExitAdapter, side_by_side
from lskip.utils.devices import to_device

if TYPE_CHECKING:
    from lskip.inference.runners.base import ModelRunner


ROWS_THAT_WAIT = 32  # a pass over so many costs little more than over one; and where batches are uneven, not too much


class AdapterRunner:
    """An exit adapter made ready for decoding. It only drafts: where int8 works, its blocks and head are rounded.

    Attributes:
        shape: its AdapterShape.
        runner: runs its blocks, norm and head.
        token_ids: [W], the words that it knows; None: all.
    """

    def __init__(self, adapter: ExitAdapter, batch_size: int = 1):
        """Convert the weights, for so many texts at a time; `adapter` is left as it is."""
        self.shape, self.hidden_size = adapter.shape, adapter.join.out_features
        self.runner = build_adapter_runner(Decoder(adapter.body), batch_size)
        self.vocab_size = adapter.made_for["vocab_size"]
        self.token_ids = None if len(adapter.token_ids) == self.vocab_size else adapter.token_ids
        weight, bias = adapter.join.weight.detach(), adapter.join.bias.detach()
        # Not rounded: a row's one large number, for what goes straight through, would set the scale of all others.
        layouts = choose_layouts("auto", weight, lone_rows=batch_size == 1)
        self.join, self.join_dtype = pack(layouts, weight, bias), layouts[0].inner_dtype or weight.dtype

    def joined(self, exit_states: Tensor, last_states: Tensor | None) -> Tensor:
        """The input of its first block [A, n, D], from [A, n, D] each, as ExitAdapter.joined."""
        last_states = None if last_states is None else last_states.to(self.runner.dtype)
        rows = side_by_side(exit_states.to(self.runner.dtype), last_states).flatten(0, 1)
        return self.join(rows.to(self.join_dtype)).to(self.runner.dtype).view(exit_states.shape)

    def decode(self, x: Tensor) -> Tensor:
        """States of its last block [A, n, D] -> logits [A, n, V], -inf for words that it does not know."""
        logits = self.runner.decode(x)
        if self.token_ids is None:
            return logits
        everywhere = logits.new_full((*x.shape[:-1], self.vocab_size), float("-inf"))
        return everywhere.index_copy_(-1, self.token_ids, logits)

    @property
    def nbytes(self) -> int:
        """Bytes of all its weights."""
        return sum(self.runner.memory().values()) + self.join.nbytes


class AdapterSlots:
    """What an adapter knows of the texts in a batch's slots.

    Whatever drafts, it is shown every row that a text keeps (`observe`), so that it may draft at any time: row p of
    its own cache comes of the exit's state of token p and of the last layer's of token p-1. Rows wait until it drafts,
    when they go through its blocks with the drafted token, or until too many do: a round in which something else
    drafts, or nothing, pays next to nothing for the adapter.

    Attributes:
        cache: of its own blocks; its lengths are the rows that have been through them.
        waiting: per slot, the rows that have not.
        exits: [slots, ROWS_THAT_WAIT + 1, D], the exit's states of these.
        before: the same shape, the last layer's states, after the final norm, of the tokens before them, and behind
            them of the token before the pending one; zeros where there is none. None where the adapter joins none.
    """

    def __init__(
        self, adapter: AdapterRunner, cache: KVCache, waiting: list[int], exits: Tensor, before: Tensor | None = None
    ):
        self.adapter, self.cache, self.exit_layer = adapter, cache, adapter.shape.exit_layer
        self.waiting, self.exits, self.before = waiting, exits, before
        self.lengths, self.slot = cache.lengths, 0  # of these slots the first is so many behind the first in the lists

    @classmethod
    def beside(cls, model_cache: KVCache, adapter: AdapterRunner) -> AdapterSlots:
        """For the texts that the model has in `model_cache`, before there are any."""
        slots = len(model_cache.lengths)
        # Slots of which fewer rows wait go along with the others, beyond the ends of their texts.
        cache = adapter.runner.new_cache(slots, model_cache.cells + (ROWS_THAT_WAIT + 1 if slots > 1 else 0))
        shape = slots, ROWS_THAT_WAIT + 1, adapter.hidden_size
        exits = torch.zeros(shape, dtype=adapter.runner.dtype, device=adapter.runner.device)
        before = torch.zeros_like(exits) if adapter.shape.joins_last_state else None
        return cls(adapter, cache, [0] * slots, exits, before)

    def begin(self, slot: int) -> AdapterSlots:
        """A view of one slot's memory, for a new text."""
        part = slice(slot, slot + 1)
        self.lengths[slot] = self.waiting[slot] = 0
        before = None if self.before is None else self.before[part]
        if before is not None:
            before[:, 0] = 0
        view = AdapterSlots(self.adapter, self.cache.slot(slot), self.waiting, self.exits[part], before)
        view.lengths, view.slot = self.lengths, slot
        return view

    def observe(
        self, exit_states: Tensor, last_states: Tensor, starts: list[int], accepted: list[int] | None = None
    ) -> None:
        """Takes in what the model has run and the texts keep.

        Args:
            exit_states: [A, n, D] after `exit_layer` blocks; those of slot a stand from starts[a] on.
            last_states: [A, n, D] after the last block and the final norm.
            accepted: slot a keeps its first row and so many more; None: all.
        """
        kept = [exit_states.shape[1]] * len(starts) if accepted is None else [1 + count for count in accepted]
        rows = max(kept)  # where another slot keeps more, a slot's row lies beyond its text, to be written over
        if rows + max(self._waiting(len(starts))) > ROWS_THAT_WAIT:
            self._take_in(len(starts))
        if rows > ROWS_THAT_WAIT:
            self._pass_on(exit_states[:, :rows], last_states[:, :rows], kept)
            return
        for slot, count in enumerate(kept):
            first = self.waiting[self.slot + slot]
            self.exits[slot, first : first + rows] = exit_states[slot, :rows]
            if self.before is not None:
                self.before[slot, first + 1 : first + 1 + rows] = last_states[slot, :rows]
            self.waiting[self.slot + slot] += count

    def reader(self) -> Callable[[Tensor, list[int]], Tensor]:
        """Decodes a draft's exit states one after another: ([A, 1, D], starts) -> logits [A, 1, V].

        From the second on, its own state of the token before stands in for the last layer's.
        """
        adapter, x = self.adapter, None

        def decode(exit_states: Tensor, starts: list[int]) -> Tensor:
            nonlocal x
            if x is None:
                x = self._draft_first(exit_states)
            else:
                before = adapter.runner.norm(x) if adapter.shape.joins_last_state else None
                x = adapter.runner.run(
                    adapter.joined(exit_states, before), self.cache, starts, 0, adapter.shape.num_blocks
                )
            return adapter.decode(x)

        return decode

    def _draft_first(self, exit_states: Tensor) -> Tensor:
        """The pending tokens' states after its blocks [A, 1, D]; all that waits goes with them."""
        slots = len(exit_states)
        waiting = self._waiting(slots)
        device = exit_states.device
        places = torch.arange(slots, device=device), to_device(torch.tensor(waiting), device)
        self.exits[places] = exit_states[:, 0].to(self.exits.dtype)
        x = self._joined(slots, 1 + max(waiting))
        x = self.adapter.runner.run(x, self.cache, self._lengths(slots), 0, self.adapter.shape.num_blocks)
        self._have_taken_in(slots)
        return x[places][:, None]

    def _take_in(self, slots: int) -> None:
        """Nothing waits any more."""
        if rows := max(self._waiting(slots)):
            self._fill(self._joined(slots, rows))
            self._have_taken_in(slots)

    def _pass_on(self, exit_states: Tensor, last_states: Tensor, kept: list[int]) -> None:
        """Takes in rows that are too many to wait, where none does."""
        before = self.before
        if before is not None:
            before = torch.cat([before[: len(kept), :1], last_states[:, :-1].to(before.dtype)], 1)
        self._fill(self.adapter.joined(exit_states, before))
        for slot, count in enumerate(kept):
            self.lengths[self.slot + slot] += count
            if self.before is not None:
                self.before[slot, 0] = last_states[slot, count - 1]

    def _joined(self, slots: int, rows: int) -> Tensor:
        """The input of its first block for the first rows that wait [A, n, D]."""
        before = None if self.before is None else self.before[:slots, :rows]
        return self.adapter.joined(self.exits[:slots, :rows], before)

    def _fill(self, x: Tensor) -> None:
        """Through its blocks, the input of the first given [A, n, D]; what the last one would give nobody reads."""
        runner, top, starts = self.adapter.runner, self.adapter.shape.num_blocks - 1, self._lengths(len(x))
        runner.fill(runner.run(x, self.cache, starts, 0, top), self.cache, starts, top, top + 1)

    def _have_taken_in(self, slots: int) -> None:
        for slot, count in enumerate(self._waiting(slots)):
            if self.before is not None and count:
                self.before[slot, 0] = self.before[slot, count]
            self.lengths[self.slot + slot] += count
            self.waiting[self.slot + slot] = 0

    def _waiting(self, slots: int) -> list[int]:
        return self.waiting[self.slot : self.slot + slots]

    def _lengths(self, slots: int) -> list[int]:
        return self.lengths[self.slot : self.slot + slots]

    def move(self, source: int, target: int) -> None:
        """Gives slot `target`, whose text has ended, what slot `source` holds."""
        self.cache.move(source, target)
        self.waiting[target] = self.waiting[source]
        for states in (self.exits, self.before):
            if states is not None:
                states[target] = states[source]


def build_adapter_runner(decoder: Decoder, batch_size: int = 1) -> ModelRunner:
    """Return a runner of its blocks and head: FusedRunner, in int8 where that works here; else of the modules."""
    if obstacle(decoder) is not None:
        return ModuleRunner(decoder)
    try:
        layouts = choose_draft_layouts("int8", sample_weights(decoder), batch_size)
    except ValueError:  # this machine has no such kernels, or not for these matrices
        layouts = [Plain]
    runner = FusedRunner(decoder, layouts)
    # It never embeds a token, and would keep the head's original for that; one row is for those who time it.
    runner.embedding = runner.embedding[:1].clone()
    return runner
