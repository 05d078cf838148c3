"""A matrix held for a convolution, whose kernels are oneDNN's fastest for the rows of a batch."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from lskip.inference.layers.linear import Plain

IMAGE_SIZES = (4, 8, 16, 32, 64, 128)  # rows of Convolved's images; with a larger one, prompts would take no less


def convolved_product(x: Tensor, held: tuple[Tensor, Tensor | None, list[int]]) -> Tensor:
    weight, bias, sizes = held
    count = x.size(0)
    size = image_size(count, sizes)
    rows = x if count % size == 0 else F.pad(x, [0, 0, 0, -count % size])
    pixels = rows.reshape(-1, 1, size, x.size(1)).permute(0, 3, 1, 2)
    product = torch.ops.mkldnn._convolution_pointwise(pixels, weight, bias, [0, 0], [1, 1], [1, 1], 1, "none", [], "")
    return product.permute(0, 2, 3, 1).reshape(rows.size(0), -1)[:count]


def convolved_plus(residual: Tensor, x: Tensor, held: tuple[Tensor, Tensor | None, list[int]]) -> Tensor:
    return residual + convolved_product(x, held)  # an addition within the convolution is no faster


def image_size(count: int, sizes: list[int]) -> int:
    """Rows of each image when `count` rows come in as few images of one size as can be. `sizes`: small to large."""
    images = -(-count // sizes[-1])
    for size in sizes:
        if size * images >= count:
            return size
    return sizes[-1]


class Convolved(Plain):
    """The matrix in oneDNN's blocked layout for a convolution, whose image has a row of the input as a pixel (float32).

    On some CPUs this takes less for 4 to 64 rows than Packed. But images of some sizes, and of other numbers of
    threads, want another layout, and then oneDNN arranges the matrix anew, a hundred times as long as the product
    takes. So images are of sizes that all want the same, and zeros fill them up.
    """

    expected_rows = 8  # the layout is that for an image of so many
    product, plus = staticmethod(convolved_product), staticmethod(convolved_plus)

    def __init__(self, weight: Tensor, bias: Tensor | None = None):
        """weight [out, in] is copied into the new layout; bias [out] is kept.

        Raises:
            ValueError: it is not float32, or large images want another layout than small ones.
        """
        if weight.dtype != torch.float32:
            raise ValueError(f"not for {weight.dtype}")
        sizes = sizes_of_one_layout(weight.shape, torch.get_num_threads())
        if not set(IMAGE_SIZES) <= set(sizes):
            raise ValueError("its layout would depend on the number of rows")
        super().__init__(laid_out(weight, self.expected_rows), bias)
        self.held = self.weight, bias, sizes


@functools.cache
def sizes_of_one_layout(shape: torch.Size, threads: int) -> list[int]:
    """Rows of the images that want the layout in which Convolved has a matrix [out, in], with torch on `threads`.

    Only by arranging the matrix oneDNN tells. That takes long for a large one, so that it is asked for IMAGE_SIZES
    alone; smaller matrices get some sizes in between, for fewer zeros.
    """
    weight = torch.zeros(shape)

    def layout(rows: int, images: int = 1) -> bytes:
        return bytes(torch.ops.mkldnn._get_mkldnn_serialized_md(laid_out(weight, rows, images)).tolist())

    small = weight.numel() <= 2**24
    sizes = [*range(4, 64, 4), *range(64, 129, 16)] if small else IMAGE_SIZES
    expected = layout(Convolved.expected_rows)
    # Above 64 there may be several in a product; further ones make no difference.
    return [rows for rows in sizes if layout(rows) == expected and (rows <= 64 or layout(rows, 2) == expected)]


def laid_out(weight: Tensor, rows: int, images: int = 1) -> Tensor:
    """[out, in] -> [out, in, 1, 1] in the layout for so many images of so many rows."""
    pixel, shape = weight.contiguous()[:, :, None, None], [images, weight.shape[1], 1, rows]
    return torch.ops.mkldnn._reorder_convolution_weight(pixel, [0, 0], [1, 1], [1, 1], 1, shape)
