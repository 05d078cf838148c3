"""The weights of an exit adapter as decoding uses them, and the runner of its blocks."""

from __future__ import annotations

from functools import cached_property

from torch import Tensor

from lskip.inference.layers.layout_choice import choose_layouts
from lskip.inference.layers.linear import pack
from lskip.inference.runners.base import ModelRunner
from lskip.inference.runners.draft_head import rounded_layouts, spread
from lskip.inference.runners.fused_blocks import obstacle, sample_weights
from lskip.inference.runners.fused_runner import FusedRunner
from lskip.inference.runners.module_runner import ModuleRunner
from lskip.models.decoder import Decoder
from lskip.models.exit_adapter import ExitAdapter, fingerprint, side_by_side


class AdapterRunner:
    """An exit adapter made ready for decoding. Where it drafts and int8 works, its blocks and head are rounded.

    Attributes:
        shape: its AdapterShape.
        runner: runs its blocks, norm and head.
        token_ids: [W], the tokens that it knows; None: all.
    """

    def __init__(self, adapter: ExitAdapter, batch_size: int = 1, rounded: bool = True):
        """Convert the weights, for so many texts at a time; `adapter` is left as it is."""
        # What joins the last layer's states only drafts: `unrounded` is not for it, and what was converted is freed.
        self._made_of = None if adapter.shape.joins_last_state else (adapter, batch_size)
        self.shape, self.hidden_size = adapter.shape, adapter.join.out_features
        self.runner = build_adapter_runner(Decoder(adapter.body), batch_size, rounded)
        self.vocab_size = adapter.made_for["vocab_size"]
        self.token_ids = None if len(adapter.token_ids) == self.vocab_size else adapter.token_ids
        weight, bias = adapter.join.weight.detach(), adapter.join.bias.detach()
        # Not rounded: a row's one large number, for what goes straight through, would set the scale of all others.
        layouts = choose_layouts("auto", weight, lone_rows=batch_size == 1)
        self.join, self.join_dtype = pack(layouts, weight, bias), layouts[0].inner_dtype or weight.dtype

    @cached_property
    def unrounded(self) -> AdapterRunner:
        """The same in its own numbers, for texts that nothing verifies."""
        return AdapterRunner(*self._made_of, rounded=False)

    def joined(self, exit_states: Tensor, last_states: Tensor | None) -> Tensor:
        """Return the input of its first block [A, n, D], from [A, n, D] each, as ExitAdapter.joined."""
        last_states = None if last_states is None else last_states.to(self.runner.dtype)
        rows = side_by_side(exit_states.to(self.runner.dtype), last_states).flatten(0, 1)
        return self.join(rows.to(self.join_dtype)).to(self.runner.dtype).view(exit_states.shape)

    def decode(self, x: Tensor) -> Tensor:
        """Return logits [A, n, V] of states of its last block [A, n, D]: -inf for tokens that it does not know."""
        logits = self.runner.decode(x)
        return logits if self.token_ids is None else spread(logits, self.token_ids, self.vocab_size)

    @property
    def nbytes(self) -> int:
        """Bytes of all its weights."""
        return sum(self.runner.memory().values()) + self.join.nbytes


def build_adapter_runner(decoder: Decoder, batch_size: int = 1, rounded: bool = True) -> ModelRunner:
    """Return a runner of its blocks and head: FusedRunner, in int8 if `rounded` and that works; else of the modules."""
    if obstacle(decoder) is not None:
        return ModuleRunner(decoder)
    samples = sample_weights(decoder)
    if rounded:
        layouts = rounded_layouts(samples, batch_size)
    else:
        layouts = choose_layouts("auto", samples[0], lone_rows=batch_size == 1)
    runner = FusedRunner(decoder, layouts)
    # It never embeds a token, and would keep the head's original for that; one row is for those who time it.
    runner.embedding = runner.embedding[:1].clone()
    return runner


def check_made_for(adapter: ExitAdapter | None, decoder: Decoder) -> None:
    """Raise ValueError for an adapter that was made for another model; None is none."""
    if adapter is not None and adapter.made_for != fingerprint(decoder):
        raise ValueError(f"exit_adapter: was made for another model ({adapter.made_for})")
