"""A matrix held as rows of an embedding table, which torch reads faster for a lone row than any of its products do."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from lskip.inference.layers.linear import Plain, split_product

WIDEST = 120  # numbers of an embedding: more do not fit into the 16 registers of AVX2 beside what else is there


def bagged_product(x: Tensor, held: tuple[Tensor, Tensor | None, Tensor, Tensor]) -> Tensor:
    parts, bias, rows, starts = held
    if x.size(0) > 1:
        return split_product(x, (parts, bias))
    share = x.expand(parts.size(0), -1).flatten()
    sums, _, _, _ = torch.embedding_bag(
        parts.flatten(0, 1), rows, starts, scale_grad_by_freq=False, mode=0, sparse=False, per_sample_weights=share
    )
    product = sums.view(1, -1)
    return product if bias is None else product + bias


def bagged_plus(residual: Tensor, x: Tensor, held: tuple[Tensor, Tensor | None, Tensor, Tensor]) -> Tensor:
    return residual + bagged_product(x, held)


class Bagged(Plain):
    """The matrix in parts of some outputs each, [in, part], one after another in memory (float32).

    A lone row's product with a part is a sum of its rows, weighted: a bag of embeddings. FBGEMM's kernel for these
    keeps the sum in registers while it reads the part from its first number to its last, and fetches ahead. Several
    rows go by torch.bmm, as with Split.
    """

    product, plus = staticmethod(bagged_product), staticmethod(bagged_plus)

    def __init__(self, weight: Tensor, bias: Tensor | None = None):
        """weight [out, in] is copied into the new layout; bias [out] is kept.

        Raises:
            ValueError: it is not float32, or `out` not a multiple of 8.
        """
        if weight.dtype != torch.float32:
            raise ValueError(f"not for {weight.dtype}")
        super().__init__(in_parts(weight), bias)
        self.held = self.weight, bias, *bags(len(self.weight), weight.shape[1])

    @property
    def nbytes(self) -> int:
        """Without the bags, which all matrices of a shape share."""
        return self.weight.nbytes + (0 if self.bias is None else self.bias.nbytes)


def in_parts(weight: Tensor) -> Tensor:
    """[out, in] -> [parts, in, part], as wide as parts may be; ValueError where `out` is not a multiple of 8."""
    if len(weight) % 8:
        raise ValueError(f"it has {len(weight)} rows, not a multiple of 8")
    width = max(count for count in range(8, WIDEST + 1, 8) if len(weight) % count == 0)
    return weight.unflatten(0, (-1, width)).transpose(1, 2).contiguous()


@functools.cache
def bags(count: int, size: int) -> tuple[Tensor, Tensor]:
    """`count` bags of `size` embeddings each, one after another: which ones, and where each bag begins."""
    return torch.arange(count * size, dtype=torch.int32), torch.arange(0, count * size, size, dtype=torch.int32)
