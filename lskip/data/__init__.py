"""Text for training and evaluation: sources, tokenizer training, packing, the datamodule."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lskip.data.datamodule import TextData

__all__ = ["TextData"]


def __getattr__(name: str):
    """Return TextData, imported when it is asked for: Lightning takes seconds, and tokenizing needs none of it."""
    if name != "TextData":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from lskip.data.datamodule import TextData

    return TextData
