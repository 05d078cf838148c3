"""Predictions of every layer at every position of a text, and the layer at which each one settles."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

from lskip.evaluation.layers.divergence import require_numbers
from lskip.models.decoder import Decoder
from lskip.models.readout import first_depth, read_logits, settled_depth

TOP_TOKENS = 5
_BYTES = {character: byte for byte, character in bytes_to_unicode().items()}  # of byte-level BPE


@dataclass(frozen=True)
class Settling:
    """Predictions of L layers at the N = S - 1 positions of a text of S tokens that have a next token.

    Attributes:
        input_ids: [S].
        top_ids: [L, N, k], the most probable tokens, best first.
        probabilities: [L, N, k], of these tokens.
        target_probabilities: [L, N], of the token that follows.
    """

    input_ids: Tensor
    top_ids: Tensor
    probabilities: Tensor
    target_probabilities: Tensor

    @property
    def _agree(self) -> Tensor:
        predictions = self.top_ids[..., 0]
        return predictions == predictions[-1]

    @property
    def settled(self) -> Tensor:
        """int [N], depth from which on the prediction no longer changes."""
        return settled_depth(self._agree)

    @property
    def returns(self) -> Tensor:
        """bool [N], true where a layer agrees with the last one and a later layer does not."""
        return first_depth(self._agree) < self.settled

    @property
    def loses(self) -> Tensor:
        """bool [N], true where a layer predicts the token that follows and the last layer does not."""
        right = self.top_ids[..., 0] == self.input_ids[1:]
        return right.any(0) & ~right[-1]


@torch.inference_mode()
def read_settling(decoder: Decoder, input_ids: Tensor, num_top: int = TOP_TOKENS) -> Settling:
    """Return the predictions of every layer on a text [S >= 2], from one pass; ValueError if one is NaN."""

    def look(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        probabilities = logits.softmax(-1)
        top = probabilities.topk(min(num_top, logits.shape[-1]))
        return top.indices, top.values, probabilities.gather(1, targets[:, None]).squeeze(1)

    layers = range(1, decoder.num_layers + 1)
    read = read_logits(decoder, input_ids[None].to(decoder.device), None, layers, look)
    require_numbers(read[-1], layers)
    return Settling(input_ids.cpu(), *(part.cpu() for part in read))


def spellings(tokenizer: PreTrainedTokenizerBase, ids: Iterable[int]) -> dict[int, str]:
    r"""Return {token id: text}; incomplete UTF-8 characters are written as bytes, \xf0."""
    return {token: _spelling(tokenizer, token) for token in ids}


def _spelling(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    text = tokenizer.decode([token], skip_special_tokens=False, clean_up_tokenization_spaces=False)
    piece = tokenizer.convert_ids_to_tokens(token)
    if piece is None:  # a row of the head beyond the tokenizer's vocabulary
        return f"[{token}]"
    if byte := re.fullmatch(r"<0x([0-9A-F]{2})>", piece):  # SentencePiece's bytes
        return text if text.isascii() else f"\\x{byte[1].lower()}"
    if "\ufffd" in text and all(character in _BYTES for character in piece):
        values = [_BYTES[character] for character in piece]
        return "".join(chr(value) if value < 128 else f"\\x{value:02x}" for value in values)
    # SentencePiece drops the leading space of a token that is decoded alone.
    return f" {text}" if piece.startswith("▁") and not text.startswith(" ") else text
