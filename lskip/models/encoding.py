"""Calls of tokenizers and chat templates of unknown origin; whatever they raise becomes a ValueError."""

from transformers import PreTrainedTokenizerBase

from lskip.utils.checks import check_unicode
from lskip.utils.foreign import first_line, is_panic
from lskip.utils.untrusted import time_limit

TEMPLATE_SECONDS = 10  # limit for rendering a conversation, which takes milliseconds


def encode(tokenizer: PreTrainedTokenizerBase, text: str | list[str], field: str = "prompt", **options):
    """Return the tokenizer's encoding of a text, or of several; `field` is named in messages.

    Raises:
        ValueError: a text that is not Unicode, or that the tokenizer fails on.
    """
    for each in [text] if isinstance(text, str) else text:
        check_unicode(field, each)
    try:
        return tokenizer(text, verbose=False, **options)
    except BaseException as error:
        if not is_panic(error):
            raise
        raise ValueError(f"tokenizer: fails on this text ({first_line(error)})") from error


def open_ended(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Return the tokens of each text with the special tokens before it, and without those after it.

    An end-of-text token that the text itself spells stays.
    """
    count = len(added_around(tokenizer)[1])
    return [ids[: len(ids) - count] for ids in encode(tokenizer, texts).input_ids]


def added_around(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Return the special tokens that a tokenizer puts before and after each text."""
    whole, plain = tokenizer("a").input_ids, tokenizer("a", add_special_tokens=False).input_ids
    for start in range(len(whole) - len(plain) + 1):
        if whole[start : start + len(plain)] == plain:
            return whole[:start], whole[start + len(plain) :]
    return [], []


def render_chat(tokenizer: PreTrainedTokenizerBase, messages: list[dict], add_generation_prompt: bool) -> str:
    """Return the text that the tokenizer's chat template makes of messages.

    Raises:
        ValueError: the template refuses them, fails on them, or does not end.
    """
    message = f"it does not end within {TEMPLATE_SECONDS} seconds"
    try:
        with time_limit(TEMPLATE_SECONDS, message):
            return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
    except Exception as error:  # a template is a program: it can raise anything
        reason = " ".join(str(error).split())[:150] or type(error).__name__
        raise ValueError(f"the chat template refuses this prompt ({reason})") from error


def longest_text(tokenizer: PreTrainedTokenizerBase, num_tokens: int) -> int:
    """Return the most characters that so many tokens can stand for, to refuse longer texts without tokenizing them."""
    return num_tokens * max(map(len, tokenizer.get_vocab()), default=0)
