"""Running of the server: a socket, the engine's thread, uvicorn until a signal ends it."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import socket
from collections.abc import Sequence
from contextlib import closing
from types import FrameType

from lskip.inference import TextGenerator
from lskip.inference.options import LoadingOptions
from lskip.serving.lanes import Endpoint, ExitLane, Lane
from lskip.serving.options import Served, ServingOptions
from lskip.utils.console import say

SECONDS_TO_SAY_SO = 5  # for answers that the end of the server cut to tell their clients
NEEDED = {"fastapi": "fastapi", "uvicorn": "uvicorn", "prometheus_client": "prometheus-client"}


def check_packages() -> None:
    """Raise ValueError where a package of the extra `serve` is not installed."""
    missing = [package for module, package in NEEDED.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise ValueError(f"serve: needs packages more: pip install {' '.join(missing)}")


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens; ValueError where it cannot."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
    except (OSError, UnicodeError) as error:  # UnicodeError: a label of more than 63 characters
        reason = error.strerror if isinstance(error, OSError) else "no name of a host"
        raise ValueError(f"host: {host[:80]!r} is no address to listen at ({reason})") from error
    try:
        return socket.create_server((host, port), family=family)
    except OSError as error:
        reason = os.strerror(error.errno)
        raise ValueError(f"port: cannot listen at port {port} of {host} ({reason})") from error


def serve_models(serving: ServingOptions, models: Sequence[Served]) -> None:
    """Load models and serve them until SIGTERM or Ctrl-C; answers under way have stop_seconds to end.

    Raises:
        ValueError: a bad option, before a model is loaded where it can be told by then.
    """
    check_packages()
    with closing(listen(serving.host, serving.port)) as place:
        generators: dict[LoadingOptions, TextGenerator] = {}
        for each in models:
            if each.loading not in generators:
                generators[each.loading] = _load(each.loading, serving.max_batch_size)
        _run(serving, [_endpoint(serving, each, generators[each.loading]) for each in models], place)


def _load(loading: LoadingOptions, batch_size: int) -> TextGenerator:
    generator = loading.load(batch_size)
    if generator.tokenizer is None:
        raise ValueError(f"model: {loading.model!r} has no tokenizer, without which there is no text to serve")
    return generator


def _endpoint(serving: ServingOptions, served: Served, generator: TextGenerator) -> Endpoint:
    room = serving.max_batch_size, serving.context(generator.context_length)
    try:
        lane = Lane(generator, generator.settings(**served.settings), *room)
    except ValueError as error:
        raise ValueError(f"{served.name}: {error}") if serving.endpoint else error from None
    return Endpoint(served.name, lane, ExitLane(generator, *room))


def _run(serving: ServingOptions, endpoints: list[Endpoint], place: socket.socket) -> None:
    import uvicorn  # of an extra, as what follows

    from lskip.serving.app import Server
    from lskip.serving.engine import Engine

    engine = Engine([lane for _, *lanes in endpoints for lane in lanes], serving.max_waiting)
    routes = Server(engine, endpoints, (serving.host, *(serving.allowed_hosts or ())), serving.api_key)

    class Ending(uvicorn.Server):
        signals = 0

        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            self.loop = asyncio.get_running_loop()
            await super().startup(sockets)

        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            self.signals += 1
            if self.signals == 2:  # whoever asks twice does not wait for answers, but their clients are told
                self.loop.call_soon_threadsafe(routes.end_answers)
            else:
                super().handle_exit(sig, frame)

        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            self.loop.call_later(serving.stop_seconds, routes.end_answers)
            await super().shutdown(sockets)

    how = {"log_level": "warning", "access_log": False}
    how["timeout_graceful_shutdown"] = serving.stop_seconds + SECONDS_TO_SAY_SO
    server = Ending(uvicorn.Config(routes.app(), lifespan="off", **how))
    host, port = place.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    for name, lane, _ in endpoints:
        say(
            f"serving {name} at http://{shown}:{port}/v1: {lane.slots} texts at a time, of up to {lane.context} tokens,"
            f" whose keys and values take {lane.nbytes / 2**20:,.0f} MiB",
            flush=True,
        )
    engine.start()
    try:
        server.run(sockets=[place])
    except KeyboardInterrupt:  # uvicorn sends the signal again once it has ended as asked, which is no failure
        if server.force_exit or not server.should_exit:  # a third Ctrl-C, or another signal
            raise
    finally:
        engine.close()
