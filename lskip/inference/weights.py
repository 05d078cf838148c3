"""How a weight is held while decoding: a class with one product."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


class Plain:
    """The matrix as the checkpoint has it: GPUs, and wherever nothing better exists."""

    lone_row_width = 1  # rows that a single row is repeated to before the linears see it
    inner_dtype: torch.dtype | None = None  # what inputs are best given in, and products come in; None: the model's

    def __init__(self, weight: Tensor, bias: Tensor | None = None):
        """weight [out, in], bias [out]; kept, not copied."""
        self.weight, self.bias = weight, bias

    def __call__(self, x: Tensor) -> Tensor:
        """[N, in] -> [N, out]."""
        return F.linear(x, self.weight, self.bias)

    def add_to(self, residual: Tensor, x: Tensor) -> Tensor:
        """residual [N, out] + self([N, in]), in the residual's type."""
        return residual + self(x)

    @property
    def nbytes(self) -> int:
        """Bytes that it holds. An opaque layout does not tell its padding: its numbers are counted."""
        parts = [part for part in vars(self).values() if isinstance(part, Tensor)]
        return sum(part.numel() * part.element_size() for part in parts)


class Transposed(Plain):
    """The matrix stored [in, out]: on some CPUs the kernel for few rows that reads memory fastest (float32)."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None):
        """weight [out, in] is copied into the new layout; bias [out] is kept."""
        super().__init__(weight.t().contiguous(), bias)

    def __call__(self, x: Tensor) -> Tensor:
        return torch.mm(x, self.weight) if self.bias is None else torch.addmm(self.bias, x, self.weight)

    def add_to(self, residual: Tensor, x: Tensor) -> Tensor:
        if residual.dtype is not x.dtype:
            return super().add_to(residual, x)
        if self.bias is not None:
            residual = residual + self.bias
        return torch.addmm(residual, x, self.weight)


class Packed(Plain):
    """The matrix in oneDNN's blocked layout, made once at load (float32 or bfloat16).

    On some CPUs `F.linear` arranges the matrix anew at every call, which for a few rows is most of its time.
    """

    expected_rows = 8  # oneDNN picks the layout for this many; it suits 1 to 16

    def __init__(self, weight: Tensor, bias: Tensor | None = None):
        """weight [out, in] is copied into the new layout; bias [out] is kept."""
        super().__init__(torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), self.expected_rows), bias)
        self._product = torch.ops.mkldnn._linear_pointwise.default
        self._product_plus = torch.ops.mkldnn._linear_pointwise.binary

    def __call__(self, x: Tensor) -> Tensor:
        return self._product(x, self.weight, self.bias, "none", [], "")

    def add_to(self, residual: Tensor, x: Tensor) -> Tensor:
        if residual.dtype is not x.dtype:
            return super().add_to(residual, x)
        return self._product_plus(x, residual, self.weight, self.bias, "add")


class PackedWide(Packed):
    """Packed, with a lone row sent as four: a single row goes to another kernel, on some CPUs a slower one."""

    lone_row_width = 4


class Widened(Packed):
    """bfloat16 weights packed as float32, twice as large: for CPUs that have no bfloat16 products.

    There torch's own are slow, for several rows most of all. The text is that of float32 arithmetic on these weights.
    """

    inner_dtype = torch.float32

    def __init__(self, weight: Tensor, bias: Tensor | None = None):
        """weight [out, in] is copied, widened; bias [out] too."""
        super().__init__(weight.float(), None if bias is None else bias.float())


class Halved(Plain):
    """float16 numbers times a power of two, multiplied in float32: half the bytes, and no number of the matrix changes.

    For matrices whose numbers allow it, as those of a bfloat16 checkpoint do, whatever type they are loaded in.
    Products and sums are float32 (FBGEMM's kernels: x86 alone, no AVX-512 needed).
    """

    inner_dtype = torch.float32

    def __init__(self, weight: Tensor, bias: Tensor | None = None):
        """weight [out, in] is copied; bias [out] too where it is not float32.

        Raises:
            ValueError: numbers that need more than 16 bits.
        """
        power = power_to_halve(weight)
        if power is None:
            raise ValueError("its numbers do not fit into 16 bits without loss")
        self.shape, self.bias = weight.shape, None if bias is None else bias.float()
        self.unit = 2.0**-power
        self._unit = torch.tensor(self.unit)  # of a number torch would make a tensor at every product
        self.packed = torch.ops.quantized.linear_prepack_fp16(weight.float() * 2.0**power, None)
        self._product, self._sum = scripted(halved_product), scripted(halved_sum)

    def __call__(self, x: Tensor) -> Tensor:
        product = self._product(x, self.packed, self._unit)
        return product if self.bias is None else product.add_(self.bias)

    def add_to(self, residual: Tensor, x: Tensor) -> Tensor:
        if self.bias is not None:
            return super().add_to(residual, x)
        return self._sum(residual, x, self.packed, self.unit)

    @property
    def nbytes(self) -> int:
        return 2 * self.shape.numel() + (0 if self.bias is None else self.bias.nbytes)


@functools.cache
def scripted(function: Callable) -> Callable:
    """`function` in TorchScript; itself where a torch or a Python no longer has that (torch calls it deprecated).

    To hand over a matrix that FBGEMM has packed takes torch 30 µs from Python, a seventh of a product of 500,000
    weights, and none in there.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        try:
            return torch.jit.script(function)
        except (AttributeError, OSError, RuntimeError):
            return function


def halved_product(x: Tensor, packed: torch.classes.quantized.LinearPackedParamsBase, unit: Tensor) -> Tensor:
    return torch.ops.quantized.linear_dynamic_fp16(x, packed).mul_(unit)


def halved_sum(
    residual: Tensor, x: Tensor, packed: torch.classes.quantized.LinearPackedParamsBase, unit: float
) -> Tensor:
    return torch.add(residual, torch.ops.quantized.linear_dynamic_fp16(x, packed), alpha=unit)


def power_to_halve(weight: Tensor) -> int | None:
    """k such that float16 holds each of weight's numbers times 2^k exactly; None where there is none.

    With the largest one at the top of float16's range, 8 bits of precision (bfloat16's) reach down to 2^-32 of it.
    """
    largest = weight.abs().max().float()
    if not torch.isfinite(largest):
        return None
    power = min(15 - int(torch.frexp(largest).exponent), 100)  # the largest becomes one of 2^14 … 2^15
    scaled = weight.float() * 2.0**power
    return power if torch.equal(scaled.half().float(), scaled) else None


class Sliced(Plain):
    """Plain, four rows at a time: whatever kernel takes them, every row meets the same product."""

    def __call__(self, x: Tensor) -> Tensor:
        return torch.cat([F.linear(rows, self.weight, self.bias) for rows in x.split(EXACT_WIDTH)])


Form = type[Plain]
EXACT_WIDTH = 4  # rows that products and attention groups see at once where bits must not depend on neighbours


def hold(form: Form, weight: Tensor, bias: Tensor | None = None) -> Plain:
    """weight [out, in] in `form`. A single matrix that cannot be Halved, in a model that is, is packed as float32."""
    try:
        return form(weight, bias)
    except ValueError:
        return Widened(weight, bias)
