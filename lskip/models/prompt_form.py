"""The form of a run's training prompts, kept in its tokenizer's files: no chat template, and how all of them end."""

from collections.abc import Iterable
from itertools import takewhile

from transformers import PreTrainedTokenizerBase

KEY = "training_prompts"  # in tokenizer_config.json: transformers hands on what it does not know
MOST_TOKENS = 16  # of an ending
FEWEST_PROMPTS = 20  # fewer may end alike by chance


def keep_form(tokenizer: PreTrainedTokenizerBase, prompts: Iterable[list[int]] | None) -> None:
    """Note in the tokenizer that the model is trained on these prompts without a chat template; None: with one.

    Args:
        prompts: token ids of some of them.
    """
    tokenizer.init_kwargs.pop(KEY, None)
    if prompts is not None:
        ends = [tokenizer.decode(ids[-MOST_TOKENS:], clean_up_tokenization_spaces=False) for ids in prompts]
        ending = _common_ending(ends) if len(ends) >= FEWEST_PROMPTS else ""
        tokenizer.init_kwargs[KEY] = {"chat": False, "ending": ending}


def _common_ending(texts: list[str]) -> str:
    alike = takewhile(lambda letters: len(set(letters)) == 1, zip(*(text[::-1] for text in texts), strict=False))
    return "".join(letters[0] for letters in alike)[::-1]


def uses_template(tokenizer: PreTrainedTokenizerBase, chat: bool | None) -> bool:
    """Return whether a text goes through the chat template: as asked, else if there is one and training used it."""
    return tokenizer.chat_template is not None and KEY not in tokenizer.init_kwargs if chat is None else chat


def trained_ending(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return how all training prompts end; "" where that is not known."""
    kept = tokenizer.init_kwargs.get(KEY)
    ending = kept.get("ending") if isinstance(kept, dict) else None
    return ending if isinstance(ending, str) else ""
