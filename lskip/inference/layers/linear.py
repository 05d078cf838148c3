"""How a weight is held while decoding: a class with one product."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

EXACT_WIDTH = 4  # rows that products and attention groups see at once where bits must not depend on neighbours

# The products, in the part of Python that TorchScript knows.


def plain_product(x: Tensor, held: tuple[Tensor, Tensor | None]) -> Tensor:
    weight, bias = held
    return F.linear(x, weight, bias)


def plain_plus(residual: Tensor, x: Tensor, held: tuple[Tensor, Tensor | None]) -> Tensor:
    return residual + plain_product(x, held)


def transposed_product(x: Tensor, held: tuple[Tensor, Tensor | None]) -> Tensor:
    weight, bias = held
    return torch.mm(x, weight) if bias is None else torch.addmm(bias, x, weight)


def transposed_plus(residual: Tensor, x: Tensor, held: tuple[Tensor, Tensor | None]) -> Tensor:
    if residual.dtype != x.dtype:
        return residual + transposed_product(x, held)
    weight, bias = held
    return torch.addmm(residual if bias is None else residual + bias, x, weight)


def packed_product(x: Tensor, held: tuple[Tensor, Tensor | None]) -> Tensor:
    weight, bias = held
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def packed_plus(residual: Tensor, x: Tensor, held: tuple[Tensor, Tensor | None]) -> Tensor:
    if residual.dtype != x.dtype:
        return residual + packed_product(x, held)
    weight, bias = held
    return torch.ops.mkldnn._linear_pointwise(x, residual, weight, bias, "add")


def split_product(x: Tensor, held: tuple[Tensor, Tensor | None]) -> Tensor:
    parts, bias = held
    product = torch.bmm(x.expand(parts.size(0), -1, -1), parts).transpose(0, 1).reshape(x.size(0), -1)
    return product if bias is None else product + bias


def split_plus(residual: Tensor, x: Tensor, held: tuple[Tensor, Tensor | None]) -> Tensor:
    return residual + split_product(x, held)


def sliced_product(x: Tensor, held: tuple[Tensor, Tensor | None, int]) -> Tensor:
    weight, bias, width = held
    return torch.cat([F.linear(rows, weight, bias) for rows in x.split(width)])


def sliced_plus(residual: Tensor, x: Tensor, held: tuple[Tensor, Tensor | None, int]) -> Tensor:
    return residual + sliced_product(x, held)


def halved_product(
    x: Tensor, held: tuple[torch.classes.quantized.LinearPackedParamsBase, float, Tensor, Tensor | None]
) -> Tensor:
    packed, _, unit, bias = held
    product = torch.ops.quantized.linear_dynamic_fp16(x, packed).mul_(unit)  # a number would become a tensor each time
    return product if bias is None else product.add_(bias)


def halved_plus(
    residual: Tensor,
    x: Tensor,
    held: tuple[torch.classes.quantized.LinearPackedParamsBase, float, Tensor, Tensor | None],
) -> Tensor:
    packed, unit, _, bias = held
    if bias is not None:
        return residual + halved_product(x, held)
    return torch.add(residual, torch.ops.quantized.linear_dynamic_fp16(x, packed), alpha=unit)


@functools.cache
def scripted(function: Callable) -> Callable:
    """`function` in TorchScript, made once.

    From Python an operation costs microseconds before it begins, one on a matrix that FBGEMM has packed 30.
    """
    return in_torchscript(function)


def in_torchscript(function: Callable) -> Callable:
    """A function or a module in TorchScript, which torch calls deprecated; itself where it no longer has that."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        try:
            return torch.jit.script(function)
        except (AttributeError, OSError, RuntimeError):
            return function


class Plain:
    """The matrix as the checkpoint has it: GPUs, and wherever nothing better exists.

    Attributes:
        product: (x [N, in], held) -> [N, out].
        plus: (residual [N, out], x [N, in], held) -> residual + the product, in the residual's type.

    Both are functions that TorchScript understands, `held` what it can be given (block_functions.py).
    """

    lone_row_width = 1  # rows that a single row is repeated to before the linears see it
    rounds_inputs = False  # then states are turned first (rotation.py), so that few large ones do not set the scale
    inner_dtype: torch.dtype | None = None  # what inputs are best given in, and products come in; None: the model's
    product, plus = staticmethod(plain_product), staticmethod(plain_plus)

    def __init__(self, weight: Tensor, bias: Tensor | None = None):
        """weight [out, in], bias [out]; kept, not copied."""
        self.weight, self.bias = weight, bias
        self.held: tuple = weight, bias

    def __call__(self, x: Tensor) -> Tensor:
        """[N, in] -> [N, out]."""
        return self.product(x, self.held)

    def add_to(self, residual: Tensor, x: Tensor) -> Tensor:
        """residual [N, out] + self([N, in]), in the residual's type."""
        return self.plus(residual, x, self.held)

    @property
    def nbytes(self) -> int:
        """Bytes that it holds. An opaque layout does not tell its padding: its numbers are counted."""
        parts = [part for part in self.held if isinstance(part, Tensor)]
        return sum(part.numel() * part.element_size() for part in parts)


class Transposed(Plain):
    """The matrix stored [in, out]: on some CPUs the kernel for few rows that reads memory fastest (float32)."""

    product, plus = staticmethod(transposed_product), staticmethod(transposed_plus)

    def __init__(self, weight: Tensor, bias: Tensor | None = None):
        """weight [out, in] is copied into the new layout; bias [out] is kept."""
        super().__init__(weight.t().contiguous(), bias)


class Split(Plain):
    """The matrix as it is, taken as four: torch.bmm of a few rows reads it faster than F.linear does on some CPUs."""

    product, plus = staticmethod(split_product), staticmethod(split_plus)

    def __init__(self, weight: Tensor, bias: Tensor | None = None):
        """weight [out, in], bias [out]; kept, not copied.

        Raises:
            ValueError: `out` is not a multiple of four.
        """
        if len(weight) % 4:
            raise ValueError(f"it has {len(weight)} rows, not a multiple of 4")
        super().__init__(weight.view(4, -1, weight.shape[1]).transpose(1, 2), bias)


class Packed(Plain):
    """The matrix in oneDNN's blocked layout, made once at load (float32 or bfloat16).

    On some CPUs `F.linear` arranges the matrix anew at every call, which for a few rows is most of its time.
    """

    expected_rows = 8  # oneDNN picks the layout for this many; it suits 1 to 16
    product, plus = staticmethod(packed_product), staticmethod(packed_plus)

    def __init__(self, weight: Tensor, bias: Tensor | None = None):
        """weight [out, in] is copied into the new layout; bias [out] is kept."""
        super().__init__(torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), self.expected_rows), bias)


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
    product, plus = staticmethod(halved_product), staticmethod(halved_plus)

    def __init__(self, weight: Tensor, bias: Tensor | None = None):
        """weight [out, in] is copied; bias [out] too where it is not float32.

        Raises:
            ValueError: numbers that need more than 16 bits.
        """
        power = power_to_halve(weight)
        if power is None:
            raise ValueError("its numbers do not fit into 16 bits without loss")
        self.shape, self.bias = weight.shape, None if bias is None else bias.float()
        packed = torch.ops.quantized.linear_prepack_fp16(weight.float() * 2.0**power, None)
        unit = 2.0**-power
        self.held = packed, unit, torch.tensor(unit), self.bias

    def __call__(self, x: Tensor) -> Tensor:
        return scripted(self.product)(x, self.held)

    @property
    def nbytes(self) -> int:
        return 2 * self.shape.numel() + (0 if self.bias is None else self.bias.nbytes)


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

    product, plus = staticmethod(sliced_product), staticmethod(sliced_plus)

    def __init__(self, weight: Tensor, bias: Tensor | None = None):
        super().__init__(weight, bias)
        self.held = weight, bias, EXACT_WIDTH


class Mixed:
    """In place of one form for all matrices: for each shape of matrix its own."""

    lone_row_width, rounds_inputs, inner_dtype = Plain.lone_row_width, Plain.rounds_inputs, Plain.inner_dtype

    def __init__(self, by_shape: dict[tuple[int, int], type[Plain]], otherwise: type[Plain]):
        """by_shape: (out, in) -> form; otherwise: of other shapes."""
        self.by_shape, self.otherwise = by_shape, otherwise

    def __call__(self, weight: Tensor, bias: Tensor | None = None) -> Plain:
        """weight [out, in], bias [out], held."""
        return self.by_shape.get(tuple(weight.shape), self.otherwise)(weight, bias)

    @property
    def __name__(self) -> str:
        return "+".join(sorted({form.__name__ for form in self.by_shape.values()}))


Form = type[Plain] | Mixed


def hold(form: Form, weight: Tensor, bias: Tensor | None = None) -> Plain:
    """weight [out, in] in `form`.

    A single matrix that cannot be, Halved or Convolved say, is packed as float32, or plain where no matrix can be.
    """
    try:
        return form(weight, bias)
    except ValueError:
        pass
    try:
        return Widened(weight, bias)
    except (AttributeError, RuntimeError):
        return Plain(weight.float(), None if bias is None else bias.float())
