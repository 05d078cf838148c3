"""The functions of a Llama-like block on a few rows, in the part of Python that TorchScript runs (torchscript.py)."""

import functools
from collections.abc import Callable
from typing import NamedTuple, get_type_hints

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lskip.inference.layers.attention import Part, apply_rope, attend, write
from lskip.inference.layers.linear import Layout
from lskip.inference.layers.torchscript import in_torchscript, scripted

PartOfCache = tuple[(*get_type_hints(Part).values(),)]  # TorchScript cannot read Part's own annotations


class BlockFunctions(NamedTuple):
    """The functions of blocks whose matrices have certain layouts.

    Rows x are [N, D], of which the first A n count: n in each of A slots, one after another. `block` is
        (heads: H, KV, head_dim and the scale of scores; the norms' eps; the rows that bits are to be kept for; the
            types of states between the products, and of what the products are given; whether GELU stands for SiLU),
        (norms before attention and before the MLP; of what each adds (Gemma); of queries and keys [H + KV, head_dim]
            (Qwen3, Gemma); floor, see `norm`),
        qkv, output, gate_up and down, packed.

    Attributes:
        stack: blocks -> ((x, factors, parts, slots, first) -> x through as many of them from `first` on as there are
            Parts of the cache, and rotary factors for each: x + attention + MLP).
        project: (x, factors, block) -> [A n, H + 2 KV, head_dim], queries and keys normed, with rope.
        finish: (x, attended [A n, H head_dim], block) -> x + attended through `output`, + MLP.
    """

    stack: Callable
    project: Callable
    finish: Callable


@functools.cache
def block_functions(layouts: tuple[Layout, Layout, Layout, Layout], without_python: bool) -> BlockFunctions:
    """Return the functions of blocks whose qkv, output, gate_up and down have these layouts."""
    qkv_product, gate_up_product = layouts[0].product, layouts[2].product
    plus_output, plus_down = plus_of(layouts[1]), plus_of(layouts[3])
    constants = tuple[tuple[int, int, int, float], float, int, torch.dtype, torch.dtype, bool]
    norms = tuple[(Tensor, Tensor, *[Tensor | None] * 4)]
    matrices = (get_type_hints(layout.product)["packed"] for layout in layouts)
    Block = tuple[(constants, norms, *matrices)]

    def project(x: Tensor, factors: Tensor, block: Block) -> Tensor:
        block = torch.jit.annotate(Block, block)  # TorchScript looks up no name that the body does not have
        (heads, eps, _, dtype, inner_dtype, _), (attention_norm, _, _, _, qk_norm, floor), qkv, _, _, _ = block
        queries, keys, size, _ = heads
        rows = qkv_product(norm(x, attention_norm, floor, eps).to(inner_dtype), qkv).to(dtype)
        projected = rows[: factors.size(0)].view(factors.size(0), queries + 2 * keys, size)
        positioned = projected[:, : queries + keys]
        if qk_norm is not None:
            positioned.copy_(torch.rms_norm(positioned.to(qk_norm.dtype), [size], None, eps) * qk_norm)
        apply_rope(positioned, factors)
        return projected

    def finish(x: Tensor, attended: Tensor, block: Block) -> Tensor:
        block = torch.jit.annotate(Block, block)
        (_, eps, width, _, inner_dtype, gelu), norms, _, output, gate_up, down = block
        _, mlp_norm, added_attention_norm, added_mlp_norm, _, floor = norms
        attended = pad_rows(attended, x.size(0)).to(inner_dtype)
        x = plus_output(x, attended, output, added_attention_norm, floor, eps)
        gate, up = gate_up_product(norm(x, mlp_norm, floor, eps).to(inner_dtype), gate_up).chunk(2, -1)
        return plus_down(x, activation(gate, width, gelu) * up, down, added_mlp_norm, floor, eps)

    def run(x: Tensor, factors: Tensor, part: PartOfCache, slots: int, block: Block) -> Tensor:
        block = torch.jit.annotate(Block, block)
        target, written, keys, values, mask = part
        queries, _, _, scale = block[0][0]
        qkv = project(x, factors, block)
        write(qkv, target, written)
        attended = attend(qkv[:, :queries], keys, values, mask, slots, qkv.size(0) // slots, scale)
        return finish(x, attended, block)

    class AlikeBlocks(nn.Module):
        """A module, since what that has TorchScript knows; what it is given it looks through, at each call."""

        def __init__(self, blocks: list[Block]):
            super().__init__()
            self.blocks = blocks

        def forward(self, x: Tensor, factors: list[Tensor], parts: list[PartOfCache], slots: int, first: int) -> Tensor:
            for index, part in enumerate(parts):
                x = run(x, factors[index], part, slots, self.blocks[first + index])
            return x

    AlikeBlocks.__annotations__["blocks"] = list[Block]
    if not without_python:
        return BlockFunctions(AlikeBlocks, project, finish)
    return BlockFunctions(lambda blocks: in_torchscript(AlikeBlocks(blocks)), scripted(project), scripted(finish))


def plus_of(layout: Layout) -> Callable:
    """Return what adds a layout's product to the residual, by its `plus` if it has one, or the product's norm."""
    product, Packed = layout.product, get_type_hints(layout.product)["packed"]

    def add(residual: Tensor, x: Tensor, packed: Packed) -> Tensor:
        packed = torch.jit.annotate(Packed, packed)
        return residual + product(x, packed)

    plus = layout.plus or add

    def plus_normed(
        residual: Tensor, x: Tensor, packed: Packed, weight: Tensor | None, floor: Tensor | None, eps: float
    ) -> Tensor:
        packed = torch.jit.annotate(Packed, packed)
        if weight is None:
            return plus(residual, x, packed)
        return residual + norm(product(x, packed).to(residual.dtype), weight, floor, eps)

    return plus_normed


def norm(x: Tensor, weight: Tensor, floor: Tensor | None, eps: float) -> Tensor:
    """Return the RMS norm of x [N, D]; with a floor of sqrt(D eps), and the weight times sqrt(D), in few operations.

    On the CPU torch makes rms_norm of seven small ones, a tenth of a token's time.
    """
    if floor is None:
        return torch.rms_norm(x.to(weight.dtype), [x.size(-1)], weight, eps).to(x.dtype)
    return x.div(torch.linalg.vector_norm(x, 2.0, [-1], True).hypot_(floor)).mul_(weight)


def pad_rows(rows: Tensor, count: int) -> Tensor:
    """Return rows [N, D] as `count` of them, zeros after their last."""
    if rows.size(0) == count:
        return rows
    return F.pad(rows, [0, 0, 0, count - rows.size(0)])


def activation(gate: Tensor, width: int, gelu: bool) -> Tensor:
    # Threads share a large tensor out at places that depend on its size, and round otherwise at the seams.
    pieces = [gate] if width == 1 else gate.split(width)
    active = [F.gelu(rows, approximate="tanh") if gelu else F.silu(rows) for rows in pieces]
    return active[0] if width == 1 else torch.cat(active)
