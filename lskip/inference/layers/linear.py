"""Layouts of a weight matrix for decoding: how it lies in memory, and its product with a few rows."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lskip.inference.layers.torchscript import scripted

EXACT_WIDTH = 4  # rows that products and attention groups see at once where bits must not depend on neighbours
ROUNDED = 0.25  # of a product: how far rounded weights may be off

# The products, in the part of Python that TorchScript knows.


def plain_product(x: Tensor, packed: tuple[Tensor, Tensor | None]) -> Tensor:
    weight, bias = packed
    return F.linear(x, weight, bias)


def packed_product(x: Tensor, packed: tuple[Tensor, Tensor | None]) -> Tensor:
    weight, bias = packed
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def packed_plus(residual: Tensor, x: Tensor, packed: tuple[Tensor, Tensor | None]) -> Tensor:
    if residual.dtype != x.dtype:
        return residual + packed_product(x, packed)
    weight, bias = packed
    return torch.ops.mkldnn._linear_pointwise(x, residual, weight, bias, "add")


def sliced_product(x: Tensor, packed: tuple[Tensor, Tensor | None, int]) -> Tensor:
    weight, bias, width = packed
    return torch.cat([F.linear(rows, weight, bias) for rows in x.split(width)])


def halved_product(
    x: Tensor, packed: tuple[torch.classes.quantized.LinearPackedParamsBase, float, Tensor, Tensor | None]
) -> Tensor:
    weight, _, unit, bias = packed
    product = torch.ops.quantized.linear_dynamic_fp16(x, weight).mul_(unit)  # a number would become a tensor each time
    return product if bias is None else product.add_(bias)


def halved_plus(
    residual: Tensor,
    x: Tensor,
    packed: tuple[torch.classes.quantized.LinearPackedParamsBase, float, Tensor, Tensor | None],
) -> Tensor:
    weight, unit, _, bias = packed
    if bias is not None:
        return residual + halved_product(x, packed)
    return torch.add(residual, torch.ops.quantized.linear_dynamic_fp16(x, weight), alpha=unit)


class Plain:
    """The matrix as the checkpoint has it, and the interface of every layout.

    Attributes:
        product: (x [N, in], packed) -> [N, out].
        plus: (residual [N, out], x [N, in], packed) -> residual + the product, in the residual's type; None: there
            is nothing faster than to add them.
        packed: what both are given.
        error: how far products are off from exact ones, at most; None: by rounding to the matrix's type alone.

    Both are functions that TorchScript understands (torchscript.py).
    """

    inner_dtype: torch.dtype | None = None  # what inputs are best given in, and products come in; None: the model's
    error: float | None = None
    product: Callable = staticmethod(plain_product)
    plus: Callable | None = None

    def __init__(self, weight: Tensor, bias: Tensor | None = None):
        """Keep weight [out, in] and bias [out], without a copy."""
        self.weight, self.bias = weight, bias
        self.packed: tuple = weight, bias

    def __call__(self, x: Tensor) -> Tensor:
        """Return the product of [N, in], [N, out]."""
        return self.product(x, self.packed)

    def add_to(self, residual: Tensor, x: Tensor) -> Tensor:
        """Return residual [N, out] + self([N, in]), in the residual's type."""
        return residual + self(x) if self.plus is None else self.plus(residual, x, self.packed)

    @property
    def nbytes(self) -> int:
        """Count the bytes of its tensors. An opaque one does not tell its padding: its numbers are counted."""
        tensors = [part for part in self.packed if isinstance(part, Tensor)]
        return sum(part.numel() * part.element_size() for part in tensors)


Layout = type[Plain]


class Packed(Plain):
    """The matrix in oneDNN's blocked layout, made once at load (float32 or bfloat16).

    On some CPUs `F.linear` arranges the matrix anew at every call, which for a few rows is most of its time.
    """

    expected_rows = 8  # oneDNN picks the layout for this many; it suits 1 to 16
    product, plus = staticmethod(packed_product), staticmethod(packed_plus)

    def __init__(self, weight: Tensor, bias: Tensor | None = None):
        """Copy weight [out, in] into the new layout; keep bias [out]."""
        super().__init__(torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), self.expected_rows), bias)


class Widened(Packed):
    """bfloat16 weights packed as float32, twice as large: for CPUs that have no bfloat16 products.

    There torch's own are slow, for several rows most of all. The text is that of float32 arithmetic on these weights.
    """

    inner_dtype = torch.float32

    def __init__(self, weight: Tensor, bias: Tensor | None = None):
        """Copy weight [out, in] and bias [out], widened."""
        super().__init__(weight.float(), None if bias is None else bias.float())


class Halved(Plain):
    """float16 numbers times a power of two, multiplied in float32: half the bytes, and no number of the matrix changes.

    For matrices whose numbers allow it, as those of a bfloat16 checkpoint do, whatever type they are loaded in.
    Products and sums are float32 (FBGEMM's kernels: x86 alone, no AVX-512 needed).
    """

    inner_dtype = torch.float32
    product, plus = staticmethod(halved_product), staticmethod(halved_plus)

    def __init__(self, weight: Tensor, bias: Tensor | None = None):
        """Copy weight [out, in]; bias [out] too where it is not float32.

        Raises:
            ValueError: numbers that need more than 16 bits.
        """
        power = power_to_halve(weight)
        if power is None:
            raise ValueError("its numbers do not fit into 16 bits without loss")
        self.shape, self.bias = weight.shape, None if bias is None else bias.float()
        halved = torch.ops.quantized.linear_prepack_fp16(weight.float() * 2.0**power, None)
        unit = 2.0**-power
        self.packed = halved, unit, torch.tensor(unit), self.bias

    def __call__(self, x: Tensor) -> Tensor:
        return scripted(self.product)(x, self.packed)

    @property
    def nbytes(self) -> int:
        return 2 * self.shape.numel() + (0 if self.bias is None else self.bias.nbytes)


def power_to_halve(weight: Tensor) -> int | None:
    """Return a k such that float16 holds each of weight's numbers times 2^k exactly; None where there is none.

    With the largest one at the top of float16's range, 8 bits of precision (bfloat16's) reach down to 2^-32 of it.
    """
    if len(weight) > 1 and power_to_halve(weight[:1]) is None:  # soon seen where numbers have all their bits
        return None
    largest = weight.abs().max().float()
    if not torch.isfinite(largest):
        return None
    power = min(15 - int(torch.frexp(largest).exponent), 100)  # the largest becomes one of 2^14 … 2^15
    scaled = weight.float() * 2.0**power
    return power if torch.equal(scaled.half().float(), scaled) else None


class Sliced(Plain):
    """Plain, four rows at a time: whatever kernel takes them, every row meets the same product."""

    product = staticmethod(sliced_product)

    def __init__(self, weight: Tensor, bias: Tensor | None = None):
        super().__init__(weight, bias)
        self.packed = weight, bias, EXACT_WIDTH


def pack(layouts: Sequence[Layout], weight: Tensor, bias: Tensor | None = None) -> Plain:
    """Return weight [out, in] and bias [out] in the first of `layouts` that can hold them, else plain."""
    for layout in layouts:
        try:
            return layout(weight, bias)
        except ValueError:  # its numbers or its shape do not allow it
            continue
    dtype = layouts[0].inner_dtype or weight.dtype
    return Plain(weight.to(dtype), None if bias is None else bias.to(dtype))
