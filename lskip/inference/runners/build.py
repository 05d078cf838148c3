"""What runs a model's blocks: FusedRunner where it covers the model, in the form of weights that is best here."""

from __future__ import annotations

from collections.abc import Callable

import torch

from lskip.inference.layers.linear import EXACT_WIDTH, Plain
from lskip.inference.layers.linear_choice import MOST_ROWS, Mix, choose_exact_form, choose_form, exact_by_default
from lskip.inference.layers.lm_head import ScreenedHead
from lskip.inference.layers.quantized import HEAD_FORMS, choose_draft_form
from lskip.inference.runners.base import ModelRunner
from lskip.inference.runners.fused_blocks import obstacle, sample_weights
from lskip.inference.runners.fused_runner import FusedRunner, hold_head
from lskip.inference.runners.module_runner import ModuleRunner
from lskip.models.decoder import Decoder

LARGEST_TRIED = 2**25  # bytes of a head for which a form is looked for: a trial of a larger one would take seconds


def build_runner(
    decoder: Decoder,
    weights: str,
    release: bool,
    mix: Mix,
    bit_exact: bool | None,
    compiled: bool,
    screen: Callable[[], ScreenedHead | None],
) -> ModelRunner:
    """FusedRunner where it covers the model, else the model's own modules.

    Args:
        screen: makes what finds likeliest tokens in float32, where that is what products come in.

    Raises:
        ValueError: `weights` is unknown, does not work here, or asks for a form that the modules do not have.
    """
    if compiled and (bit_exact or weights not in ("auto", "plain")):
        raise ValueError("compiled: goes with weights 'plain' only, and without bit_exact")
    reason = obstacle(decoder)
    if reason is None and compiled:
        return FusedRunner(decoder, Plain, release, compiled=True)
    if reason is None:
        samples = sample_weights(decoder)
        if decoder.head_weight.nbytes <= LARGEST_TRIED:
            samples.append(decoder.head_weight.detach())
        form = choose_exact_form(weights, samples) if bit_exact else choose_form(weights, samples, mix)
        exact = exact_by_default(form, samples[0]) if bit_exact is None else bit_exact
        if exact:
            return FusedRunner(decoder, form, release, width=EXACT_WIDTH)
        of_float32 = (form.inner_dtype or decoder.dtype) is torch.float32
        return FusedRunner(decoder, form, release, screen=screen() if of_float32 else None)
    if choose_form(weights, [decoder.head_weight.detach()]) is not Plain and weights != "auto":
        raise ValueError(f"weights: {weights!r} is not for this model ({reason}); use 'auto' or 'plain'")
    if bit_exact or compiled:
        raise ValueError(f"{'bit_exact' if bit_exact else 'compiled'}: is not for this model ({reason}); leave it out")
    return ModuleRunner(decoder)


def build_draft_runner(
    decoder: Decoder, draft_weights: str, screen: Callable[[], ScreenedHead | None] = lambda: None, batch_size: int = 1
) -> FusedRunner:
    """The blocks again, in rounded weights. What `screen` makes is the head too.

    Args:
        batch_size: texts that are decoded together.

    Raises:
        ValueError: `draft_weights` is unknown or does not work here, or the fused runner does not cover the model.
    """
    if (reason := obstacle(decoder)) is not None:
        raise ValueError(f"draft_weights: {draft_weights!r} is not for this model ({reason}); leave it out")
    form = choose_draft_form(draft_weights, sample_weights(decoder), min(batch_size, MOST_ROWS))
    screened = screen()  # after all that may be refused
    head = screened or hold_head(HEAD_FORMS.get(draft_weights, form), decoder)
    return FusedRunner(decoder, form, head=head, screen=screened)
