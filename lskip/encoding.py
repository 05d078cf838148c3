"""Text to tokens, by tokenizers and chat templates that somebody else wrote: what they cannot do is one sentence."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from lskip.checks import check_unicode
from lskip.untrusted import time_limit

TEMPLATE_SECONDS = 10  # a conversation takes a chat template some milliseconds


def encode(tokenizer: PreTrainedTokenizerBase, text: str | list[str], **options):
    """What the tokenizer makes of a text, or of several.

    Raises:
        ValueError: a text that is not Unicode, or one that its own rules fail on.
    """
    for each in [text] if isinstance(text, str) else text:
        check_unicode("prompt", each)
    try:
        return tokenizer(text, verbose=False, **options)
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # of the tokenizers' own language; it is no Exception
            raise
        raise ValueError(f"tokenizer: fails on this text ({str(error)[:100]})") from error


def open_ended(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Tokens of each text with what the tokenizer puts before it, and no end of text after it.

    An end of text that the text itself spells stays.
    """
    encoded = encode(tokenizer, texts, return_special_tokens_mask=True)
    masks = encoded["special_tokens_mask"] if tokenizer.is_fast else [[1] * len(ids) for ids in encoded["input_ids"]]
    ends = {tokenizer.eos_token_id, tokenizer.sep_token_id}
    rows = []
    for ids, added in zip(encoded["input_ids"], masks, strict=True):
        size = len(ids)
        while size and added[size - 1] and ids[size - 1] in ends:
            size -= 1
        rows.append(ids[:size])
    return rows


def render_chat(tokenizer: PreTrainedTokenizerBase, messages: list[dict], add_generation_prompt: bool) -> str:
    """Messages through the tokenizer's chat template.

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
    """Characters that so many tokens can stand for at most: of a longer text nobody need count the tokens."""
    return num_tokens * max(map(len, tokenizer.get_vocab()), default=0)
