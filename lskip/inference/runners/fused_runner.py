"""The fast path: Llama-like blocks on a few rows of some slots, with as few operations as they allow."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lskip.inference.layers.attention import AlignedAttention, Attention, Heads, RollingAttention, Rotary, Span, write
from lskip.inference.layers.block_functions import pad_rows
from lskip.inference.layers.kv_cache import KVCache, new_cache
from lskip.inference.layers.linear import Layout, Plain, pack
from lskip.inference.layers.lm_head import Ban, ScreenedHead
from lskip.inference.layers.torchscript import as_written
from lskip.inference.runners.fused_blocks import GELU, Block, Norm, Stack, activation_of, obstacle, rotaries
from lskip.models.decoder import Decoder, capped


class FusedRunner:
    """Llama, Mistral, Qwen2, Qwen3 and Gemma 3 on states [A, n, D]: n rows in each of A slots.

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
        layouts: Sequence[Layout],
        release: bool = False,
        head: Plain | ScreenedHead | None = None,
        width: int = 1,
        screen: ScreenedHead | None = None,
    ):
        """Build its weights from the model's, block by block.

        Args:
            decoder: the model.
            layouts: each matrix takes the first that can hold it.
            release: take each block out of the model as soon as it is converted, so that both never exist in
                full. The model is of no use afterwards.
            head: what stands in for the model's; None: it has a layout as the blocks do.
            width: above 1, a row's bits depend on its own slot and position alone: linears see multiples of this
                many rows, attention groups of so many (AlignedAttention).
            screen: finds the argmax without logits; None: nothing does.
        """
        if (reason := obstacle(decoder)) is not None:
            raise ValueError(f"model: the fused runner does not cover it ({reason})")
        layers = decoder.blocks
        self.width = width
        self.num_layers, self.hidden_size = decoder.num_layers, decoder.hidden_size
        self.device = decoder.device
        # On the CPU bfloat16 pays in the products, where its bytes are read; between them float32 is faster, and exact.
        self.dtype = torch.float32 if self.device.type == "cpu" else decoder.dtype
        self.inner_dtype = layouts[0].inner_dtype or decoder.dtype
        self.heads = heads_of(layers[0].self_attn)
        self.rotaries = {kind: Rotary(*numbers) for kind, (_, *numbers) in rotaries(decoder).items()}
        self.rotary_kinds = [decoder.rotary_kind(index) for index in range(self.num_layers)]
        windows = {decoder.window(index) for index in range(self.num_layers)}
        kind = AlignedAttention if width > 1 else Attention
        self.attention = kind(self.heads, windows, self.dtype, self.device, width)
        self.rolling = RollingAttention(self.heads, windows, self.dtype, self.device)
        self.embedding, self.softcap = decoder.embedding.weight.detach(), decoder.logit_softcap
        scale = getattr(decoder.embedding, "embed_scale", None)  # Gemma's, of the weights' type
        self.embedding_scale = None if scale is None else scale.to(self.embedding.dtype)
        self.final_norm = Norm(decoder.final_norm, self.dtype)
        self.screen = screen
        self.head = head or pack_head(layouts, decoder)
        gelu = activation_of(decoder) == GELU
        self.blocks: list[Block] = []
        for index in range(self.num_layers):
            window = decoder.window(index)
            self.blocks.append(Block(layers[index], window, self.heads, layouts, self.dtype, width, gelu))
            if release:
                layers[index] = nn.Identity()
        self.stack = Stack(self.blocks)

    def new_cache(self, slots: int, cells: int) -> KVCache:
        """Return a cache for texts of up to `cells` positions.

        Aligned attention wants a cell to stand for one position: there it is never a RollingCache.
        """
        cells = -(-cells // self.width) * self.width  # groups of aligned attention are whole
        windows = [block.window if self.width == 1 else None for block in self.blocks]
        return new_cache(windows, slots, cells, self.heads.keys, self.heads.size, self.dtype, self.device)

    def memory(self) -> dict[str, int]:
        """Return bytes by part. A head that is tied to the embedding counts only where it has another layout."""
        linears = [matrix for block in self.blocks for matrix in block.matrices]
        tied = getattr(self.head, "weight", None) is not None and shares_memory(self.head.weight, self.embedding)
        heads = {self.head, self.screen} - ({None, self.head} if tied else {None})
        return {
            "blocks": sum(linear.nbytes for linear in linears),
            "head": sum(head.nbytes for head in heads),
            "embedding": self.embedding.nbytes,
        }

    @property
    def layout(self) -> str:
        """The names of its blocks' layouts."""
        return "+".join(sorted({type(matrix).__name__ for block in self.blocks for matrix in block.matrices}))

    def embed(self, ids: Tensor, starts: list[int] | None = None) -> Tensor:
        """Return [A, n, D] of [A, n] token ids; where they stand makes no difference here."""
        rows = F.embedding(ids, self.embedding)
        return (rows if self.embedding_scale is None else rows * self.embedding_scale).to(self.dtype)

    def norm(self, x: Tensor) -> Tensor:
        """Return the final norm of states [..., D]."""
        return self.final_norm(x)

    def decode(self, x: Tensor) -> Tensor:
        """Return logits [..., V] of exit states [..., D]: final norm and head."""
        flat = x.reshape(-1, self.hidden_size)
        logits = self.head(self.final_norm(self._pad(flat)).to(self.inner_dtype))
        return capped(logits[: len(flat)].view(*x.shape[:-1], -1).to(self.dtype), self.softcap)

    def argmax(self, x: Tensor, ban: Ban | None = None) -> Tensor | None:
        """Return the argmax of exit states [A, n, D], of what `ban` leaves; None: by `decode` it is as fast."""
        return None if self.screen is None else self.screen.argmax(self.final_norm(x), ban)

    def run(self, x: Tensor, cache: KVCache, starts: list[int], first: int, last: int) -> Tensor:
        """Run blocks `first` … `last`-1 on states x [A, n, D] of the cache's first A slots.

        Slot a's rows stand at positions starts[a] … starts[a]+n-1; their keys and values are written there, and they
        see what the cache holds before them.
        """
        if first == last:
            return x
        span, factors = self._places(x, cache, starts, first, last)
        rows, shape = self._rows(x), x.shape
        with as_written():
            rows = self._run(rows, cache.kv[first:last], span, factors, first)
        return rows[: shape[0] * shape[1]].view(shape)

    def _run(self, rows: Tensor, kv: Tensor | list[Tensor], span: Span, factors: list[Tensor], first: int) -> Tensor:
        """Return the rows after as many blocks from `first` on as `kv` has parts."""
        blocks, attention = self.blocks[first : first + len(kv)], self._attention_over(kv)
        parts = attention.parts(kv, span, [block.window for block in blocks])
        if self.width == 1:
            return self.stack(rows, factors, parts, len(span.starts), first)
        for block, part, turned in zip(blocks, parts, factors, strict=True):
            qkv = block.project(rows, turned)
            write(qkv, part.target, part.written)
            rows = block.finish(rows, attention.attend(qkv[:, : self.heads.queries], part, span))
        return rows

    def _attention_over(self, kv: Tensor | list[Tensor]) -> Attention:
        """Return the kind of attention for a KVCache's memory, or for a RollingCache's."""
        return self.rolling if isinstance(kv, list) else self.attention

    def fill(self, x: Tensor, cache: KVCache, starts: list[int], first: int, last: int) -> None:
        """Write the keys and values that blocks `first` … `last`-1 would make of x [A, n, D], and do nothing else.

        For tokens that exited before these blocks (CALM, arXiv 2207.07061).
        """
        span, factors = self._places(x, cache, starts, first, last)
        rows = self._rows(x)
        blocks = self.blocks[first:last]
        attention = self._attention_over(cache.kv)
        parts = attention.parts(cache.kv[first:last], span, [block.window for block in blocks])
        with as_written():
            for block, part, turned in zip(blocks, parts, factors, strict=True):
                write(block.project(rows, turned), part.target, part.written)

    def _places(self, x: Tensor, cache: KVCache, starts: list[int], first: int, last: int) -> tuple[Span, list[Tensor]]:
        """Return the Span of a pass, and the rotary factors for blocks `first` … `last`-1."""
        factors = {kind: rotary.factors(starts, x.shape[1]) for kind, rotary in self.rotaries.items()}
        span = self._attention_over(cache.kv).span(starts, x.shape[1], cache.cells)
        return span, [factors[kind] for kind in self.rotary_kinds[first:last]]

    def _rows(self, x: Tensor) -> Tensor:
        """Return states [A, n, D] as the blocks take them."""
        return self._pad(x.reshape(-1, self.hidden_size))

    def _pad(self, rows: Tensor) -> Tensor:
        """Return rows [N, D] as a multiple of `width`, zeros after their last."""
        return pad_rows(rows, len(rows) + -len(rows) % self.width)


def pack_head(layouts: Sequence[Layout], decoder: Decoder) -> Plain:
    """Return the model's head in the first of `layouts` that can hold it, for normed states [N, D]."""
    return pack(layouts, decoder.head_weight.detach(), decoder.head_bias)


def heads_of(attention: nn.Module) -> Heads:
    """Return the shape of a block's attention."""
    size = attention.head_dim
    queries, keys = attention.q_proj.out_features // size, attention.k_proj.out_features // size
    return Heads(queries, keys, size, attention.scaling)


def shares_memory(a: Tensor, b: Tensor) -> bool:
    return not a.is_mkldnn and not b.is_mkldnn and a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()
