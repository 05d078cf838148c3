"""Text for training and evaluation: sources, tokenizer training, packing, the datamodule."""

from lskip.data.datamodule import TextData

__all__ = ["TextData"]
