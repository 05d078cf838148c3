"""Drafts of an exit adapter: a small trained module behind the model's first blocks (Kangaroo, arXiv 2404.18911)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lskip.inference.drafting.costs import Costs
from lskip.inference.drafting.draft import Draft
from lskip.inference.drafting.drafter import Available, Drafter, GoesOn, Runners
from lskip.inference.drafting.layers import draft_tokens
from lskip.inference.drafting.round import Chooser, Drafted, Slots
from lskip.inference.layers.kv_cache import KVCache
from lskip.inference.runners.adapter_runner import AdapterRunner
from lskip.utils.devices import to_device

ROWS_THAT_WAIT = 32  # a pass over so many costs little more than over one; and where batches are uneven, not too much


class AdapterDrafter(Drafter):
    """Drafts with the blocks under an exit and the exit adapter behind them."""

    kind = "adapter"
    needs = "exit_adapter"
    leaves_states = True

    def __init__(self, runners: Runners, slots: Slots):
        super().__init__(runners, slots)
        self.observer = AdapterSlots.beside(slots.cache, runners.adapter)

    @classmethod
    def drafts(cls, available: Available, exit_layer: int | None) -> list[Draft]:
        return [] if available.adapter_exit is None else [Draft(cls.kind, available.adapter_exit)]

    @classmethod
    def seconds(cls, draft: Draft, count: int, slots: int, costs: Costs) -> float:
        """Return what drafting takes with an adapter of A blocks, as Drafter.seconds.

        d (E block(B) + head_a(B)) + A (block_a(B (d + 2)) + (d - 1) block_a(B)) + E block(B): the first token's pass
        takes along what the round before has kept. (Where that refused something, they are fewer. The adapter's join
        is not timed, nor the pass that rounds of other kinds save up.)
        """
        if costs.adapter is None:
            raise ValueError("costs: hold no times for an exit adapter; measure them with the adapter loaded")
        lower, own = draft.exit_layer * costs.model.block_seconds(slots), costs.adapter.block_seconds(slots)
        along = costs.adapter_blocks * (costs.adapter.block_seconds(slots * (count + 2)) - own)
        each = lower + costs.adapter_blocks * own + costs.adapter.head_seconds(slots)
        return count * each + along + lower

    def propose(self, draft: Draft, count: int, chooser: Chooser, goes_on: GoesOn) -> Drafted:
        model = self.runners.model
        return draft_tokens(model, self.slots, draft.exit_layer, count, chooser, goes_on, self.observer.reader())


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
        """Return one for the texts that the model will have in `model_cache`, while there are none."""
        slots = len(model_cache.lengths)
        # Slots of which fewer rows wait go along with the others, beyond the ends of their texts.
        cache = adapter.runner.new_cache(slots, model_cache.cells + (ROWS_THAT_WAIT + 1 if slots > 1 else 0))
        shape = slots, ROWS_THAT_WAIT + 1, adapter.hidden_size
        exits = torch.zeros(shape, dtype=adapter.runner.dtype, device=adapter.runner.device)
        before = torch.zeros_like(exits) if adapter.shape.joins_last_state else None
        return cls(adapter, cache, [0] * slots, exits, before)

    def begin(self, slot: int) -> AdapterSlots:
        """Return a view of one slot's memory, for a new text."""
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
        """Take in what the model has run and the texts keep.

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
        """Return what decodes a draft's exit states one after another: ([A, 1, D], starts) -> logits [A, 1, V].

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
        """Return the pending tokens' states after its blocks [A, 1, D]; all that waits goes with them."""
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
        """Take in all rows that wait."""
        if rows := max(self._waiting(slots)):
            self._fill(self._joined(slots, rows))
            self._have_taken_in(slots)

    def _pass_on(self, exit_states: Tensor, last_states: Tensor, kept: list[int]) -> None:
        """Take in rows that are too many to wait, where none does."""
        before = self.before
        if before is not None:
            before = torch.cat([before[: len(kept), :1], last_states[:, :-1].to(before.dtype)], 1)
        self._fill(self.adapter.joined(exit_states, before))
        for slot, count in enumerate(kept):
            self.lengths[self.slot + slot] += count
            if self.before is not None:
                self.before[slot, 0] = last_states[slot, count - 1]

    def _joined(self, slots: int, rows: int) -> Tensor:
        """Return the input of its first block for the first rows that wait, [A, n, D]."""
        before = None if self.before is None else self.before[:slots, :rows]
        return self.adapter.joined(self.exits[:slots, :rows], before)

    def _fill(self, x: Tensor) -> None:
        """Run its blocks on the input of the first [A, n, D], for their keys and values; nobody reads the output."""
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
        """Give slot `target`, whose text has ended, what slot `source` holds."""
        self.cache.move(source, target)
        self.waiting[target] = self.waiting[source]
        for states in (self.exits, self.before):
            if states is not None:
                states[target] = states[source]
