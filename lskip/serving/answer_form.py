"""Bodies of answers in OpenAI's form, whole and in chunks."""

from __future__ import annotations

import json
import time
from collections import Counter
from itertools import accumulate
from typing import Any, NamedTuple
from uuid import uuid4

from lskip.inference import Generation

FINISH = {"eos": "stop", "stop_string": "stop", "length": "length", "context": "length"}


class Token(NamedTuple):
    """A token of an answer: its number, the text that was final with it, and how it came (TextRound.kinds)."""

    id: int
    text: str
    kind: str


class LogProb(NamedTuple):
    """The log probability of a token, and the text that the token completes, stop strings included."""

    text: str
    value: float


class Piece(NamedTuple):
    """What a round brought to the answer to one of a client's prompts.

    Attributes:
        logprobs: of its tokens but one that ends the text; None: they are not asked for.
    """

    place: int
    tokens: list[Token]
    finish_reason: str | None
    logprobs: list[LogProb] | None = None

    @property
    def text(self) -> str:
        return "".join(token.text for token in self.tokens)


class Form:
    """The form of one answer: of a chat, or of a completion.

    Args:
        model: name to give.
        chat: whether it is a chat's.
    """

    def __init__(self, model: str, chat: bool):
        self.chat = chat
        name = "chat.completion" if chat else "text_completion"
        self._object, self._chunk = name, name + ".chunk" * chat
        self._head = {"id": f"{'chatcmpl' if chat else 'cmpl'}-{uuid4().hex}", "created": int(time.time())}
        self._model = model
        self._lengths: Counter[int] = Counter()  # of the text of each place, as far as its log probabilities are told

    def whole(self, pieces: list[list[Piece]], generations: list[Generation]) -> dict[str, Any]:
        """Return the body of an answer that is not streamed, from all pieces of each prompt's."""
        choices = []
        for place, (parts, generation) in enumerate(zip(pieces, generations, strict=True)):
            text, told = "".join(part.text for part in parts), None
            if parts[-1].logprobs is not None:
                told = [each for part in parts for each in part.logprobs]
            message = {"message": {"role": "assistant", "content": text}}
            choices.append(self._choice(place, message, text, generation.finish_reason, told))
        return {**self._head, "object": self._object, "model": self._model, "choices": choices, **usage(generations)}

    def first(self, count: int) -> list[dict[str, Any]]:
        """Return the chunks that come before any text."""
        role = {"delta": {"role": "assistant", "content": ""}}
        return [self._with([self._choice(place, role, "", None)]) for place in range(count)] if self.chat else []

    def piece(self, piece: Piece, shows_tokens: bool = False) -> dict[str, Any]:
        """Return the chunk of a piece of text, perhaps the last."""
        text = piece.text
        delta = {"delta": {"content": text} if text else {}}
        choice = self._choice(piece.place, delta, text, piece.finish_reason, piece.logprobs)
        shown = {"lskip": {"tokens": [each._asdict() for each in piece.tokens]}} if shows_tokens else {}
        return {**self._with([choice]), **shown}

    def usage(self, generations: list[Generation]) -> dict[str, Any]:
        """Return the chunk that says what was used."""
        return {**self._with([]), **usage(generations)}

    def _with(self, choices: list[dict]) -> dict[str, Any]:
        return {**self._head, "object": self._chunk, "model": self._model, "choices": choices}

    def _choice(
        self, place: int, of_chat: dict, text: str, finish_reason: str | None, told: list[LogProb] | None = None
    ) -> dict[str, Any]:
        content = of_chat if self.chat else {"text": text}
        logprobs = None if told is None else self._logprobs(place, told)
        return {"index": place, **content, "logprobs": logprobs, "finish_reason": FINISH.get(finish_reason)}

    def _logprobs(self, place: int, told: list[LogProb]) -> dict[str, Any]:
        """Return log probabilities in the form of a chat, or of a completion, which counts on from chunk to chunk."""
        if self.chat:
            content = [
                {"token": text, "logprob": value, "bytes": list(text.encode()), "top_logprobs": []}
                for text, value in told
            ]
            return {"content": content, "refusal": None}
        texts = [each.text for each in told]
        offsets = list(accumulate(map(len, texts), initial=self._lengths[place]))
        self._lengths[place] = offsets.pop()
        values = [each.value for each in told]
        return {"tokens": texts, "token_logprobs": values, "top_logprobs": None, "text_offset": offsets}


def usage(generations: list[Generation]) -> dict[str, Any]:
    """Return how many tokens there were, of prompts those not run again, of drafted ones those kept and not."""
    prompts = sum(each.prompt_tokens for each in generations)
    completions = sum(len(each.token_ids) for each in generations)
    accepted = sum(each.accepted for each in generations)
    details = {
        "accepted_prediction_tokens": accepted,
        "rejected_prediction_tokens": sum(each.drafted for each in generations) - accepted,
    }
    totals = {"prompt_tokens": prompts, "completion_tokens": completions, "total_tokens": prompts + completions}
    cached = {"cached_tokens": sum(each.cached_prompt_tokens for each in generations)}
    return {"usage": {**totals, "prompt_tokens_details": cached, "completion_tokens_details": details}}


def error_body(status: int, message: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """Return an error in OpenAI's form."""
    kind = {401: "authentication_error", 429: "rate_limit_error"}.get(status, "invalid_request_error")
    return {
        "error": {"message": message, "type": kind if status < 500 else "server_error", "param": param, "code": code}
    }


def event(body: dict[str, Any] | str) -> str:
    """Return a server-sent event."""
    return f"data: {body if isinstance(body, str) else json.dumps(body, ensure_ascii=False)}\n\n"
