"""The routes of the server: OpenAI's completions and chat completions, models, health and metrics."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator
from contextlib import suppress
from functools import partial
from importlib.resources import files
from typing import Any
from urllib.parse import urlsplit

from fastapi import Depends, FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from lskip.inference.decoding.request import Request as DecodingRequest
from lskip.serving.answer_text import AnswerText
from lskip.serving.answers import Form, Piece, Token, error_body, event
from lskip.serving.asked import Asked, Chat, Completion, RequestRefusedError, Settling, for_template, read_asked
from lskip.serving.engine import BusyError, Engine, News, Ticket
from lskip.serving.metrics import Metrics
from lskip.serving.settling import settling_layers

MOST_BYTES = 2**20  # of a body
MOST_SECONDS = 30  # that a body may take to come
RETRY_AFTER = 1  # seconds
# The page is one file; it may ask this server alone, and show what it got as text.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; img-src data:"
HERE = ("localhost", "127.0.0.1", "::1")


class Server:
    """What the routes share.

    Attributes:
        engine: decodes.
        model: the name that clients give.
        hosts: names under which clients reach it, or *: another one is a web page's trick (DNS rebinding).
        api_key: that clients must send; None: none.
    """

    def __init__(self, engine: Engine, model: str, hosts: tuple[str, ...] = (), api_key: str | None = None):
        self.engine, self.model, self.api_key = engine, model, api_key
        self.hosts = {*HERE, *hosts}
        self.metrics = Metrics(model, engine)

    def app(self) -> FastAPI:
        """Return the application."""
        app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None, dependencies=[Depends(self._check_host)])
        app.add_exception_handler(RequestRefusedError, _refusal)
        app.add_exception_handler(HTTPException, _no_such_route)
        app.add_exception_handler(Exception, _fault)
        keyed = {"dependencies": [Depends(self._check_key)]}
        app.add_api_route("/health", self._health, methods=["GET"])
        app.add_api_route("/metrics", self._metrics, methods=["GET"])
        app.add_api_route("/", self._page, methods=["GET"])
        app.add_api_route("/lskip/settling", self._settling, methods=["POST"], **keyed)
        app.add_api_route("/v1/models", self._models, methods=["GET"], **keyed)
        app.add_api_route("/v1/completions", self._complete, methods=["POST"], **keyed)
        app.add_api_route("/v1/chat/completions", self._chat, methods=["POST"], **keyed)
        return app

    async def _check_host(self, http: Request) -> None:
        if "*" in self.hosts:
            return
        names = [urlsplit(f"//{http.headers.get('host', '')}").hostname]
        if (origin := http.headers.get("origin")) is not None:
            names.append(urlsplit(origin).hostname)
        for name in names:
            if name not in self.hosts:
                raise RequestRefusedError(403, f"host: {name!r} is not a name of this server", code="forbidden_host")

    async def _check_key(self, http: Request) -> None:
        given = http.headers.get("authorization", "").removeprefix("Bearer ")
        if self.api_key is not None and not secrets.compare_digest(given.encode(), self.api_key.encode()):
            raise RequestRefusedError(401, "api_key: is missing or wrong", code="invalid_api_key")

    async def _health(self) -> JSONResponse:
        goes = self.engine.goes
        return JSONResponse({"status": "ok" if goes else "the engine has ended"}, 200 if goes else 503)

    async def _metrics(self) -> Response:
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4")

    async def _page(self) -> Response:
        page = files("lskip.serving").joinpath("page.html").read_text(encoding="utf-8")
        return HTMLResponse(page, headers={"Content-Security-Policy": POLICY})

    async def _settling(self, http: Request) -> dict[str, Any]:
        asked = read_asked(Settling, await read_body(http))
        if not self.engine.goes:
            raise RequestRefusedError(503, "the server ends", code="busy")
        generator = self.engine.generator
        try:
            work = partial(settling_layers, generator, for_template(asked.messages), asked.tokens, self.engine.context)
            layers = await asyncio.wrap_future(self.engine.call(work))
        except ValueError as error:
            raise RequestRefusedError(400, str(error), str(error).partition(": ")[0]) from error
        return {"layers": layers, "num_layers": generator.num_layers}

    async def _models(self) -> dict[str, Any]:
        return {"object": "list", "data": [{"id": self.model, "object": "model", "created": 0, "owned_by": "lskip"}]}

    async def _complete(self, http: Request) -> Response:
        return await self._answer(http, Completion)

    async def _chat(self, http: Request) -> Response:
        return await self._answer(http, Chat)

    async def _answer(self, http: Request, kind: type[Asked]) -> Response:
        asked = read_asked(kind, await read_body(http))
        if asked.model not in (None, self.model):
            sentence = f"model: {asked.model!r} is not served here; it is {self.model!r}"
            raise RequestRefusedError(404, sentence, "model", "model_not_found")
        answer = Answer(self, asked)
        if asked.stream:
            return Streamed(answer)
        try:
            return await unless_gone(http, answer.whole())
        finally:
            answer.stop()


class Answer:
    """The answer to one request of a client: to one prompt or to several.

    Attributes:
        left: place of a prompt -> its ticket, of texts that have not ended; `stop` has to be called however it ends.
    """

    def __init__(self, server: Server, asked: Asked):
        """Hand the prompts to the engine.

        Raises:
            RequestRefusedError: a bad field or prompt, or too many requests.
        """
        self.server, self.engine, self.asked = server, server.engine, asked
        self.form = Form(server.model, isinstance(asked, Chat))
        self.news: asyncio.Queue[tuple[int, News]] = asyncio.Queue()
        loop = asyncio.get_running_loop()
        if len(asked.prompts) > self.engine.most:
            sentence = f"prompt: {len(asked.prompts)} prompts; this server takes {self.engine.most} at a time"
            raise RequestRefusedError(400, sentence, "prompt")
        self.requests = self._prepare()
        self.texts = [AnswerText(self.engine.generator.tokenizer, asked.stops) for _ in self.requests]
        try:
            tickets = self.engine.submit(self.requests, partial(_put, loop, self.news))
        except BusyError as error:
            server.metrics.refused("busy")
            status, why = (429, "too many requests wait") if self.engine.goes else (503, "the server ends")
            raise RequestRefusedError(status, f"{why}; try again", code="busy") from error
        self.left: dict[int, Ticket] = dict(enumerate(tickets))

    def _prepare(self) -> list[DecodingRequest]:
        changed = {} if self.form.chat else {"chat": False}
        try:
            settings = self.engine.generator.settings(**changed, **self.asked.settings())
            found = [self.engine.prepare(prompt, settings, place) for place, prompt in enumerate(self.asked.prompts)]
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
            RequestRefusedError: what went wrong in the engine.
        """
        while self.left:
            place, news = await self.news.get()
            if news.error is not None:
                self.stop("error")
                raise RequestRefusedError(500, str(news.error))
            text, last = self.texts[place], len(news.tokens) - 1
            tokens = [
                Token(token, text.push([token], ended=at == last and news.finish_reason is not None), kind)
                for at, (token, kind) in enumerate(zip(news.tokens, news.kinds, strict=True))
            ]
            if news.finish_reason is not None:
                self.server.metrics.ended(self.left.pop(place), news.finish_reason)
            yield Piece(place, tokens, news.finish_reason)

    def stop(self, outcome: str = "cancelled") -> None:
        """Free the slots of texts that have not ended."""
        while self.left:
            _, ticket = self.left.popitem()
            self.engine.cancel(ticket)
            self.server.metrics.ended(ticket, outcome)

    async def whole(self) -> Response:
        """Return the answer once it is complete."""
        texts = [""] * len(self.requests)
        async for piece in self.pieces():
            texts[piece.place] += piece.text
        return JSONResponse(self.form.whole(texts, [request.generation for request in self.requests]))

    async def events(self) -> AsyncIterator[str]:
        """Yield the answer in server-sent events as it comes."""
        for chunk in self.form.first(len(self.requests)):
            yield event(chunk)
        try:
            async for piece in self.pieces():
                if piece.text or piece.finish_reason is not None or self.asked.show_rounds:
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


async def read_body(http: Request) -> bytes:
    """Return the body; RequestRefusedError for one that is too large or too slow."""
    body = b""
    try:
        async with asyncio.timeout(MOST_SECONDS):
            async for part in http.stream():
                body += part
                if len(body) > MOST_BYTES:
                    raise RequestRefusedError(413, f"body: has more than {MOST_BYTES} bytes", code="body_too_large")
    except TimeoutError as error:
        raise RequestRefusedError(408, f"body: did not come within {MOST_SECONDS} s", code="body_too_slow") from error
    return body


async def unless_gone(http: Request, answer) -> Response:
    """Return the awaited answer; where the client goes away before, stop it, and return an empty one."""
    task = asyncio.ensure_future(answer)
    gone = asyncio.ensure_future(_gone(http))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        return Response(status_code=499)
    finally:
        for each in (task, gone):
            each.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _gone(http: Request) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass


async def _refusal(http: Request, error: RequestRefusedError) -> JSONResponse:
    headers = {"Retry-After": str(RETRY_AFTER)} if error.status in (429, 503) else None
    return JSONResponse(error_body(error.status, error.message, error.param, error.code), error.status, headers)


async def _no_such_route(http: Request, error: HTTPException) -> JSONResponse:
    return JSONResponse(error_body(error.status_code, str(error.detail)), error.status_code, error.headers)


async def _fault(http: Request, error: Exception) -> JSONResponse:
    return JSONResponse(error_body(500, "the server failed; its log says how"), 500)
