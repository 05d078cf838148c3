"""The routes of the server: OpenAI's completions and chat completions, models, health and metrics."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Sequence
from functools import partial
from importlib.resources import files
from typing import Any
from urllib.parse import urlsplit
from weakref import WeakSet

from fastapi import Depends, FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response
from starlette.exceptions import HTTPException

from lskip.serving.answer import Answer, Streamed
from lskip.serving.answer_form import error_body
from lskip.serving.asked import Asked, Chat, Completion, RequestRefusedError, Settling, for_template, read_asked
from lskip.serving.engine import Engine
from lskip.serving.lanes import Endpoint
from lskip.serving.metrics import Counters, Metrics
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
        endpoints: by the name that clients give; the first one answers those that give none.
        hosts: names under which clients reach it, or *: another one is a web page's trick (DNS rebinding).
        api_key: that clients must send; None: none.
    """

    def __init__(
        self, engine: Engine, endpoints: Sequence[Endpoint], hosts: tuple[str, ...] = (), api_key: str | None = None
    ):
        self.engine, self.api_key = engine, api_key
        self.endpoints = {endpoint.name: endpoint for endpoint in endpoints}
        self.hosts = {*HERE, *map(str.lower, hosts)}
        self._counters = Counters()
        self.metrics = {endpoint.name: Metrics(endpoint, engine, self._counters) for endpoint in endpoints}
        self._answers: WeakSet[Answer] = WeakSet()

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

    def end_answers(self) -> None:
        """End those that are under way by an error 503."""
        for answer in list(self._answers):
            answer.end()

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
        return Response(self._counters.text(), media_type="text/plain; version=0.0.4")

    async def _page(self) -> Response:
        page = files("lskip.serving").joinpath("page.html").read_text(encoding="utf-8")
        return HTMLResponse(page, headers={"Content-Security-Policy": POLICY})

    async def _settling(self, http: Request) -> dict[str, Any]:
        asked = read_asked(Settling, await read_body(http))
        if not self.engine.goes:
            raise RequestRefusedError(503, "the server ends", code="busy")
        lane = self._endpoint(asked.model).lane
        generator = lane.generator
        try:
            work = partial(settling_layers, generator, for_template(asked.messages), asked.tokens, lane.context)
            layers = await asyncio.wrap_future(self.engine.call(work))
        except ValueError as error:
            raise RequestRefusedError(400, str(error), str(error).partition(": ")[0]) from error
        return {"layers": layers, "num_layers": generator.num_layers}

    async def _models(self) -> dict[str, Any]:
        about = {"object": "model", "created": 0, "owned_by": "lskip"}
        return {"object": "list", "data": [{"id": name, **about} for name in self.endpoints]}

    async def _complete(self, http: Request) -> Response:
        return await self._answer(http, Completion)

    async def _chat(self, http: Request) -> Response:
        return await self._answer(http, Chat)

    async def _answer(self, http: Request, kind: type[Asked]) -> Response:
        asked = read_asked(kind, await read_body(http))
        endpoint = self._endpoint(asked.model)
        answer = Answer(self.engine, endpoint, self.metrics[endpoint.name], asked)
        self._answers.add(answer)
        if asked.stream:
            return Streamed(answer)
        try:
            return await unless_gone(http, answer.whole())
        finally:
            answer.stop()

    def _endpoint(self, model: str | None) -> Endpoint:
        """Return the endpoint of a name; RequestRefusedError where there is none."""
        name = next(iter(self.endpoints)) if model is None else model
        if name not in self.endpoints:
            there = ", ".join(map(repr, self.endpoints))
            sentence = f"model: {name!r} is not served here; there is {there}"
            raise RequestRefusedError(404, sentence, "model", "model_not_found")
        return self.endpoints[name]


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
