"""Weights rounded for drafts, to 8 or 4 bits: the model's own text needs the model's own weights."""

import torch
import torch.nn.functional as F
from torch import Tensor

from lskip.inference.layers.bags import BaggedInt8
from lskip.inference.layers.layout_choice import obstacle_to
from lskip.inference.layers.linear import ROUNDED, Layout, Plain

GROUP = 32  # weights of a row that share a scale in int4
ROWS_AT_ONCE = 1024  # of a matrix that is converted: more leave the CPU's caches, and take five times as long
LEVELS = 127  # to either side of 0 in int8
KERNEL_DTYPE = torch.bfloat16  # of activations and scales: the kernels for other types are ten times slower


def int8_product(x: Tensor, packed: tuple[Tensor, Tensor, Tensor | None]) -> Tensor:
    weight, scale, bias = packed
    product = torch._weight_int8pack_mm(x.to(scale.dtype), weight, scale)
    return product if bias is None else product + bias


def int4_product(x: Tensor, packed: tuple[Tensor, Tensor, int, int, Tensor | None]) -> Tensor:
    weight, scale_and_zero, group, out, bias = packed
    product = torch._weight_int4pack_mm_for_cpu(x.to(scale_and_zero.dtype), weight, group, scale_and_zero)
    if product.size(1) != out:
        product = product[:, :out]
    return product if bias is None else product + bias


class Int8(Plain):
    """One scale a row, symmetric; inputs of any type, the product in bfloat16, the sum in the residual's type. CPU."""

    inner_dtype = KERNEL_DTYPE
    error = ROUNDED
    product = staticmethod(int8_product)

    def __init__(self, weight: Tensor, bias: Tensor | None = None):
        """Round weight [out, in] into 8 bits, bias [out] into bfloat16; ValueError unless `in` is a multiple of 16."""
        check_width(weight, 16)  # the kernel would read beyond the matrix, without a word
        rounded, scale = round_to_int8(weight, LEVELS)
        self.packed = rounded, scale.to(KERNEL_DTYPE), None if bias is None else bias.to(KERNEL_DTYPE)


def round_to_int8(weight: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    """Return [out, in] as whole numbers from -levels to levels, and the scale [out] of each row."""
    parts = weight.split(ROWS_AT_ONCE)
    scales = [(part.float().abs().amax(1) / levels).clamp(min=1e-12) for part in parts]
    rounded = [torch.round(part / scale[:, None]).to(torch.int8) for part, scale in zip(parts, scales, strict=True)]
    return torch.cat(rounded), torch.cat(scales)


class Int4(Plain):
    """A scale and a zero point for each 32 weights of a row; else as Int8. CPU."""

    inner_dtype = KERNEL_DTYPE
    error = ROUNDED
    product = staticmethod(int4_product)

    def __init__(self, weight: Tensor, bias: Tensor | None = None):
        """Round weight [out, in] into 4 bits, bias [out] into bfloat16; ValueError unless `in` is a multiple of 32."""
        check_width(weight, GROUP)
        padded = F.pad(weight.float(), (0, 0, 0, -len(weight) % 16))  # the kernel wants a multiple of 16 rows
        groups = padded.unflatten(1, (-1, GROUP))  # [out, in / 32, 32]
        low, high = groups.amin(-1), groups.amax(-1)
        scale = ((high - low) / 15).clamp(min=1e-12)
        levels = torch.round((groups - low[..., None]) / scale[..., None]).clamp(0, 15).int().flatten(1)
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(levels, 1)
        # The kernel counts levels from the middle: weight = (level - 8) scale + zero.
        scale_and_zero = torch.stack([scale, low + 8 * scale], -1).transpose(0, 1).to(KERNEL_DTYPE).contiguous()
        self.packed = packed, scale_and_zero, GROUP, len(weight), None if bias is None else bias.to(KERNEL_DTYPE)


def check_width(weight: Tensor, multiple: int) -> None:
    """Raise ValueError unless weight [out, in] takes a multiple of so many numbers."""
    if weight.shape[1] % multiple:
        raise ValueError(f"a matrix takes {weight.shape[1]} numbers, not a multiple of {multiple}")


DRAFT_WEIGHTS = ("int8", "int4")


def choose_draft_layouts(draft_weights: str, samples: list[Tensor], batch_size: int = 1) -> list[Layout]:
    """Return the layouts for weights that draft; each matrix takes the first that can hold it (`pack`).

    Args:
        draft_weights: one of DRAFT_WEIGHTS.
        samples: [out, in] each, the matrices of a block.
        batch_size: texts that are decoded together.

    Raises:
        ValueError: `draft_weights` is unknown, or does not work here.
    """
    if draft_weights not in DRAFT_WEIGHTS:
        raise ValueError(f"draft_weights: {draft_weights!r} is not one of {', '.join(DRAFT_WEIGHTS)}")
    layout = Int4 if draft_weights == "int4" else Int8
    if reason := obstacle_to(layout, *samples):
        raise ValueError(f"draft_weights: {draft_weights!r} does not work here ({reason}); leave it out")
    if layout is Int8 and batch_size == 1 and obstacle_to(BaggedInt8, *samples) is None:
        return [BaggedInt8, Int8]
    return [layout]


def stored_in_4_bits(weight: Tensor) -> bool:
    """Return whether weight [out, in] has at most 16 values in each 32 numbers of a row, as GGUF's 4-bit types do."""
    if weight.shape[1] % GROUP:
        return False
    ordered = weight[:ROWS_AT_ONCE].float().unflatten(1, (-1, GROUP)).sort(-1).values
    return bool(((ordered.diff(dim=-1) != 0).sum(-1) < 16).all())


def draft_head_layouts(layouts: list[Layout]) -> list[Layout]:
    """Return the layouts for the head of a draft whose blocks have `layouts`.

    A head decides between close logits: in 4 bits it costs a fifth of the accepted tokens, in 8 next to nothing.
    """
    return [Int8] if layouts == [Int4] else layouts
