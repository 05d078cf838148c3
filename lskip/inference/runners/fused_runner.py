"""The fast path: Llama-like blocks on a few rows of some slots, with as few operations as they allow."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lskip.inference.layers.attention import AlignedAttention, Attention, Heads, Rotary, Span, StaticAttention, write
from lskip.inference.layers.block_functions import as_written, widen
from lskip.inference.layers.kv_cache import KVCache
from lskip.inference.layers.linear import Form, Plain, hold
from lskip.inference.layers.lm_head import Argmax, Ban, ScreenedHead
from lskip.inference.layers.rolling import RollingAttention, RollingCache, rolls
from lskip.inference.layers.rotation import AsTheyAre, Rotation, Turned
from lskip.inference.runners.fused_blocks import Block, Norm, Stack, obstacle
from lskip.models.decoder import Decoder

COMPILED_ROWS = 16  # a slot's, in a pass that is compiled: drafts and what verifies them
COMPILED_SHAPES = 128
SMALLEST_COMPILED = 256  # cells of a cache


class FusedRunner:
    """Llama, Mistral, Qwen2 and Qwen3 on states [A, n, D]: n rows in each of A slots.

    Q, K and V are one product, gate and up another. Rotary embedding is one complex product, in place, since q
    and k rows were reordered at load from [first half, second half] to interleaved pairs. The residual is added
    inside the linear.

    It keeps no reference to the model: its own copies (packed, or fused) stand in for the originals. Only the
    embedding is shared with it.

    Raises:
        ValueError: `obstacle(decoder)` is not None.
    """

    def __init__(
        self,
        decoder: Decoder,
        form: Form,
        release: bool = False,
        head: Plain | Turned | ScreenedHead | None = None,
        width: int = 1,
        compiled: bool = False,
        screen: ScreenedHead | None = None,
    ):
        """Builds its weights from the model's, block by block.

        Args:
            decoder: the model.
            form: how the weights are held.
            release: take each block out of the model as soon as it is converted, so that both never exist in
                full. The model is of no use afterwards.
            head: what stands in for the model's; None: it is held as the blocks are.
            width: above 1, a row's bits depend on its own slot and position alone: linears see multiples of this
                many rows, attention groups of so many (AlignedAttention).
            compiled: run the blocks through torch.compile, once for every number of rows and of blocks; passes of
                more than COMPILED_ROWS rows a slot, as prompts have, run as they are.
            screen: finds likeliest tokens without logits; None: nothing does.
        """
        if (reason := obstacle(decoder)) is not None:
            raise ValueError(f"model: the fused runner does not cover it ({reason})")
        layers = decoder.blocks
        self.form, self.width, self.compiled = form, width, compiled
        self.num_layers, self.hidden_size = decoder.num_layers, decoder.hidden_size
        self.device = decoder.device
        # On the CPU bfloat16 pays in the products, where its bytes are read; between them float32 is faster, and exact.
        self.dtype = torch.float32 if self.device.type == "cpu" and not compiled else decoder.dtype
        self.inner_dtype = form.inner_dtype or decoder.dtype
        self.heads = heads_of(layers[0].self_attn)
        self.rotary = Rotary(decoder.rotary.inv_freq, decoder.rotary.attention_scaling)
        windows = {decoder.window(index) for index in range(self.num_layers)}
        kind = StaticAttention if compiled else AlignedAttention if width > 1 else Attention
        self.attention = kind(self.heads, windows, self.dtype, self.device, width)
        self.rolling = RollingAttention(self.heads, windows, self.dtype, self.device)
        if compiled:
            self._compiled_blocks = torch.compile(self._blocks_on, dynamic=False)
            # After 8 shapes torch would give up, and run all others as if nothing had been compiled.
            shapes = torch._dynamo.config.recompile_limit
            torch._dynamo.config.recompile_limit = max(shapes, COMPILED_SHAPES)
        self.embedding = decoder.embedding.weight.detach()
        self.final_norm = Norm(decoder.final_norm, self.dtype)
        # Between blocks alone: the states that others see are the model's own.
        self.rotation = Rotation(self.hidden_size) if form.rounds_inputs else AsTheyAre()
        self.screen = screen
        self.head = head or hold_head(form, decoder)
        self.blocks: list[Block] = []
        without_python = self.device.type == "cpu" and not compiled
        for index in range(self.num_layers):
            layer = self.rotation.turned(layers[index])
            block = Block(layer, decoder.window(index), self.heads, form, self.dtype, width, without_python)
            self.blocks.append(block)
            if release:
                layers[index] = nn.Identity()
        self.stack = Stack(self.blocks)

    def new_cache(self, slots: int, cells: int) -> KVCache:
        """A cache for texts of up to `cells` positions.

        Aligned attention and torch.compile want a cell to stand for one position: there it is never a RollingCache.
        """
        cells = -(-cells // self.width) * self.width  # groups of aligned attention are whole
        if self.compiled:  # few sizes, since each is compiled anew
            cells = max(SMALLEST_COMPILED, 1 << (cells - 1).bit_length())
        shape = slots, cells, self.heads.keys, self.heads.size, self.dtype, self.device
        windows = [block.window for block in self.blocks]
        if self.width == 1 and not self.compiled and rolls(windows, cells):
            return RollingCache.of_zeros(windows, *shape)
        return KVCache.of_zeros(self.num_layers, *shape)

    def memory(self) -> dict[str, int]:
        """Bytes by part. A head that is tied to the embedding counts only where it is held in another form."""
        linears = [matrix for block in self.blocks for matrix in block.matrices]
        tied = getattr(self.head, "weight", None) is not None and shares_memory(self.head.weight, self.embedding)
        heads = {self.head, self.screen} - ({None, self.head} if tied else {None})
        return {
            "blocks": sum(linear.nbytes for linear in linears),
            "head": sum(head.nbytes for head in heads),
            "embedding": self.embedding.nbytes,
        }

    def embed(self, ids: Tensor, starts: list[int] | None = None) -> Tensor:
        """[A, n] token ids -> [A, n, D]; where they stand makes no difference here."""
        return F.embedding(ids, self.embedding).to(self.dtype)

    def norm(self, x: Tensor) -> Tensor:
        """The final norm of states [..., D]."""
        return self.final_norm(x)

    def decode(self, x: Tensor) -> Tensor:
        """Exit states [..., D] -> logits [..., V]: final norm and head."""
        flat = x.reshape(-1, self.hidden_size)
        logits = self.head(self.final_norm(self._widen(flat)).to(self.inner_dtype))
        return logits[: len(flat)].view(*x.shape[:-1], -1).to(self.dtype)

    def argmax(self, x: Tensor, ban: Ban | None = None) -> Argmax | None:
        """Of exit states [A, n, D], of what `ban` leaves; None: by `decode` it is as fast."""
        return None if self.screen is None else self.screen.argmax(self.final_norm(x), ban)

    def run(self, x: Tensor, cache: KVCache, starts: list[int], first: int, last: int) -> Tensor:
        """Blocks `first` … `last`-1 on states x [A, n, D] of the cache's first A slots.

        Slot a's rows stand at positions starts[a] … starts[a]+n-1; their keys and values are written there, and they
        see what the cache holds before them.
        """
        if first == last:
            return x
        span, turns = self._places(x, cache, starts)
        rows, shape = self._rows(x), x.shape
        blocks = self._compiled_blocks if self.compiled and shape[1] <= COMPILED_ROWS else self._blocks_on
        with as_written():
            rows = blocks(rows, cache.states[first:last], span, turns, first)
        return self.rotation.turn_back(rows[: shape[0] * shape[1]]).view(shape)

    def _blocks_on(self, rows: Tensor, states: Tensor | list[Tensor], span: Span, turns: Tensor, first: int) -> Tensor:
        """As many blocks from `first` on as `states` has parts."""
        blocks, attention = self.blocks[first : first + len(states)], self._attention_over(states)
        parts = attention.parts(states, span, [block.window for block in blocks])
        if self.width == 1:
            return self.stack(rows, turns, parts, len(span.starts), first)
        for block, part in zip(blocks, parts, strict=True):
            qkv = block.project(rows, turns)
            write(qkv, part.target, part.written)
            rows = block.finish(rows, attention.attend(qkv[:, : self.heads.queries], part, span))
        return rows

    def _attention_over(self, states: Tensor | list[Tensor]) -> Attention:
        """The kind of attention for a KVCache's states, or for a RollingCache's."""
        return self.rolling if isinstance(states, list) else self.attention

    def fill(self, x: Tensor, cache: KVCache, starts: list[int], first: int, last: int) -> None:
        """Writes the keys and values that blocks `first` … `last`-1 would make of x [A, n, D] and does nothing else.

        For tokens that exited before these blocks (CALM, arXiv 2207.07061).
        """
        span, turns = self._places(x, cache, starts)
        rows = self._rows(x)
        blocks = self.blocks[first:last]
        attention = self._attention_over(cache.states)
        parts = attention.parts(cache.states[first:last], span, [block.window for block in blocks])
        with as_written():
            for block, part in zip(blocks, parts, strict=True):
                write(block.project(rows, turns), part.target, part.written)

    def _places(self, x: Tensor, cache: KVCache, starts: list[int]) -> tuple[Span, Tensor]:
        turns = self.rotary.turns(starts, x.shape[1])
        span = self._attention_over(cache.states).span(starts, x.shape[1], cache.cells)
        return span, torch.view_as_real(turns) if self.compiled else turns

    def _rows(self, x: Tensor) -> Tensor:
        """States [A, n, D] as the blocks take them."""
        return self.rotation.turn(self._widen(x.reshape(-1, self.hidden_size)))

    def _widen(self, rows: Tensor) -> Tensor:
        """Rows [N, D] as many as the linears want: a multiple of `width`, and a lone one as its form likes it."""
        count = len(rows)
        return widen(rows, self.form.lone_row_width if self.width == count == 1 else count + -count % self.width)


def hold_head(form: Form, decoder: Decoder) -> Plain | Turned:
    """The model's head in a form, for normed states [N, D]."""
    weight = decoder.head_weight.detach()
    if form.rounds_inputs:
        return Turned(form, weight, decoder.head_bias)
    return hold(form, weight, decoder.head_bias)


def heads_of(attention: nn.Module) -> Heads:
    size = attention.head_dim
    queries, keys = attention.q_proj.out_features // size, attention.k_proj.out_features // size
    return Heads(queries, keys, size, attention.scaling)


def shares_memory(a: Tensor, b: Tensor) -> bool:
    return not a.is_mkldnn and not b.is_mkldnn and a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()
