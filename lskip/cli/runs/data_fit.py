"""What a run's data and its model must agree on: the tokenizer, and the length of a row."""

from __future__ import annotations

from jsonargparse import Namespace
from lightning.pytorch import LightningDataModule

from lskip.data import TextData
from lskip.module import LayerSkipModule
from lskip.models.pretrained import make_config


def let_data_fit_model(config: Namespace) -> None:
    """The model's own tokenizer for its text, and for a model from scratch a tokenizer of its vocabulary's size."""
    arguments = config.data.init_args if config.data is not None else {}
    if isinstance(config.model, dict):
        size = make_config(config.model).vocab_size
        if "vocab_size" in arguments:
            arguments["vocab_size"] = size
    elif "tokenizer" in arguments and arguments["tokenizer"] is None:
        arguments["tokenizer"] = config.model


def check_tokenizer_is_there(data: LightningDataModule | None, model: dict | str) -> None:
    """Of a model from scratch, whose weights take long to draw. Other models are looked up first themselves."""
    if isinstance(model, dict) and isinstance(data, TextData) and data.tokenizer_source is not None:
        _ = data.tokenizer


def check_rows_fit(data: LightningDataModule | None, module: LayerSkipModule) -> None:
    """What the first step would refuse, before the text is tokenized."""
    length, context = getattr(data, "block_size", 0), module.decoder.context_length
    if length > context:
        raise ValueError(f"block_size: {length} tokens, the model's context holds {context}")


def check_tokens_fit(data: LightningDataModule | None, module: LayerSkipModule) -> None:
    """That data which name their tokenizer name the model's, before they are tokenized by it."""
    if isinstance(data, TextData):
        module.check_tokenizer(None if data.tokenizer_source is None else data.tokenizer)
