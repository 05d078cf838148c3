"""A model whose blocks have the numbers that `weights: int8` multiplies by, to be read by whatever reads models."""

import torch

from lskip.inference.layers.bags import BaggedInt8
from lskip.inference.layers.layout_choice import choose_layouts
from lskip.inference.layers.linear import Layout
from lskip.inference.runners.fused_blocks import fuse, fused_linears, obstacle, sample_weights
from lskip.inference.runners.fused_runner import heads_of
from lskip.models.decoder import Decoder


def int8_layouts(decoder: Decoder) -> list[Layout]:
    """Return the layouts of `weights: int8`; ValueError where it is not for this model, or does not work here."""
    if (reason := obstacle(decoder)) is not None:
        raise ValueError(f"weights: 'int8' is not for this model ({reason}); use 'auto'")
    return choose_layouts("int8", sample_weights(decoder)[0])


@torch.no_grad()
def round_to_int8(decoder: Decoder) -> None:
    """Round the weights of the model's blocks in place, as `weights: int8` does when it decodes.

    Raises:
        ValueError: as int8_layouts.
    """
    layouts = int8_layouts(decoder)
    for layer in decoder.blocks:
        for linears, orders in fused_linears(layer, heads_of(layer.self_attn)):
            matrix = fuse(layouts, linears, orders)
            if not isinstance(matrix, BaggedInt8):
                continue  # a shape that they cannot have: it stays as it is, in decoding too
            parts = matrix.numbers.split([linear.out_features for linear in linears])
            for linear, rows, order in zip(linears, parts, orders, strict=True):
                linear.weight[slice(None) if order is None else order] = rows.to(linear.weight.dtype)
