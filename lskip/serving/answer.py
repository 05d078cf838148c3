"""The answer to one request of a client, from its prompts to its last event."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress
from functools import partial

from fastapi.responses import JSONResponse, Response, StreamingResponse

from lskip.inference.decoding.request import Request
from lskip.inference.text import TextPieces
from lskip.serving.answer_form import Form, LogProb, Piece, Token, error_body, event
from lskip.serving.answer_text import AnswerText
from lskip.serving.asked import Asked, Chat, RequestRefusedError
from lskip.serving.engine import BusyError, Engine, News, Ticket
from lskip.serving.lanes import Endpoint, prepare_request
from lskip.serving.metrics import Metrics


class Answer:
    """The answer to one request of a client: to one prompt or to several.

    Attributes:
        left: place of a prompt -> its ticket, of texts that have not ended; `stop` has to be called however it ends.
    """

    def __init__(self, engine: Engine, endpoint: Endpoint, metrics: Metrics, asked: Asked):
        """Hand the prompts to the engine.

        Raises:
            RequestRefusedError: a bad field or prompt, or too many requests.
        """
        self.engine, self.metrics, self.asked = engine, metrics, asked
        early_exit = asked.early_exit
        self.lane = endpoint.lane if early_exit is None else endpoint.exits
        self.form = Form(endpoint.name, isinstance(asked, Chat))
        self.news: asyncio.Queue[tuple[int, News]] = asyncio.Queue()
        loop = asyncio.get_running_loop()
        if len(asked.prompts) > (most := self.engine.most(self.lane)):
            sentence = f"prompt: {len(asked.prompts)} prompts; this server takes {most} at a time"
            raise RequestRefusedError(400, sentence, "prompt")
        self.requests = self._prepare()
        tokenizer = self.lane.generator.tokenizer
        self.texts = [AnswerText(tokenizer, asked.stops) for _ in self.requests]
        self.token_texts = [TextPieces(tokenizer) for _ in self.requests]  # of log probabilities
        try:
            how = () if early_exit is None else (early_exit,)
            tickets = self.engine.submit(self.lane, self.requests, partial(_put, loop, self.news), *how)
        except BusyError as error:
            self.metrics.refused("busy")
            status, why = (429, "too many requests wait") if self.engine.goes else (503, "the server ends")
            raise RequestRefusedError(status, f"{why}; try again", code="busy") from error
        self.left: dict[int, Ticket] = dict(enumerate(tickets))

    def _prepare(self) -> list[Request]:
        changed = {} if self.form.chat else {"chat": False}
        try:
            settings = self.lane.generator.settings(**changed, **self.asked.settings())
            found = [
                prepare_request(self.lane, prompt, settings, place) for place, prompt in enumerate(self.asked.prompts)
            ]
        except ValueError as error:
            field, _, said = str(error).partition(": ")
            name = self.asked.client_names.get(field, field)
            raise RequestRefusedError(400, f"{name}: {said}", name) from error
        for request in found:
            request.most_drafted, request.deepest_draft = self.asked.most_drafted, self.asked.exit_layer
        return found

    async def pieces(self) -> AsyncIterator[Piece]:
        """Yield what each round brings to one of the prompts.

        Raises:
            RequestRefusedError: what went wrong in the engine, or that the server ends.
        """
        while self.left:
            place, news = await self.news.get()
            if news.error is not None:
                self.stop("error")
                refused = isinstance(news.error, RequestRefusedError)
                raise news.error if refused else RequestRefusedError(500, str(news.error))
            text, last = self.texts[place], len(news.tokens) - 1
            tokens = [
                Token(token, text.push([token], ended=at == last and news.finish_reason is not None), kind)
                for at, (token, kind) in enumerate(zip(news.tokens, news.kinds, strict=True))
            ]
            if news.finish_reason is not None:
                self.metrics.ended(self.left.pop(place), news.finish_reason)
            yield Piece(place, tokens, news.finish_reason, self._logprobs(place, news))

    def _logprobs(self, place: int, news: News) -> list[LogProb] | None:
        if not self.asked.wants_logprobs:
            return None
        values = zip(news.tokens, news.logprobs, strict=True)
        found = [LogProb(self.token_texts[place].push([token]), value) for token, value in values]
        return found[:-1] if news.finish_reason == "eos" else found

    def end(self) -> None:
        """Let its client be told that the server ends."""
        self.news.put_nowait((0, News([], error=RequestRefusedError(503, "the server ends", code="busy"))))

    def stop(self, outcome: str = "cancelled") -> None:
        """Free the slots of texts that have not ended."""
        while self.left:
            _, ticket = self.left.popitem()
            self.engine.cancel(ticket)
            self.metrics.ended(ticket, outcome)

    async def whole(self) -> Response:
        """Return the answer once it is complete."""
        pieces: list[list[Piece]] = [[] for _ in self.requests]
        async for piece in self.pieces():
            pieces[piece.place].append(piece)
        return JSONResponse(self.form.whole(pieces, [request.generation for request in self.requests]))

    async def events(self) -> AsyncIterator[str]:
        """Yield the answer in server-sent events as it comes."""
        shows_all = self.asked.show_rounds or self.asked.wants_logprobs
        for chunk in self.form.first(len(self.requests)):
            yield event(chunk)
        try:
            async for piece in self.pieces():
                if piece.text or piece.finish_reason is not None or shows_all:
                    yield event(self.form.piece(piece, self.asked.show_rounds))
        except RequestRefusedError as error:
            yield event(error_body(error.status, error.message))
            return
        if self.asked.stream_options is not None and self.asked.stream_options.include_usage:
            yield event(self.form.usage([request.generation for request in self.requests]))
        yield event("[DONE]")


class Streamed(StreamingResponse):
    """The events of an answer, whose slots are free once it is over, even where the client left before the first."""

    def __init__(self, answer: Answer):
        super().__init__(answer.events(), media_type="text/event-stream")
        self.answer = answer

    async def __call__(self, scope, receive, send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.answer.stop()


def _put(loop: asyncio.AbstractEventLoop, queue: asyncio.Queue, place: int, news: News) -> None:
    with suppress(RuntimeError):  # the loop has been closed: nobody reads any more
        loop.call_soon_threadsafe(queue.put_nowait, (place, news))
