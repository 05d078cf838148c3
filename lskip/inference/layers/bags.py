"""Layouts of a weight matrix as bags of embeddings: a lone row's product reads it from its first number to its last."""

import functools

import torch
from torch import Tensor

from lskip.inference.layers.linear import ROUNDED, Plain

FEW = 8  # rows that bags multiply one by one: for more it is quicker to make float32 numbers of all weights first
SCALED = 96  # numbers of 8 bits that share a scale, at most: fewer take longer, more lose more in perplexity
WIDEST = 120  # numbers of an embedding: more do not fit into the 16 registers of AVX2 beside what else is there
SHARES = 4  # that parts of 8 bits can be dealt out in: 9 parts take two threads as long as 10


def bagged_product(x: Tensor, packed: tuple[Tensor, Tensor | None, Tensor, Tensor]) -> Tensor:
    parts, bias, rows, starts = packed
    if x.size(0) > 1:
        product = torch.bmm(x.expand(parts.size(0), -1, -1), parts).transpose(0, 1).reshape(x.size(0), -1)
    else:
        share = x.expand(parts.size(0), -1).flatten()
        sums, _, _, _ = torch.embedding_bag(
            parts.flatten(0, 1), rows, starts, scale_grad_by_freq=False, mode=0, sparse=False, per_sample_weights=share
        )
        product = sums.view(1, -1)
    return product if bias is None else product + bias


def bagged_int8_product(x: Tensor, packed: tuple[Tensor, Tensor, Tensor, int, int, Tensor | None]) -> Tensor:
    table, rows, starts, parts, few, bias = packed
    count = x.size(0)
    if count > few:
        numbers = torch.ops.quantized.embedding_bag_byte_unpack(table).view(parts, x.size(1), -1)
        sums = torch.bmm(x.float().expand(parts, -1, -1), numbers)
    else:
        share = x.float().expand(parts, -1, -1).flatten()
        if count > 1:  # a part after another, for all rows: it stays in the CPU's caches
            rows = rows.view(parts, 1, -1).expand(-1, count, -1).flatten()
            starts = torch.arange(0, rows.size(0), x.size(1), dtype=rows.dtype)
        sums = torch.ops.quantized.embedding_bag_byte_rowwise_offsets(
            table, rows, starts, False, 0, False, share, None, False
        )
    product = sums.view(parts, count, -1).transpose(0, 1).reshape(count, -1)
    return product if bias is None else product + bias


class Bagged(Plain):
    """The matrix in parts of some outputs each, [in, part], one after another in memory (float32).

    A lone row's product with a part is a sum of its rows, weighted: a bag of embeddings. FBGEMM's kernel for these
    keeps the sum in registers while it reads the part from its first number to its last, and fetches ahead. Several
    rows go by torch.bmm over the parts.
    """

    product = staticmethod(bagged_product)

    def __init__(self, weight: Tensor, bias: Tensor | None = None):
        """Copy weight [out, in] into the new layout; keep bias [out].

        Raises:
            ValueError: it is not float32, or `out` not a multiple of 8.
        """
        if weight.dtype != torch.float32:
            raise ValueError(f"not for {weight.dtype}")
        super().__init__(in_parts(weight, WIDEST), bias)
        self.packed = self.weight, bias, *bags(len(self.weight), weight.shape[1])

    @property
    def nbytes(self) -> int:
        """Count the bytes without the bags, which all matrices of a shape share."""
        return self.weight.nbytes + (0 if self.bias is None else self.bias.nbytes)


class BaggedInt8(Plain):
    """A scale and a zero point for each part of a column, as Bagged has them; inputs and products in float32. CPU.

    For one row faster than quantized.Int8, with finer scales; each further row takes half as long again. Up to FEW rows
    the bits of each do not depend on the others. More are multiplied by the same numbers, and are rounded otherwise.
    """

    inner_dtype = torch.float32
    error = ROUNDED
    product = staticmethod(bagged_int8_product)
    nbytes = Bagged.nbytes

    def __init__(self, weight: Tensor, bias: Tensor | None = None):
        """Round weight [out, in], keep bias [out] as float32; ValueError unless `out` is a multiple of 8."""
        parts = in_parts(weight.float(), SCALED, SHARES)
        table = torch.ops.quantized.embedding_bag_byte_prepack(parts.flatten(0, 1))
        self.weight, self.bias, self.parts = table, None if bias is None else bias.float(), len(parts)
        self.packed = table, *bags(len(parts), weight.shape[1]), len(parts), FEW, self.bias

    @property
    def numbers(self) -> Tensor:
        """The rounded weight, [out, in]."""
        parts = torch.ops.quantized.embedding_bag_byte_unpack(self.weight).unflatten(0, (self.parts, -1))
        return parts.transpose(1, 2).flatten(0, 1)


def bags_pay() -> bool:
    """Say whether bags are the fastest for a lone row of float32, and as fast as oneDNN for several: with AVX2 alone.

    With AVX-512 oneDNN takes half of their time for three rows and more.
    """
    return torch.backends.cpu.get_cpu_capability() == "AVX2"


def in_parts(weight: Tensor, widest: int, shares: int = 1) -> Tensor:
    """Return [out, in] as [parts, in, part], the widest parts allowed; ValueError where `out` is no multiple of 8.

    Parts come in as many `shares` as are asked for, unless that would make them less than half as wide.
    """
    if len(weight) % 8:
        raise ValueError(f"it has {len(weight)} rows, not a multiple of 8")
    widths = [width for width in range(8, widest + 1, 8) if len(weight) % width == 0]
    shared = [width for width in widths if len(weight) // width % shares == 0 and 2 * width >= widths[-1]]
    width = max(shared or widths)
    return weight.unflatten(0, (-1, width)).transpose(1, 2).contiguous()


@functools.cache
def bags(count: int, size: int) -> tuple[Tensor, Tensor]:
    """Return `count` bags of `size` embeddings each, one after another: which ones, and where each bag begins."""
    return torch.arange(count * size, dtype=torch.int32), torch.arange(0, count * size, size, dtype=torch.int32)
