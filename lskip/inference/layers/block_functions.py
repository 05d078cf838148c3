"""What a Llama-like block does with a few rows, in the part of Python that TorchScript runs without Python.

Between the products of a small model most of a step is Python's: on two AVX2 cores TorchScript takes 6 % off a step of
SmolLM2 in float32, 16 to 37 % where its weights take fewer bytes, and changes no bit. torch calls it deprecated, but
what is to follow it wants a C++ compiler, a minute, and that again for every shape; where a torch or a Python no
longer has it, the same functions run as they stand.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple, get_type_hints

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lskip.inference.layers.attention import Part, attend, turn, write
from lskip.inference.layers.linear import Form, in_torchscript, scripted

PartOfCache = tuple[(*get_type_hints(Part).values(),)]  # TorchScript cannot read Part's own annotations


class BlockFunctions(NamedTuple):
    """Of blocks whose matrices are held in certain forms.

    Rows x are [N, D], of which the first A n count: n in each of A slots, one after another. `block` holds
        (heads: H, KV, head_dim and the scale of scores; the norms' eps; the rows that bits are to be kept for; the
            types of states between the products, and of what the products are given),
        (attention's norm; the MLP's; Qwen3's of queries and keys [H + KV, head_dim]; floor, see `norm`),
        qkv, output, gate_up and down, as their forms hold them.

    Attributes:
        stack: blocks -> ((x, turns, parts, slots, first) -> x through as many of them from `first` on as there are
            Parts of the cache: x + attention + MLP).
        project: (x, turns, block) -> [A n, H + 2 KV, head_dim], queries and keys normed (Qwen3) and turned.
        finish: (x, attended [A n, H head_dim], block) -> x + attended through `output`, + MLP.
    """

    stack: Callable
    project: Callable
    finish: Callable


@functools.cache
def block_functions(forms: tuple[Form, Form, Form, Form], without_python: bool) -> BlockFunctions:
    """For blocks whose qkv, output, gate_up and down are held in these forms."""
    qkv_form, output_form, gate_up_form, down_form = forms
    qkv_product, gate_up_product = qkv_form.product, gate_up_form.product
    plus_output, plus_down = output_form.plus, down_form.plus
    constants = tuple[tuple[int, int, int, float], float, int, torch.dtype, torch.dtype]
    norms = tuple[Tensor, Tensor, Tensor | None, Tensor | None]
    matrices = (get_type_hints(form.product)["held"] for form in forms)
    Block = tuple[(constants, norms, *matrices)]

    def project(x: Tensor, turns: Tensor, block: Block) -> Tensor:
        block = torch.jit.annotate(Block, block)  # TorchScript looks up no name that the body does not have
        (heads, eps, _, dtype, inner_dtype), (attention_norm, _, qk_norm, floor), qkv, _, _, _ = block
        queries, keys, size, _ = heads
        rows = qkv_product(norm(x, attention_norm, floor, eps).to(inner_dtype), qkv).to(dtype)
        states = rows[: turns.size(0)].view(turns.size(0), queries + 2 * keys, size)
        turned = states[:, : queries + keys]
        if qk_norm is not None:
            turned.copy_(torch.rms_norm(turned, [size], None, eps) * qk_norm)
        turn(turned, turns)
        return states

    def finish(x: Tensor, attended: Tensor, block: Block) -> Tensor:
        block = torch.jit.annotate(Block, block)
        (_, eps, width, _, inner_dtype), (_, mlp_norm, _, floor), _, output, gate_up, down = block
        x = plus_output(x, widen(attended, x.size(0)).to(inner_dtype), output)
        gate, up = gate_up_product(norm(x, mlp_norm, floor, eps).to(inner_dtype), gate_up).chunk(2, -1)
        return plus_down(x, silu(gate, width) * up, down)

    def run(x: Tensor, turns: Tensor, part: PartOfCache, slots: int, block: Block) -> Tensor:
        block = torch.jit.annotate(Block, block)
        target, written, keys, values, mask = part
        queries, _, _, scale = block[0][0]
        qkv = project(x, turns, block)
        write(qkv, target, written)
        attended = attend(qkv[:, :queries], keys, values, mask, slots, qkv.size(0) // slots, scale)
        return finish(x, attended, block)

    class AlikeBlocks(nn.Module):
        """A module, since what that has TorchScript knows; what it is given it looks through, at each call."""

        def __init__(self, blocks: list[Block]):
            super().__init__()
            self.blocks = blocks

        def forward(self, x: Tensor, turns: Tensor, parts: list[PartOfCache], slots: int, first: int) -> Tensor:
            for index, part in enumerate(parts):
                x = run(x, turns, part, slots, self.blocks[first + index])
            return x

    AlikeBlocks.__annotations__["blocks"] = list[Block]
    if not without_python:
        return BlockFunctions(AlikeBlocks, project, finish)
    return BlockFunctions(lambda blocks: in_torchscript(AlikeBlocks(blocks)), scripted(project), scripted(finish))


def as_written():
    """Within it TorchScript takes no product apart, which it would do after the first calls, and round otherwise."""
    return torch.jit.optimized_execution(False)


def norm(x: Tensor, weight: Tensor, floor: Tensor | None, eps: float) -> Tensor:
    """RMS norm of x [N, D]; with a floor of sqrt(D eps), and the weight times sqrt(D), in few operations.

    On the CPU torch makes rms_norm of seven small ones, a tenth of a token's time.
    """
    if floor is None:
        return torch.rms_norm(x, [x.size(-1)], weight, eps)
    return x.div(torch.linalg.vector_norm(x, 2.0, [-1], True).hypot_(floor)).mul_(weight)


def widen(rows: Tensor, count: int) -> Tensor:
    """Rows [N, D] as `count` of them: a lone one repeated, zeros after several."""
    if rows.size(0) == count:
        return rows
    if rows.size(0) == 1:
        return rows.expand(count, -1).contiguous()
    return F.pad(rows, [0, 0, 0, count - rows.size(0)])


def silu(gate: Tensor, width: int) -> Tensor:
    if width == 1:
        return F.silu(gate)
    # Threads share a large tensor out at places that depend on its size, and round otherwise at the seams.
    return torch.cat([F.silu(rows) for rows in gate.split(width)])
