"""The fast path: Llama-like blocks on a few rows of one sequence, with as few operations as they allow."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lskip.decoder import Decoder
from lskip.inference.cache import KVCache
from lskip.inference.weights import Form, Plain

# Rotary embeddings whose frequencies do not depend on how long the text is.
FIXED_ROPE = ("default", "linear", "llama3", "yarn")


class Block(NamedTuple):
    """The weights of one block as the step uses them."""

    qkv: Plain  # D -> (H + 2 KV) head_dim; q and k rows in rotary pairs
    output: Plain  # H head_dim -> D
    gate_up: Plain  # D -> 2 I
    down: Plain  # I -> D
    attention_norm: Tensor  # [D]
    mlp_norm: Tensor  # [D]
    qk_norm: Tensor | None  # [H + KV, head_dim], Qwen3's
    window: int | None


class View(NamedTuple):
    """Which slots the rows of a pass see in a block: `low` … stop-1, less what `mask` [1, 1, G N, K] hides."""

    low: int
    mask: Tensor | None


class Span(NamedTuple):
    """What every block needs to know about the rows of one pass: positions start … stop-1."""

    start: int
    stop: int
    turn: Tensor  # [N, 1, head_dim / 2] complex: the rotary embedding
    views: dict[int | None, View]


class LeanStep:
    """Llama, Mistral, Qwen2 and Qwen3 on rows [N, D] of one sequence.

    Q, K and V are one product, gate and up another. Rotary embedding is one complex product, in place, since q
    and k rows were reordered at load from [first half, second half] to interleaved pairs. Query heads that
    share a key head are rows of one attention, so keys are never repeated. The residual is added inside the
    linear. A single row needs no mask.

    It keeps no reference to the model: its own copies (packed, or fused) stand in for the originals. Only the
    embedding is shared with it.

    Raises:
        ValueError: `obstacle(decoder)` is not None.
    """

    def __init__(self, decoder: Decoder, form: Form, release: bool = False, head_form: Form | None = None):
        """Builds its weights from the model's, block by block.

        Args:
            decoder: the model.
            form: how the weights are held.
            release: take each block out of the model as soon as it is converted, so that both never exist in
                full. The model is of no use afterwards.
            head_form: how the head is held, if not as the blocks are.
        """
        if (reason := obstacle(decoder)) is not None:
            raise ValueError(f"model: the lean step does not cover it ({reason})")
        layers, model = decoder.model.model.layers, decoder.model.model
        attention = layers[0].self_attn
        self.form = form
        self.num_layers, self.hidden_size = decoder.num_layers, decoder.hidden_size
        self.dtype, self.device = decoder.dtype, decoder.device
        self.head_dim, self.scale = attention.head_dim, attention.scaling
        self.heads = attention.q_proj.out_features // self.head_dim
        self.kv_heads = attention.k_proj.out_features // self.head_dim
        self.group = self.heads // self.kv_heads
        self.eps = layers[0].input_layernorm.variance_epsilon
        # On the CPU torch makes rms_norm of seven small operations, a tenth of a token's time; four will do.
        self.composed_norm = self.device.type == "cpu" and self.dtype == torch.float32
        self.norm_floor = torch.tensor((self.hidden_size * self.eps) ** 0.5)
        self.inv_freq = model.rotary_emb.inv_freq.float()
        self.rotary_scale = model.rotary_emb.attention_scaling
        self.embedding = model.embed_tokens.weight.detach()
        self.final_norm = self._norm_weight(model.norm)
        self.head = (head_form or form)(decoder.head_weight.detach(), decoder.head_bias)
        self.blocks = []
        for index in range(self.num_layers):
            self.blocks.append(self._convert(layers[index], decoder.window(index)))
            if release:
                layers[index] = nn.Identity()

    def _convert(self, layer: nn.Module, window: int | None) -> Block:
        attention, mlp = layer.self_attn, layer.mlp
        pairs = self._pairs(self.heads), self._pairs(self.kv_heads), None
        return Block(
            qkv=fuse(self.form, (attention.q_proj, attention.k_proj, attention.v_proj), pairs),
            output=fuse(self.form, (attention.o_proj,)),
            gate_up=fuse(self.form, (mlp.gate_proj, mlp.up_proj)),
            down=fuse(self.form, (mlp.down_proj,)),
            attention_norm=self._norm_weight(layer.input_layernorm),
            mlp_norm=self._norm_weight(layer.post_attention_layernorm),
            qk_norm=self._qk_norm(attention),
            window=window,
        )

    def _pairs(self, heads: int) -> Tensor:
        """[heads head_dim]: the row that each reordered row of q or k comes from."""
        rows = torch.arange(heads * self.head_dim, device=self.device)
        return rows.view(heads, 2, -1).transpose(1, 2).reshape(-1)

    def _qk_norm(self, attention: nn.Module) -> Tensor | None:
        if not hasattr(attention, "q_norm"):
            return None
        order = self._pairs(1)
        q, k = attention.q_norm.weight.detach()[order], attention.k_norm.weight.detach()[order]
        return torch.cat([q.expand(self.heads, -1), k.expand(self.kv_heads, -1)])

    def new_cache(self, slots: int) -> KVCache:
        """A cache for a request of `slots` positions."""
        return KVCache(self.num_layers, slots, self.kv_heads, self.head_dim, self.dtype, self.device)

    def embed(self, ids: Tensor) -> Tensor:
        """[N] token ids -> [N, D]."""
        return F.embedding(ids, self.embedding)

    def decode(self, x: Tensor) -> Tensor:
        """Exit states [N, D] -> logits [N, V]: final norm and head."""
        rows = x.shape[0]
        return self.head(self._norm(self._widen(x), self.final_norm))[:rows]

    def run(self, x: Tensor, cache: KVCache, start: int, first: int, last: int) -> Tensor:
        """Blocks `first` … `last`-1 on rows x [N, D] at positions start … start+N-1.

        Their keys and values are written at these positions; they see what the cache holds before them.
        """
        if first == last:
            return x
        rows = x.shape[0]
        x, span = self._widen(x), self._span(start, rows)
        for index in range(first, last):
            x = self._block(self.blocks[index], x, cache.states[index], span)
        return x[:rows]

    def _widen(self, x: Tensor) -> Tensor:
        """A lone row, repeated to the width that the linears are best at."""
        width = self.form.lone_row_width
        return x.expand(width, -1).contiguous() if x.shape[0] == 1 and width > 1 else x

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        """RMS norm of x [N, D]: x sqrt(D) weight / sqrt(|x|^2 + D eps)."""
        if not self.composed_norm:
            return torch.rms_norm(x, [self.hidden_size], weight, self.eps)
        return x.div(torch.linalg.vector_norm(x, dim=-1, keepdim=True).hypot_(self.norm_floor)).mul_(weight)

    def _norm_weight(self, norm: nn.Module) -> Tensor:
        weight = norm.weight.detach()
        return weight * self.hidden_size**0.5 if self.composed_norm else weight

    def _block(self, block: Block, x: Tensor, states: Tensor, span: Span) -> Tensor:
        """x [N or width, D] + attention + MLP; states [slots, 2, KV, head_dim] are this block's."""
        qkv = block.qkv(self._norm(x, block.attention_norm))
        attended = self._attend(block, qkv, states, span)
        x = block.output.add_to(x, attended if len(attended) == len(x) else attended.expand(len(x), -1))
        gate, up = block.gate_up(self._norm(x, block.mlp_norm)).chunk(2, -1)
        return block.down.add_to(x, F.silu(gate) * up)

    def _attend(self, block: Block, qkv: Tensor, states: Tensor, span: Span) -> Tensor:
        """qkv [N or width, (H + 2 KV) head_dim] -> attention's output [N, H head_dim]."""
        rows, heads, kv_heads = span.stop - span.start, self.heads, self.kv_heads
        qkv = qkv[:rows].view(rows, heads + 2 * kv_heads, self.head_dim)
        self._rotate(qkv[:, : heads + kv_heads], block.qk_norm, span.turn)
        states[span.start : span.stop].view(rows, 2 * kv_heads, -1).copy_(qkv[:, heads:])
        low, mask = span.views[block.window]
        keys, values = states[low : span.stop].permute(1, 2, 0, 3)[:, None]  # each [1, KV, K, head_dim]
        queries = qkv[:, :heads].reshape(rows, kv_heads, self.group, -1).permute(1, 2, 0, 3)
        queries = queries.reshape(1, kv_heads, self.group * rows, -1)
        z = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, scale=self.scale)
        return z.view(kv_heads, self.group, rows, -1).permute(2, 0, 1, 3).reshape(rows, -1)

    def _rotate(self, qk: Tensor, norm: Tensor | None, turn: Tensor) -> None:
        """Norm (Qwen3) and rotary embedding of qk [N, H + KV, head_dim], in place."""
        if norm is not None:
            qk.copy_(torch.rms_norm(qk, [self.head_dim], None, self.eps) * norm)
        exact = qk if qk.dtype == torch.float32 else qk.float()
        torch.view_as_complex(exact.unflatten(-1, (-1, 2))).mul_(turn)
        if exact is not qk:
            qk.copy_(exact)

    def _span(self, start: int, rows: int) -> Span:
        positions = torch.arange(start, start + rows, device=self.device)
        angle = torch.outer(positions.float(), self.inv_freq)
        turn = torch.polar(torch.full_like(angle, self.rotary_scale), angle)[:, None]
        views = {window: self._view(positions, start, rows, window) for window in {b.window for b in self.blocks}}
        return Span(start, start + rows, turn, views)

    def _view(self, positions: Tensor, start: int, rows: int, window: int | None) -> View:
        low = 0 if window is None else max(0, start + 1 - window)
        if rows == 1:
            return View(low, None)
        distance = positions[:, None] - torch.arange(low, start + rows, device=self.device)
        hidden = distance < 0 if window is None else (distance < 0) | (distance >= window)
        mask = torch.zeros(hidden.shape, dtype=self.dtype, device=self.device).masked_fill_(hidden, float("-inf"))
        return View(low, mask.expand(self.group, -1, -1).reshape(1, 1, self.group * rows, -1))


def fuse(form: Form, parts: tuple[nn.Linear, ...], orders: tuple[Tensor | None, ...] = ()):
    """One product in place of several on the same input, the rows of each part reordered where an order is given."""
    orders = orders or (None,) * len(parts)

    def joined(name: str) -> Tensor:
        tensors = [getattr(part, name).detach() for part in parts]
        ordered = [t if order is None else t[order] for t, order in zip(tensors, orders, strict=True)]
        return torch.cat(ordered) if len(ordered) > 1 else ordered[0]

    return form(joined("weight"), None if parts[0].bias is None else joined("bias"))


def obstacle(decoder: Decoder) -> str | None:
    """Why the lean step cannot stand in for this model's own blocks; None when it can."""
    config, model = decoder.config, decoder.model.model
    if config.hidden_act != "silu":
        return f"its activation is {config.hidden_act}"
    rope = getattr(model.rotary_emb, "rope_type", None)
    if rope not in FIXED_ROPE:
        return f"its rotary embedding is of type {rope}"
    if 2 * len(model.rotary_emb.inv_freq) != model.layers[0].self_attn.head_dim:
        return "its rotary embedding turns a part of each head"
    return unexpected_part(model.layers[0])


def sample_weights(decoder: Decoder, nbytes: int = 2**25) -> list[Tensor]:
    """Matrices of the first blocks, about `nbytes` in all: more than the cores' own caches hold, as in decoding."""
    samples, size = [], 0
    for layer in decoder.model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        for part in (attention.q_proj, attention.o_proj, mlp.gate_proj, mlp.down_proj):
            samples.append(part.weight.detach())
            size += samples[-1].nbytes
        if size >= nbytes:
            break
    return samples


EXPECTED = {
    "": {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"},
    "self_attn": {"q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm"},
    "mlp": {"gate_proj", "up_proj", "down_proj", "act_fn"},
}


def unexpected_part(layer: nn.Module) -> str | None:
    """Names a module of a block that the lean step would leave out (an adapter, a quantized linear, a new norm)."""
    for name, expected in EXPECTED.items():
        for child, module in layer.get_submodule(name).named_children():
            if child not in expected:
                return f"its blocks have a part {child!r}"
            if child.endswith("_proj") and type(module) is not nn.Linear:
                return f"its {child} is a {type(module).__name__}"
    return None
