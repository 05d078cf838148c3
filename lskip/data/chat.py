"""A conversation to tokens through the tokenizer's own template, and which of them the assistant wrote."""

import re

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

GENERATION_MARKER = re.compile(r"\{%-?\s*generation\b")


def check_chat_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """ValueError when `tokenizer` cannot render messages."""
    if not tokenizer.chat_template:
        raise ValueError("tokenizer: has no chat template, which 'messages' need; name an instruct model's tokenizer")
    if not tokenizer.is_fast:
        raise ValueError(f"tokenizer: 'messages' need a fast tokenizer, not {type(tokenizer).__name__}")


def conversation_tokens(tokenizer: PreTrainedTokenizerBase, messages: list[dict]) -> tuple[list[int], list[bool]]:
    """(tokens, which of them are scored): the assistant's turns with the marker that ends them.

    A template with generation markers says itself what the assistant wrote. For any other one the turns are
    found by rendering the conversation up to each.
    """
    try:
        if GENERATION_MARKER.search(str(tokenizer.chat_template)):
            return marked_tokens(tokenizer, messages)
        text = render(tokenizer, messages)
        spans = assistant_spans(tokenizer, messages, text)
    except TemplateError as error:
        raise ValueError(f"source: the chat template refuses a conversation: {error}") from error
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    scored = [any(start <= a < end for start, end in spans) for a, _ in encoded["offset_mapping"]]
    return encoded["input_ids"], scored


def marked_tokens(tokenizer: PreTrainedTokenizerBase, messages: list[dict]) -> tuple[list[int], list[bool]]:
    encoded = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    return encoded["input_ids"], [bool(mark) for mark in encoded["assistant_masks"]]


def render(tokenizer: PreTrainedTokenizerBase, messages: list[dict], prompt: bool = False) -> str:
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)


def assistant_spans(tokenizer: PreTrainedTokenizerBase, messages: list[dict], text: str) -> list[tuple[int, int]]:
    """(first, one past the last) character in `text` of each assistant turn, without the header before it."""
    spans = []
    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = render(tokenizer, messages[:turn], prompt=True) if turn else ""
        through = render(tokenizer, messages[: turn + 1])
        if not (through.startswith(before) and text.startswith(through)):
            raise ValueError(
                f"tokenizer: its chat template rewrites earlier turns (message {turn}), so that the assistant's "
                "words cannot be told from the rest; give it {% generation %} markers"
            )
        spans.append((len(before), len(through)))
    return spans
