"""LoRA (arXiv 2106.09685) on the blocks below an exit: only two low-rank factors for each linear layer train."""

import importlib.util

from torch import nn
from transformers import PreTrainedModel

from lskip.models.decoder import Decoder
from lskip.utils.checks import check_real, check_whole


class LowRank:
    """W + scale B A in place of each linear weight W of the first blocks; everything else is frozen.

    A checkpoint of such a run holds W, A and B; loaded as a model, it gives the merged, ordinary weights.

    Args:
        exit_layer: blocks 1 … exit_layer get factors.
        rank: columns of B and rows of A.
        scale: what B A is multiplied by (alpha / r of the paper).

    Raises:
        ValueError: a number out of its range, or package peft is missing.
    """

    def __init__(self, exit_layer: int, rank: int = 16, scale: float = 2.0):
        check_whole("exit_layer", exit_layer, 1)
        check_whole("rank", rank, 1)
        check_real("scale", scale, "above 0", lambda value: value > 0)
        if importlib.util.find_spec("peft") is None:
            raise ValueError("low_rank: needs a package more: pip install peft")
        self.exit_layer = exit_layer
        self.rank = rank
        self.scale = scale

    def apply(self, model: PreTrainedModel) -> None:
        """Freeze `model` and add the factors, with B = 0, so that its outputs stay the same.

        Raises:
            ValueError: it has fewer layers than exit_layer, or no linear layers in its blocks.
        """
        from peft import LoraConfig, inject_adapter_in_model

        decoder = Decoder(model)
        below = decoder.blocks[: decoder.block_index(self.exit_layer) + 1]
        linears = {layer for layer in below.modules() if isinstance(layer, nn.Linear)}
        names = [name for name, layer in model.named_modules() if layer in linears]
        if not names:
            raise ValueError(f"low_rank: the blocks of {model.config.model_type!r} have no linear layers")
        config = LoraConfig(r=self.rank, lora_alpha=self.scale * self.rank, target_modules=names)
        model.requires_grad_(False)
        inject_adapter_in_model(config, model)
