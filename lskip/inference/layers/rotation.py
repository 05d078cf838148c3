"""A basis of the states in which none of their numbers stands out, so that rounding them costs less."""

from __future__ import annotations

import math
from copy import deepcopy

import torch
from torch import Tensor, nn

from lskip.inference.layers.linear import Form


class Rotation:
    """x [..., D] -> x R for an orthogonal R, the same for every model of a size.

    In a trained model a few of a state's numbers are far larger than the rest and set the scale that all of them are
    rounded on. R mixes them: it is the Kronecker product of two random orthogonal matrices (QuIP, arXiv 2307.13304,
    section 4.1), of sizes as near to sqrt(D) as D's divisors are, so that a product with it is two small ones.
    """

    def __init__(self, size: int):
        """size: D."""
        rows = max(count for count in range(1, math.isqrt(size) + 1) if size % count == 0)
        generator = torch.Generator().manual_seed(0)
        self.left, self.right = orthogonal(rows, generator), orthogonal(size // rows, generator)

    def turn(self, x: Tensor) -> Tensor:
        """[..., D] -> x R, in float32."""
        return between(self.left.T, x, self.right)

    def turn_back(self, x: Tensor) -> Tensor:
        """x [..., D] -> x R^T, in float32."""
        return between(self.left, x, self.right.T)

    @torch.no_grad()
    def turned(self, layer: nn.Module) -> nn.Module:
        """A float32 copy of a Llama-like block that reads and writes turned states: block(x) R = turned(x R).

        RMS norms know no direction but by their weights, which go into the matrices behind them (SliceGPT, arXiv
        2401.15024, section 3.1; used for rounding by QuaRot, arXiv 2404.00456).
        """
        layer = deepcopy(layer).float()
        attention, mlp = layer.self_attn, layer.mlp
        readers = (
            (layer.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
            (layer.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)),
        )
        for norm, linears in readers:
            for linear in linears:
                linear.weight.copy_(self.turn(linear.weight * norm.weight))
            norm.weight.fill_(1)
        for linear in (attention.o_proj, mlp.down_proj):
            linear.weight.copy_(self.turn(linear.weight.T).T)
            if linear.bias is not None:
                linear.bias.copy_(self.turn(linear.bias))
        return layer


class Turned:
    """A matrix in a form that wants its inputs turned, and turns them itself."""

    def __init__(self, form: Form, weight: Tensor, bias: Tensor | None = None):
        """weight [out, in], for inputs as they are; bias [out]."""
        self.rotation = Rotation(weight.shape[1])
        self.matrix = form(self.rotation.turn(weight), bias)

    def __call__(self, x: Tensor) -> Tensor:
        """[N, in] -> [N, out]."""
        return self.matrix(self.rotation.turn(x))

    @property
    def nbytes(self) -> int:
        """Bytes that it holds."""
        return self.matrix.nbytes


class AsTheyAre:
    """In place of a Rotation where states need none."""

    def turn(self, x: Tensor) -> Tensor:
        return x

    def turn_back(self, x: Tensor) -> Tensor:
        return x

    def turned(self, layer: nn.Module) -> nn.Module:
        return layer


def between(left: Tensor, x: Tensor, right: Tensor) -> Tensor:
    """x [..., D], cut into a rows of b numbers, between left [a, a] and right [b, b]; in float32."""
    return (left @ x.float().unflatten(-1, (len(left), -1)) @ right).flatten(-2)


def orthogonal(size: int, generator: torch.Generator) -> Tensor:
    """[size, size], float32."""
    return torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))[0].float()
