"""Running of the server: a socket, the engine's thread, uvicorn until a signal ends it."""

from __future__ import annotations

import importlib.util
import os
import socket
from contextlib import closing
from pathlib import PurePath

from lskip.inference import TextGenerator
from lskip.inference.options import LoadingOptions
from lskip.serving.options import ServingOptions
from lskip.utils.console import say

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
    except OSError as error:
        raise ValueError(f"host: {host!r} is no address to listen at ({error.strerror})") from error
    try:
        return socket.create_server((host, port), family=family)
    except OSError as error:
        reason = os.strerror(error.errno)
        raise ValueError(f"port: cannot listen at port {port} of {host} ({reason})") from error


def serve_model(serving: ServingOptions, loading: LoadingOptions) -> None:
    """Load a model and serve it until SIGTERM or Ctrl-C; answers under way may end before.

    Raises:
        ValueError: a bad option, before the model is loaded where it can be told by then.
    """
    check_packages()
    with closing(listen(serving.host, serving.port)) as place:
        generator = loading.for_draft(serving.draft).load(serving.max_batch_size)
        if generator.tokenizer is None:
            raise ValueError(f"model: {loading.model!r} has no tokenizer, without which there is no text to serve")
        name = serving.name or PurePath(loading.model).name or loading.model
        _run(serving, generator, place, name)


def _run(serving: ServingOptions, generator: TextGenerator, place: socket.socket, name: str) -> None:
    import uvicorn  # of an extra, as what follows

    from lskip.serving.app import Server
    from lskip.serving.engine import Engine

    context = serving.context(generator.context_length)
    settings = generator.settings(**serving.settings())
    engine = Engine(generator, settings, serving.max_batch_size, context, serving.max_waiting)
    app = Server(engine, name, (serving.host, *(serving.allowed_hosts or ())), serving.api_key).app()
    how = {"log_level": "warning", "access_log": False, "timeout_graceful_shutdown": serving.stop_seconds}
    server = uvicorn.Server(uvicorn.Config(app, lifespan="off", **how))
    host, port = place.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    say(
        f"serving {name} at http://{shown}:{port}/v1: {serving.max_batch_size} texts at a time, of up to {context}"
        f" tokens, whose keys and values take {engine.batch.cache.nbytes / 2**20:,.0f} MiB"
    )
    engine.start()
    try:
        server.run(sockets=[place])
    finally:
        engine.close()
