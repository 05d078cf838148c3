"""The weights of Llama-like blocks as the fused runner uses them, made from a model's own."""

from collections.abc import Sequence
from itertools import groupby

import torch
from torch import Tensor, nn

from lskip.inference.layers.attention import Heads, Part
from lskip.inference.layers.block_functions import block_functions, norm
from lskip.inference.layers.linear import Layout, Plain, pack
from lskip.models.decoder import Decoder
from lskip.models.families import FUSED_FAMILIES, field_of

# Rotary embeddings whose frequencies do not depend on how long the text is.
FIXED_ROPE = ("default", "linear", "llama3", "yarn")
GELU = "gelu_pytorch_tanh"


class Block:
    """A block of the model, made ready for a few rows at a time; on a CPU in TorchScript.

    Attributes:
        qkv: D -> (H + 2 KV) head_dim; q and k rows in rotary pairs.
        output: H head_dim -> D.
        gate_up: D -> 2 I.
        down: I -> D.
        window: how far its attention sees.
    """

    def __init__(
        self,
        layer: nn.Module,
        window: int | None,
        heads: Heads,
        layouts: Sequence[Layout],
        dtype: torch.dtype,
        width: int,
        gelu: bool,
    ):
        """Convert the weights of the model's `layer`.

        Args:
            layouts: each matrix takes the first that can hold it.
            dtype: of states between the products.
            width: rows that bits are to be kept for; 1: any.
            gelu: whether the MLP has GELU, not SiLU.
        """
        self.window = window
        matrices = [fuse(layouts, linears, orders) for linears, orders in fused_linears(layer, heads)]
        self.qkv, self.output, self.gate_up, self.down = matrices
        first = layer.self_attn.q_proj.weight
        attention_norm, *norms = norms_of(layer, dtype)
        inner_dtype = layouts[0].inner_dtype or first.dtype
        self.functions = block_functions(tuple(map(type, self.matrices)), first.device.type == "cpu")
        self.packed = (
            (tuple(heads), attention_norm.eps, width, dtype, inner_dtype, gelu),
            (
                attention_norm.weight,
                *(None if norm is None else norm.weight for norm in norms),
                qk_norm(layer.self_attn, heads, dtype),
                attention_norm.floor,
            ),
            *(matrix.packed for matrix in matrices),
        )

    @property
    def matrices(self) -> tuple[Plain, Plain, Plain, Plain]:
        return self.qkv, self.output, self.gate_up, self.down

    def project(self, x: Tensor, factors: Tensor) -> Tensor:
        """Return [A n, H + 2 KV, head_dim] of x [N, D], as the cache and attention take them."""
        return self.functions.project(x, factors, self.packed)

    def finish(self, x: Tensor, attended: Tensor) -> Tensor:
        """Return x [N, D] + what its rows attended to [A n, H head_dim], + MLP."""
        return self.functions.finish(x, attended, self.packed)


class Stack:
    """Blocks one after another, in one call where their layouts are the same: to enter TorchScript costs 30 µs."""

    def __init__(self, blocks: list[Block]):
        self._runs, first = [], 0
        for functions, alike in groupby(blocks, lambda block: block.functions):
            packed = [block.packed for block in alike]
            self._runs.append((first, first + len(packed), functions.stack(packed)))
            first += len(packed)

    def __call__(self, x: Tensor, factors: list[Tensor], parts: list[Part], slots: int, first: int) -> Tensor:
        """Return x [N, D] after as many blocks from `first` on as there are `parts`, their own of the cache."""
        last = first + len(parts)
        for begin, end, run in self._runs:
            low, high = max(first, begin), min(last, end)
            if low < high:
                here = slice(low - first, high - first)
                x = run(x, factors[here], parts[here], slots, low - begin)
        return x


class Norm:
    """An RMS norm, its weight as `norm` takes it."""

    def __init__(self, module: nn.Module, dtype: torch.dtype):
        """Take the weight of a norm of the model; dtype: of the states."""
        self.floor = None
        self.weight, self.eps = factors_of(module, dtype)
        if self.weight.device.type == "cpu" and dtype == torch.float32:
            self.floor = torch.tensor((len(self.weight) * self.eps) ** 0.5)
            self.weight = self.weight * len(self.weight) ** 0.5

    def __call__(self, x: Tensor) -> Tensor:
        return norm(x, self.weight, self.floor, self.eps)


def factors_of(module: nn.Module, dtype: torch.dtype) -> tuple[Tensor, float]:
    """Return what an RMS norm of the model multiplies by, for states of `dtype`, and its eps.

    Gemma's keep their factors less 1, and multiply in float32 (and name the eps otherwise).
    """
    weight = module.weight.detach()
    if hasattr(module, "variance_epsilon"):
        return weight.to(dtype), module.variance_epsilon
    return 1 + weight.float(), module.eps


def norms_of(layer: nn.Module, dtype: torch.dtype) -> tuple[Norm, Norm, Norm | None, Norm | None]:
    """Return a block's norms before attention and before the MLP, and Gemma's of what each adds."""
    before, after = Norm(layer.input_layernorm, dtype), Norm(layer.post_attention_layernorm, dtype)
    if not hasattr(layer, "pre_feedforward_layernorm"):
        return before, after, None, None  # Llama has the MLP's under that name
    return before, Norm(layer.pre_feedforward_layernorm, dtype), after, Norm(layer.post_feedforward_layernorm, dtype)


def pair_order(heads: int, size: int, device: torch.device) -> Tensor:
    """Return [heads size]: the row that each reordered row of q or k comes from; rotary pairs are side by side then."""
    rows = torch.arange(heads * size, device=device)
    return rows.view(heads, 2, -1).transpose(1, 2).reshape(-1)


def qk_norm(attention: nn.Module, heads: Heads, dtype: torch.dtype) -> Tensor | None:
    """Return [H + KV, head_dim]: what every head's norm multiplies by (Qwen3, Gemma), in the order of `pair_order`."""
    if not hasattr(attention, "q_norm"):
        return None
    q, k = factors_of(attention.q_norm, dtype)[0], factors_of(attention.k_norm, dtype)[0]
    order = pair_order(1, heads.size, q.device)
    return torch.cat([q[order].expand(heads.queries, -1), k[order].expand(heads.keys, -1)])


def fused_linears(
    layer: nn.Module, heads: Heads
) -> tuple[tuple[tuple[nn.Linear, ...], tuple[Tensor | None, ...]], ...]:
    """Return which of a block's linears make up qkv, output, gate_up and down, and the orders of their rows there."""
    attention, mlp = layer.self_attn, layer.mlp
    device = attention.q_proj.weight.device
    orders = pair_order(heads.queries, heads.size, device), pair_order(heads.keys, heads.size, device), None
    return (
        ((attention.q_proj, attention.k_proj, attention.v_proj), orders),
        ((attention.o_proj,), (None,)),
        ((mlp.gate_proj, mlp.up_proj), (None, None)),
        ((mlp.down_proj,), (None,)),
    )


def fuse(layouts: Sequence[Layout], parts: tuple[nn.Linear, ...], orders: tuple[Tensor | None, ...]) -> Plain:
    """Return one matrix for several on the same input, the rows of each part reordered where an order is given."""

    def joined(name: str) -> Tensor:
        tensors = [getattr(part, name).detach() for part in parts]
        ordered = [t if order is None else t[order] for t, order in zip(tensors, orders, strict=True)]
        return torch.cat(ordered) if len(ordered) > 1 else ordered[0]

    return pack(layouts, joined("weight"), None if parts[0].bias is None else joined("bias"))


def obstacle(decoder: Decoder) -> str | None:
    """Say why the fused runner cannot stand in for this model's own blocks; None when it can."""
    config, block = decoder.config, decoder.blocks[0]
    if config.model_type not in FUSED_FAMILIES:
        return f"its family is {config.model_type}"
    if activation_of(decoder) not in ("silu", GELU):
        return f"its activation is {activation_of(decoder)}"
    for rope, inv_freq, _ in rotaries(decoder).values():
        if rope not in FIXED_ROPE:
            return f"its rotary embedding is of type {rope}"
        if 2 * len(inv_freq) != block.self_attn.head_dim:
            return "its rotary embedding rotates a part of each head"
    return unexpected_part(block)


def activation_of(decoder: Decoder) -> str:
    """Return the name of the MLP's activation, for which Gemma has a field of its own."""
    return field_of(decoder.config, "hidden_activation") or decoder.config.hidden_act


def rotaries(decoder: Decoder) -> dict[str | None, tuple[str, Tensor, float]]:
    """Return type, inverse frequencies and scale of the rotary embedding, by `Decoder.rotary_kind`."""
    rotary = decoder.rotary
    if not decoder.family.rotary_by_kind:
        return {None: (rotary.rope_type, rotary.inv_freq, rotary.attention_scaling)}
    return {
        kind: (rope, getattr(rotary, f"{kind}_inv_freq"), getattr(rotary, f"{kind}_attention_scaling"))
        for kind, rope in rotary.rope_type.items()
    }


def sample_weights(decoder: Decoder) -> list[Tensor]:
    """Return matrices of the first block, one for each kind of input."""
    attention, mlp = decoder.blocks[0].self_attn, decoder.blocks[0].mlp
    return [linear.weight.detach() for linear in (attention.q_proj, attention.o_proj, mlp.gate_proj, mlp.down_proj)]


EXPECTED = {
    "": {
        "self_attn",
        "mlp",
        "input_layernorm",
        "post_attention_layernorm",
        "pre_feedforward_layernorm",
        "post_feedforward_layernorm",
    },
    "self_attn": {"q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm"},
    "mlp": {"gate_proj", "up_proj", "down_proj", "act_fn"},
}


def unexpected_part(layer: nn.Module) -> str | None:
    """Name a module of a block that the fused runner would leave out (an adapter, a quantized linear, a new norm)."""
    for name, expected in EXPECTED.items():
        for child, module in layer.get_submodule(name).named_children():
            if child not in expected:
                return f"its blocks have a part {child!r}"
            if child.endswith("_proj") and type(module) is not nn.Linear:
                return f"its {child} is a {type(module).__name__}"
    return None
