"""Weights rounded to 8 or 4 bits: for drafts only, since the model's own text needs the model's own weights."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lskip.inference.layers.bagged import Bagged, bags, in_parts
from lskip.inference.layers.linear import Form, Plain, scripted
from lskip.inference.layers.linear_choice import fastest_by_shape

GROUP = 32  # weights of a row that share a scale in int4
ROWS_AT_ONCE = 1024  # of a matrix that is converted: more leave the CPU's caches, and take five times as long
LEVELS = 127  # to either side of 0 in int8
KERNEL_DTYPE = torch.bfloat16  # of activations and scales: the kernels for other types are ten times slower


def int8_product(x: Tensor, held: tuple[Tensor, Tensor, Tensor | None]) -> Tensor:
    weight, scale, bias = held
    product = torch._weight_int8pack_mm(x.to(scale.dtype), weight, scale)
    return product if bias is None else product + bias


def int8_plus(residual: Tensor, x: Tensor, held: tuple[Tensor, Tensor, Tensor | None]) -> Tensor:
    return residual + int8_product(x, held)


def bagged_int8_product(x: Tensor, held: tuple[Tensor, Tensor, Tensor, int, Tensor | None]) -> Tensor:
    table, rows, starts, parts, bias = held
    count = x.size(0)
    share = x.float().expand(parts, -1, -1).flatten()
    if count > 1:  # a part after another, for all rows: it stays in the CPU's caches
        rows = rows.view(parts, 1, -1).expand(-1, count, -1).flatten()
        starts = torch.arange(0, rows.size(0), x.size(1), dtype=rows.dtype)
    sums = torch.ops.quantized.embedding_bag_byte_rowwise_offsets(
        table, rows, starts, False, 0, False, share, None, False
    )
    product = sums.view(parts, count, -1).transpose(0, 1).reshape(count, -1)
    return product if bias is None else product + bias


def bagged_int8_plus(residual: Tensor, x: Tensor, held: tuple[Tensor, Tensor, Tensor, int, Tensor | None]) -> Tensor:
    return residual + bagged_int8_product(x, held)


def int4_product(x: Tensor, held: tuple[Tensor, Tensor, int, int, Tensor | None]) -> Tensor:
    weight, scale_and_zero, group, out, bias = held
    product = torch._weight_int4pack_mm_for_cpu(x.to(scale_and_zero.dtype), weight, group, scale_and_zero)
    if product.size(1) != out:
        product = product[:, :out]
    return product if bias is None else product + bias


def int4_plus(residual: Tensor, x: Tensor, held: tuple[Tensor, Tensor, int, int, Tensor | None]) -> Tensor:
    return residual + int4_product(x, held)


def dynamic_product(x: Tensor, held: tuple[torch.classes.quantized.LinearPackedParamsBase]) -> Tensor:
    return torch.ops.quantized.linear_dynamic(x.float(), held[0], False)  # False: inputs in all 8 bits


def dynamic_plus(residual: Tensor, x: Tensor, held: tuple[torch.classes.quantized.LinearPackedParamsBase]) -> Tensor:
    return residual + dynamic_product(x, held)


class Int8(Plain):
    """One scale a row, symmetric; inputs of any type, the product in bfloat16, the sum in the residual's type. CPU."""

    inner_dtype = KERNEL_DTYPE
    product, plus = staticmethod(int8_product), staticmethod(int8_plus)

    def __init__(self, weight: Tensor, bias: Tensor | None = None):
        """weight [out, in] is rounded into 8 bits; bias [out] into bfloat16."""
        rounded, scale = round_to_int8(weight, LEVELS)
        self.held = rounded, scale.to(KERNEL_DTYPE), None if bias is None else bias.to(KERNEL_DTYPE)


class BaggedInt8(Plain):
    """A scale and a zero point for each part of a column, as Bagged has them; inputs and products in float32. CPU.

    It gets about half as many tokens wrong as DynamicInt8, in about the same time for one row; each further one takes
    half as long again.
    """

    inner_dtype = torch.float32
    product, plus = staticmethod(bagged_int8_product), staticmethod(bagged_int8_plus)
    nbytes = Bagged.nbytes

    def __init__(self, weight: Tensor, bias: Tensor | None = None):
        """weight [out, in] is rounded, `out` a multiple of 8 (ValueError else); bias [out] is kept, as float32."""
        parts = in_parts(weight.float())
        table = torch.ops.quantized.embedding_bag_byte_prepack(parts.flatten(0, 1))
        self.weight, self.bias = table, None if bias is None else bias.float()
        self.held = table, *bags(len(parts), weight.shape[1]), len(parts), self.bias


class DynamicInt8(Plain):
    """Weights in 161 levels, a scale a row, and inputs in 256, one scale for all rows; multiplied as whole numbers.

    On a CPU without AVX-512 it takes about half of Int8's time for one row and a third for six; BaggedInt8 is as fast
    for one. FBGEMM's kernel, x86 alone.
    """

    rounds_inputs = True
    levels = 80  # AVX2 sums two products in 16 bits: with inputs in 8 hardly any overflow yet, at 96 some do
    inner_dtype = torch.float32
    product, plus = staticmethod(dynamic_product), staticmethod(dynamic_plus)

    def __init__(self, weight: Tensor, bias: Tensor | None = None):
        """weight [out, in] is rounded; bias [out] is kept, as float32."""
        rounded, scale = round_to_int8(weight, self.levels)
        zeros = torch.zeros(len(scale), dtype=torch.long)
        self.shape, self.bias = weight.shape, None if bias is None else bias.float()
        with warnings.catch_warnings():  # torch means to drop this kind of tensor; `obstacle_to_rounding` will tell
            warnings.filterwarnings("ignore", message=".*quantize", category=UserWarning)
            matrix = torch._make_per_channel_quantized_tensor(rounded, scale.double(), zeros, 0)
        self.held = (torch.ops.quantized.linear_prepack(matrix, self.bias),)

    def __call__(self, x: Tensor) -> Tensor:
        return scripted(self.product)(x, self.held)

    @property
    def nbytes(self) -> int:
        return self.shape.numel() + 4 * self.shape[0] + (0 if self.bias is None else self.bias.nbytes)


def round_to_int8(weight: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    """[out, in] -> whole numbers from -levels to levels, and the scale [out] of each row."""
    parts = weight.split(ROWS_AT_ONCE)
    scales = [(part.float().abs().amax(1) / levels).clamp(min=1e-12) for part in parts]
    rounded = [torch.round(part / scale[:, None]).to(torch.int8) for part, scale in zip(parts, scales, strict=True)]
    return torch.cat(rounded), torch.cat(scales)


class Int4(Plain):
    """A scale and a zero point for each 32 weights of a row; else as Int8. CPU."""

    inner_dtype = KERNEL_DTYPE
    product, plus = staticmethod(int4_product), staticmethod(int4_plus)

    def __init__(self, weight: Tensor, bias: Tensor | None = None):
        """weight [out, in] is rounded into 4 bits, `in` a multiple of 32; bias [out] into bfloat16."""
        padded = F.pad(weight.float(), (0, 0, 0, -len(weight) % 16))  # the kernel wants a multiple of 16 rows
        groups = padded.unflatten(1, (-1, GROUP))  # [out, in / 32, 32]
        low, high = groups.amin(-1), groups.amax(-1)
        scale = ((high - low) / 15).clamp(min=1e-12)
        levels = torch.round((groups - low[..., None]) / scale[..., None]).clamp(0, 15).int().flatten(1)
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(levels, 1)
        # The kernel counts levels from the middle: weight = (level - 8) scale + zero.
        scale_and_zero = torch.stack([scale, low + 8 * scale], -1).transpose(0, 1).to(KERNEL_DTYPE).contiguous()
        self.held = packed, scale_and_zero, GROUP, len(weight), None if bias is None else bias.to(KERNEL_DTYPE)


# What bears the name, and what holds a shape of matrix in its place where that is faster (bags lose less than 4 bits).
DRAFT_FORMS = {"int8": (Int8, BaggedInt8), "int4": (Int4, BaggedInt8), "int8_dynamic": (DynamicInt8,)}
# The head decides between close logits: in 4 bits it costs a fifth of the accepted tokens, in 8 next to nothing.
HEAD_FORMS = {"int4": Int8}  # where it is not the form of the blocks


def choose_draft_form(form: str, samples: list[Tensor], rows: int = 1) -> Form:
    """The class for `form`, a name in DRAFT_FORMS, or the fastest ones by shape, as timed on `samples` [out, in].

    Args:
        rows: texts that are decoded together.

    Raises:
        ValueError: unknown form, or one that does not work here.
    """
    if form not in DRAFT_FORMS:
        raise ValueError(f"draft_weights: {form!r} is not one of {', '.join(DRAFT_FORMS)}")
    named, *others = DRAFT_FORMS[form]
    if reason := next(filter(None, (obstacle_to_rounding(named, sample) for sample in samples)), None):
        raise ValueError(f"draft_weights: {form!r} does not work here ({reason}); leave it out")
    return fastest_by_shape([named, *usable_forms(others, samples)], samples, ((1, rows),))


def usable_forms(forms: Sequence[type[Plain]], samples: list[Tensor]) -> list[type[Plain]]:
    """Those that work on all `samples` [out, in]."""
    return [form for form in forms if all(obstacle_to_rounding(form, sample) is None for sample in samples)]


def obstacle_to_rounding(form: Form, sample: Tensor) -> str | None:
    """Why `sample` [out, in] cannot be rounded and multiplied on this machine; None when it comes out about right."""
    if sample.device.type != "cpu":
        return f"the model is on {sample.device.type}, these kernels are for the CPU"
    if sample.shape[1] % 16:  # the int8 kernel would read beyond the matrix, without a word
        return f"a matrix takes {sample.shape[1]} numbers, not a multiple of 16"
    row = torch.linspace(-1, 1, sample.shape[1], dtype=sample.dtype)[None]
    try:
        product = form(sample)(row)
    except (AttributeError, RuntimeError, ValueError) as error:
        return str(error).splitlines()[0]
    exact = (row.double() @ sample.double().T).norm()
    error = (product.double() - row.double() @ sample.double().T).norm()
    return None if error <= 0.25 * exact else "its products differ from torch's"
