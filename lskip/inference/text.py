"""Conversion of prompts to tokens, and of tokens to text as they come."""

import warnings

import torch
from transformers import PreTrainedTokenizerBase

from lskip.models.encoding import encode, open_ended, render_chat
from lskip.models.prompt_form import trained_ending, uses_template

UNFINISHED = "\ufffd"  # what a tokenizer prints for bytes that are not a character yet
LONGEST_HELD = 256  # tokens: bytes that are not a character after so many never become one


class TextPieces:
    """Text of tokens as they come, without what later bytes may still change.

    However many tokens come at a time, the pieces joined are the text of `decode_text`.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        self.ids: list[int] = []
        # Text of the first `given` tokens is out. Decoding starts at `anchor`, one piece earlier: some tokenizers drop
        # the space in front of the first token.
        self.anchor = self.given = 0

    def push(self, ids: list[int]) -> str:
        """Return the text that is final now that `ids` have been added; "" inside a character."""
        return "".join(map(self._push_one, ids))

    def rest(self) -> str:
        """Return the text that was held back, when no more tokens come."""
        piece, self.given = self._new_text(), len(self.ids)
        return piece

    def _push_one(self, token: int) -> str:
        self.ids.append(token)
        piece = self._new_text()
        if piece.endswith(UNFINISHED) and len(self.ids) - self.given < LONGEST_HELD:
            return ""
        if piece:  # never start at a token without text, such as a special one
            self.anchor, self.given = self.given, len(self.ids)
        return piece

    def _new_text(self) -> str:
        before = decode_tokens(self.tokenizer, self.ids[self.anchor : self.given])
        text = decode_tokens(self.tokenizer, self.ids[self.anchor :])
        if text.startswith(before):
            return text[len(before) :]
        # An invalid or incomplete character makes some tokenizers drop the valid ones before it.
        return decode_tokens(self.tokenizer, self.ids[self.given :])


def decode_text(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    """Return the text of `ids` without special tokens, equal to the joined pieces of TextPieces."""
    text = decode_tokens(tokenizer, ids)
    if UNFINISHED not in text:
        return text
    pieces = TextPieces(tokenizer)
    return pieces.push(ids) + pieces.rest()


def decode_tokens(tokenizer: PreTrainedTokenizerBase, ids: list[int], skip_special_tokens: bool = True) -> str:
    """Return the tokenizer's text of `ids`, spaces left as they are."""
    return tokenizer.decode(ids, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False)


def encode_prompt(
    prompt,
    tokenizer: PreTrainedTokenizerBase | None,
    chat: bool | None,
    vocab_size: int,
    most_characters: int | None = None,
) -> list[int]:
    """Return the token ids of a prompt.

    Args:
        prompt: a text, chat messages ({"role", "content"} each), or token ids (list, or tensor of one row).
        chat: whether a text becomes a user's message in the chat template; None: when there is one, and the run that
            trained the model did not train on prompts without it.
        most_characters: the longest text that the context can have room for; None: any.

    Raises:
        ValueError: an empty prompt, one that needs a tokenizer or template that is missing, text that is too long, not
            Unicode or refused by the template, ids out of range.
    """
    if isinstance(prompt, torch.Tensor):
        prompt = prompt.flatten().tolist() if prompt.dim() == 1 or len(prompt) == 1 else None
    if isinstance(prompt, str):
        ids = _encode_text(prompt, tokenizer, chat, most_characters)
    elif isinstance(prompt, list) and prompt and all(isinstance(part, dict) for part in prompt):
        ids = _encode_messages(prompt, tokenizer, most_characters)
    elif isinstance(prompt, list) and all(isinstance(part, int) for part in prompt):
        ids = prompt
    else:
        raise ValueError("prompt: is neither a text, nor a list of chat messages, nor one row of token ids")
    if not ids:
        raise ValueError("prompt: is empty; give at least one token")
    if not 0 <= min(ids) <= max(ids) < vocab_size:
        raise ValueError(f"prompt: token ids must lie between 0 and {vocab_size - 1}")
    return ids


def _encode_text(
    prompt: str, tokenizer: PreTrainedTokenizerBase | None, chat: bool | None, most_characters: int | None
) -> list[int]:
    if tokenizer is None:
        raise ValueError("prompt: a text needs a tokenizer, and the model came without one; give token ids")
    if not prompt:
        return []
    if uses_template(tokenizer, chat):
        return _encode_messages([{"role": "user", "content": prompt}], tokenizer, most_characters)
    _check_length(prompt, most_characters)
    if not prompt.endswith(ending := trained_ending(tokenizer)):
        warnings.warn(f"prompt: ends otherwise than those of training, which all end with {ending!r}", stacklevel=2)
    return open_ended(tokenizer, [prompt])[0]


def _encode_messages(
    messages: list[dict], tokenizer: PreTrainedTokenizerBase | None, most_characters: int | None
) -> list[int]:
    if tokenizer is None or tokenizer.chat_template is None:
        raise ValueError("prompt: chat messages need a tokenizer with a chat template, and there is none")
    for message in messages:
        if not isinstance(message.get("role"), str) or not isinstance(message.get("content"), str):
            raise ValueError(f"prompt: a chat message needs the texts 'role' and 'content', got {message!r}")
        _check_length(message["content"], most_characters)
    text = render_chat(tokenizer, messages, add_generation_prompt=True)
    _check_length(text, most_characters)
    return encode(tokenizer, text, add_special_tokens=False)["input_ids"]


def _check_length(text: str, most_characters: int | None) -> None:
    # Before it is tokenized, which takes hundreds of bytes a character.
    if most_characters is not None and len(text) > most_characters:
        raise ValueError(
            f"prompt: {len(text)} characters leave no room for an answer in the model's context, which holds"
            f" {most_characters} at most"
        )
