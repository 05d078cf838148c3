"""From a model to the runner of its blocks: FusedRunner where it covers the model, in the layouts of this machine."""

from collections.abc import Callable

import torch

from lskip.inference.layers.layout_choice import choose_exact_layout, choose_layouts, exact_by_default, stand_in
from lskip.inference.layers.linear import EXACT_WIDTH, Plain
from lskip.inference.layers.lm_head import ScreenedHead
from lskip.inference.layers.quantized import choose_draft_layouts, draft_head_layouts, stored_in_4_bits
from lskip.inference.runners.base import ModelRunner
from lskip.inference.runners.fused_blocks import obstacle, sample_weights
from lskip.inference.runners.fused_runner import FusedRunner, pack_head
from lskip.inference.runners.module_runner import ModuleRunner
from lskip.models.decoder import Decoder


def build_runner(
    decoder: Decoder,
    weights: str,
    release: bool,
    lone_rows: bool,
    bit_exact: bool | None,
    screen: Callable[[], ScreenedHead | None],
) -> ModelRunner:
    """Return a FusedRunner where it covers the model, else one of the model's own modules.

    Args:
        lone_rows: most passes have a single row, as in `choose_layouts`.
        screen: makes what finds the argmax in float32, where that is what products come in.

    Raises:
        ValueError: `weights` is unknown, does not work here, or asks for a layout that the modules do not have.
    """
    if (reason := obstacle(decoder)) is not None:
        if choose_layouts(weights, stand_in(decoder.head_weight)) != [Plain] and weights != "auto":
            raise ValueError(f"weights: {weights!r} is not for this model ({reason}); use 'auto' or 'plain'")
        if bit_exact:
            raise ValueError(f"bit_exact: is not for this model ({reason}); leave it out")
        return ModuleRunner(decoder)
    sample = sample_weights(decoder)[0]
    layouts = [choose_exact_layout(weights, sample)] if bit_exact else choose_layouts(weights, sample, lone_rows)
    if exact_by_default(layouts, sample) if bit_exact is None else bit_exact:
        return FusedRunner(decoder, layouts, release, width=EXACT_WIDTH)
    of_float32 = (layouts[0].inner_dtype or decoder.dtype) is torch.float32
    # A head decides between close logits: where blocks are rounded, it is not.
    head = Plain(decoder.head_weight.detach().float(), decoder.head_bias) if layouts[0].error else None
    return FusedRunner(decoder, layouts, release, head, screen=screen() if of_float32 else None)


def resolve_draft_weights(draft_weights: str | None, weights: str, decoder: Decoder, batch_size: int) -> str | None:
    """Return `draft_weights`; for "auto" those that suit the model: int4 where it was stored in 4 bits, else int8.

    None where their kernels, or the fused runner, do not work for it, or its own `weights` are these already.

    Raises:
        ValueError: `draft_weights` are what `weights` are.
    """
    if draft_weights != "auto":
        if draft_weights == weights:
            raise ValueError(f"draft_weights: {draft_weights!r} is what weights are already; leave one of the two out")
        return draft_weights
    if decoder.device.type != "cpu" or obstacle(decoder) is not None:
        return None
    samples = sample_weights(decoder)
    name = "int4" if all(map(stored_in_4_bits, samples)) else "int8"
    if name == weights:
        return None
    try:
        choose_draft_layouts(name, samples, batch_size)
    except ValueError:
        return None
    return name


def build_draft_runner(
    decoder: Decoder, draft_weights: str, screen: Callable[[], ScreenedHead | None] = lambda: None, batch_size: int = 1
) -> FusedRunner:
    """Return a runner of the blocks in rounded weights. What `screen` makes is the head too.

    Args:
        batch_size: texts that are decoded together.

    Raises:
        ValueError: `draft_weights` is unknown or does not work here, or the fused runner does not cover the model.
    """
    if (reason := obstacle(decoder)) is not None:
        raise ValueError(f"draft_weights: {draft_weights!r} is not for this model ({reason}); leave it out")
    layouts = choose_draft_layouts(draft_weights, sample_weights(decoder), batch_size)
    screened = screen()  # after all that may be refused
    head = screened or pack_head(draft_head_layouts(layouts), decoder)
    return FusedRunner(decoder, layouts, head=head, screen=screened)
