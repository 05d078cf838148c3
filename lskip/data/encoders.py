"""Encoding of documents: the tokens of texts, pairs and conversations, and which of them are scored."""

import json
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
from lightning_utilities.core.rank_zero import rank_zero_warn
from transformers import PreTrainedTokenizerBase

from lskip.data.chat import conversation_tokens
from lskip.data.grouping import grouped
from lskip.data.text_tokens import PIECE, special_pattern, text_runs
from lskip.models.encoding import added_around

READ_AHEAD = 64  # the most documents that are tokenized together

Arrays = tuple[np.ndarray, ...]


class Run(NamedTuple):
    """Consecutive tokens of a document: all of them, unless it is a long text.

    Attributes:
        scored: of each token, whether it is; None: all are.
        is_last: whether the document ends with them.
    """

    ids: list[int]
    scored: list[bool] | None = None
    is_last: bool = True


class Encoder:
    """Base of the encoders: a tokenizer, and a warning about special tokens spelled in texts.

    Args:
        limit: so many tokens of a pair or a conversation are enough, those beyond them may be left out; None: all.
    """

    kind: str
    marks_scored = True

    def __init__(self, tokenizer: PreTrainedTokenizerBase, limit: int | None = None):
        self.tokenizer, self.limit = tokenizer, limit
        self.before, _ = added_around(tokenizer)
        self.special = special_pattern(tokenizer)
        self.spelled: str | None = None  # a sentence on the first special token that a text spells
        self.warned = False

    def runs(self, batch: dict[str, list[str]]) -> Iterator[Run]:
        """Yield the tokens of some documents, given by columns."""
        raise NotImplementedError

    def runs_of(self, documents: Iterable[dict]) -> Iterator[Run]:
        """Yield the tokens of documents, given one by one; warn of the first special token that a text spells."""
        for batch in in_batches(documents):
            yield from self.runs(batch)
            self.warn()

    def warn(self) -> None:
        """Warn of the special token that a text spells, the first time."""
        if self.spelled and not self.warned:
            rank_zero_warn(self.spelled)
            self.warned = True

    def look_for_special(self, batch: dict[str, list[str]], *columns: str) -> None:
        """Note the first special token that a text spells."""
        if self.special is None or self.spelled:
            return
        for name in columns:
            for number, text in enumerate(batch[name]):
                if spelled := self.special.search(text):
                    place = batch["place"][number] if "place" in batch else "a document"
                    self.spelled = (
                        f"source: {place} spells the special token {spelled[0]!r}: like any that a text spells, it is "
                        "plain text (conversations belong in a column 'messages')"
                    )
                    return


class TextEncoder(Encoder):
    """Encoder of texts: their tokens, and the end-of-text token."""

    kind, marks_scored = "text", False

    def runs(self, batch: dict[str, list[str]]) -> Iterator[Run]:
        self.look_for_special(batch, "text")
        begins = True
        for ids, is_last in text_runs(self.tokenizer, batch["text"]):
            end = [self.tokenizer.eos_token_id] if is_last else []
            yield Run([*(self.before if begins else ()), *ids, *end], None, is_last)
            begins = is_last


class PairEncoder(Encoder):
    """Encoder of pairs: the completion and the end of text are scored, the prompt is not."""

    kind = "pairs"

    def runs(self, batch: dict[str, list[str]]) -> Iterator[Run]:
        self.look_for_special(batch, "prompt", "completion")
        for prompt, completion in zip(self._whole(batch["prompt"]), self._whole(batch["completion"]), strict=True):
            prompt, answer = [*self.before, *prompt], [*completion, self.tokenizer.eos_token_id]
            yield Run(prompt + answer, [False] * len(prompt) + [True] * len(answer))

    def _whole(self, texts: list[str]) -> Iterator[list[int]]:
        """Yield the tokens of each text, or at least `limit` of them."""
        ids = []
        for more, is_last in text_runs(self.tokenizer, texts, self.limit):
            ids += more
            if is_last:
                yield ids
                ids = []


class ChatEncoder(Encoder):
    """Encoder of conversations by the chat template: every assistant turn is scored."""

    kind = "chat"

    def runs(self, batch: dict[str, list[str]]) -> Iterator[Run]:
        self.look_for_special(batch, "messages")
        for number, text in enumerate(batch["messages"]):
            place = batch["place"][number] if "place" in batch else "a conversation"
            stored = json.loads(text)
            messages, tools = (stored["messages"], stored["tools"]) if isinstance(stored, dict) else (stored, None)
            yield Run(*conversation_tokens(self.tokenizer, messages, tools, place, self.special, self.limit))


ENCODERS = {encoder.kind: encoder for encoder in (TextEncoder, PairEncoder, ChatEncoder)}


def in_batches(documents: Iterable[dict]) -> Iterator[dict[str, list]]:
    """Yield documents by columns, as many as are tokenized together."""
    for group in grouped(documents, READ_AHEAD, PIECE):
        yield {name: [row[name] for row in group] for name in group[0]}


def encoded(encoder: Encoder, documents: list[dict]) -> tuple[Arrays, str | None]:
    """Return the tokens, the lengths and, where it is told, which tokens are scored of some documents.

    Second is what the encoder would warn of. Processes that help a preparation run this: what this file imports each of
    them imports, so neither Lightning nor torch, which take seconds and hundreds of megabytes.
    """
    tokens, scored, lengths, length = [np.zeros(0, np.int64)], [np.zeros(0, bool)], [], 0
    for batch in in_batches(documents):
        for run in encoder.runs(batch):
            tokens.append(np.array(run.ids, np.int64))
            if run.scored is not None:
                scored.append(np.array(run.scored, bool))
            length += len(run.ids)
            if run.is_last:
                lengths.append(length)
                length = 0
    marks = (np.concatenate(scored),) if encoder.marks_scored else ()
    return (np.concatenate(tokens), np.array(lengths, np.int64), *marks), encoder.spelled
