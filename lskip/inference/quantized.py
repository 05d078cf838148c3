"""Weights rounded to 8 or 4 bits: for drafts only, since the model's own text needs the model's own weights."""

from __future__ import annotations

import warnings

import torch
import torch.nn.functional as F
from torch import Tensor

from lskip.inference.weights import Form, Plain, scripted

GROUP = 32  # weights of a row that share a scale in int4
KERNEL_DTYPE = torch.bfloat16  # of activations and scales: the kernels for other types are ten times slower


class Rounded(Plain):
    """What Int8 and Int4 share: inputs of any type, products in bfloat16, and the sum in the residual's type."""

    inner_dtype = KERNEL_DTYPE

    def __call__(self, x: Tensor) -> Tensor:
        product = self._product(x.to(KERNEL_DTYPE))
        return product if self.bias is None else product + self.bias.to(KERNEL_DTYPE)

    def _product(self, x: Tensor) -> Tensor:
        """bfloat16 [N, in] -> [N, out]."""
        raise NotImplementedError


class Int8(Rounded):
    """One scale a row, symmetric; the product in bfloat16. CPU."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None):
        """weight [out, in] is rounded into 8 bits; bias [out] is kept."""
        rounded, scale = round_to_int8(weight)
        super().__init__(rounded, bias)
        self.scale = scale.to(KERNEL_DTYPE)

    def _product(self, x: Tensor) -> Tensor:
        return torch._weight_int8pack_mm(x, self.weight, self.scale)


class DynamicInt8(Plain):
    """Int8 whose inputs are rounded too, to 7 bits with one scale for all rows, and multiplied as whole numbers.

    On a CPU without AVX-512 it takes about half of Int8's time for one row and a third for six. A whole stack cannot
    bear it: a few large numbers set the scale, and SmolLM2 draws another token in 13 of 100 places (3 with Int8). A
    block or two can. FBGEMM's kernel, x86 alone.
    """

    inner_dtype = torch.float32

    def __init__(self, weight: Tensor, bias: Tensor | None = None):
        """weight [out, in] is rounded into 8 bits; bias [out] is kept, as float32."""
        rounded, scale = round_to_int8(weight)
        zeros = torch.zeros(len(scale), dtype=torch.long)
        self.shape, self.bias = weight.shape, None if bias is None else bias.float()
        with warnings.catch_warnings():  # torch means to drop this kind of tensor; `obstacle_to_rounding` will tell
            warnings.filterwarnings("ignore", message=".*quantize", category=UserWarning)
            matrix = torch._make_per_channel_quantized_tensor(rounded, scale.double(), zeros, 0)
        self.packed = torch.ops.quantized.linear_prepack(matrix, self.bias)
        self._product = scripted(dynamic_product)

    def __call__(self, x: Tensor) -> Tensor:
        return self._product(x.float(), self.packed)

    @property
    def nbytes(self) -> int:
        return self.shape.numel() + 4 * self.shape[0] + (0 if self.bias is None else self.bias.nbytes)


def dynamic_product(x: Tensor, packed: torch.classes.quantized.LinearPackedParamsBase) -> Tensor:
    # True: inputs in 7 bits, since with 8 AVX2's 16-bit sums overflow.
    return torch.ops.quantized.linear_dynamic(x, packed, True)


def round_to_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """[out, in] -> whole numbers from -127 to 127, and the scale [out] of each row."""
    scale = (weight.float().abs().amax(1) / 127).clamp(min=1e-12)
    return torch.round(weight / scale[:, None]).to(torch.int8), scale


class Int4(Rounded):
    """A scale and a zero point for each 32 weights of a row; the product in bfloat16. CPU."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None):
        """weight [out, in] is rounded into 4 bits, `in` a multiple of 32; bias [out] is kept."""
        self.out = len(weight)
        padded = F.pad(weight.float(), (0, 0, 0, -self.out % 16))  # the kernel wants a multiple of 16 rows
        groups = padded.unflatten(1, (-1, GROUP))  # [out, in / 32, 32]
        low, high = groups.amin(-1), groups.amax(-1)
        scale = ((high - low) / 15).clamp(min=1e-12)
        levels = torch.round((groups - low[..., None]) / scale[..., None]).clamp(0, 15).int().flatten(1)
        super().__init__(torch.ops.aten._convert_weight_to_int4pack_for_cpu(levels, 1), bias)
        # The kernel counts levels from the middle: weight = (level - 8) scale + zero.
        self.scale_and_zero = torch.stack([scale, low + 8 * scale], -1).transpose(0, 1).to(KERNEL_DTYPE).contiguous()

    def _product(self, x: Tensor) -> Tensor:
        product = torch._weight_int4pack_mm_for_cpu(x, self.weight, GROUP, self.scale_and_zero)
        return product if product.shape[1] == self.out else product[:, : self.out]


DRAFT_FORMS = {"int8": Int8, "int4": Int4}
# The head decides between close logits: in 4 bits it costs a fifth of the accepted tokens, in 8 next to nothing.
HEAD_FORM = Int8


def choose_draft_form(form: str, samples: list[Tensor]) -> Form:
    """The class for `form`, "int8" or "int4", after trying it on `samples` [out, in] each.

    Raises:
        ValueError: unknown form, or one that does not work here.
    """
    if form not in DRAFT_FORMS:
        raise ValueError(f"draft_weights: {form!r} is not one of {', '.join(DRAFT_FORMS)}")
    for sample in samples:
        if (reason := obstacle_to_rounding(DRAFT_FORMS[form], sample)) is not None:
            raise ValueError(f"draft_weights: {form!r} does not work here ({reason}); leave it out")
    return DRAFT_FORMS[form]


def obstacle_to_rounding(form: Form, sample: Tensor) -> str | None:
    """Why `sample` [out, in] cannot be rounded and multiplied on this machine; None when it comes out about right."""
    if sample.device.type != "cpu":
        return f"the model is on {sample.device.type}, these kernels are for the CPU"
    if sample.shape[1] % 16:  # the int8 kernel would read beyond the matrix, without a word
        return f"a matrix takes {sample.shape[1]} numbers, not a multiple of 16"
    row = torch.linspace(-1, 1, sample.shape[1], dtype=sample.dtype)[None]
    try:
        product = form(sample)(row)
    except (AttributeError, RuntimeError) as error:
        return str(error).splitlines()[0]
    exact = (row.double() @ sample.double().T).norm()
    error = (product.double() - row.double() @ sample.double().T).norm()
    return None if error <= 0.25 * exact else "its products differ from torch's"
