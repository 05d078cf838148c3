"""Flex attention in training: which models can have it, and where it is used."""

from collections.abc import Iterable

import torch
from lightning.pytorch.utilities import rank_zero_warn
from transformers import PreTrainedModel

from lskip.models.decoder import FLEX

DROPOUTS = ("attention_dropout", "attn_pdrop")  # fields of configs
KERNELS = 64  # one for each window, with and without gradients, for one row and for any number of them


def check_flex_attention(model: PreTrainedModel) -> None:
    """Raise ValueError unless a model's attention can be torch's flex attention."""
    config = model.config
    if not model._supports_flex_attn:
        raise ValueError(f"flex_attention: true, and transformers has none for {config.model_type}; allowed: false")
    for name in DROPOUTS:
        if getattr(config, name, 0) > 0:
            raise ValueError(
                f"flex_attention: true, and the model has {name} {getattr(config, name)}, which it cannot do; "
                "allowed: false"
            )


def use_flex_attention(models: Iterable[PreTrainedModel], device: torch.device) -> None:
    """Have models attend by flex attention, unless they are on a CPU, where it has no gradients."""
    if device.type == "cpu":
        rank_zero_warn("flex_attention: for GPUs; on this CPU attention stays as it is, with the same results")
        return
    # Layer dropout changes the number of rows. Beyond the limit torch computes all scores instead, and only warns.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, KERNELS)
    for model in models:
        model.set_attn_implementation(FLEX)
