"""Agreement of a run's data with its model and its settings: tokenizer, length of a row, seed."""

from collections.abc import Mapping
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch import LightningDataModule

from lskip.data import TextData
from lskip.data.collation import DOCUMENTS
from lskip.models.pretrained import make_config
from lskip.module import LayerSkipModule


def match_data_to_model(config: Namespace) -> None:
    """Set data's tokenizer to the model's, or for a model from scratch data's vocab_size to the model's."""
    arguments = config.data.init_args if config.data is not None else {}
    if isinstance(config.model, dict):
        size = make_config(config.model).vocab_size
        if "vocab_size" in arguments:
            arguments["vocab_size"] = size
    elif "tokenizer" in arguments and arguments["tokenizer"] is None:
        arguments["tokenizer"] = config.model


def settle_data(config: Namespace, before: Mapping[str, Any]) -> None:
    """Set the seed and `documents` of data that leave them open, to be kept with the run.

    Args:
        before: the settings of the run that goes on, whose values they get; {} of a new run.
    """
    arguments = config.data.init_args if config.data is not None else {}
    of_a_new_run = {"seed": int(config.seed_everything), "documents": DOCUMENTS[0]}
    for name, value in of_a_new_run.items():
        if name in arguments and arguments[name] is None:
            arguments[name] = before.get(f"data.{name}", value)


def check_tokenizer_is_there(data: LightningDataModule | None, model: dict | str) -> None:
    """Load the tokenizer before the weights of a model from scratch are initialized, which takes long."""
    if isinstance(model, dict) and isinstance(data, TextData) and data.tokenizer_source is not None:
        _ = data.tokenizer


def check_block_size(data: LightningDataModule | None, module: LayerSkipModule) -> None:
    """Raise ValueError, before the text is tokenized, for rows longer than the model's context."""
    length, context = getattr(data, "block_size", 0), module.decoder.context_length
    if length > context:
        raise ValueError(f"block_size: {length} tokens, the model's context holds {context}")


def check_tokenizer(data: LightningDataModule | None, module: LayerSkipModule) -> None:
    """Raise ValueError, before the text is tokenized, if data name another tokenizer than the model's."""
    if isinstance(data, TextData):
        module.check_tokenizer(None if data.tokenizer_source is None else data.tokenizer)
