"""A server in a process of its own, and what clients do with it."""

from __future__ import annotations

import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

import openai


class Served(NamedTuple):
    """An answer: its text, its tokens, seconds until its first piece and of each piece after it."""

    text: str
    tokens: int
    first: float
    gaps: list[float]


class Server(NamedTuple):
    """A process that serves, and the address of its interface."""

    url: str
    process: subprocess.Popen

    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=self.url, api_key="none", max_retries=0, timeout=600)


@contextmanager
def lskip_server(model: str, *options: str, errors: IO | None = None) -> Iterator[Server]:
    """Serve a model by `lskip serve`; its stderr goes to `errors`, else where this process's goes."""
    command = [sys.executable, "-m", "lskip", "serve", f"--model={model}", "--port=0", *options]
    with _ended(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)) as process:
        said = process.stdout.readline()
        if (found := re.search(r"http://\S+/v1", said)) is None:
            raise RuntimeError(f"lskip serve did not start: {said!r}")
        yield Server(found[0], process)


@contextmanager
def other_server(command: Sequence[str], log: Path, seconds: float = 300) -> Iterator[Server]:
    """Serve by another program, which takes --host and --port; what it says goes to `log`.

    Raises:
        RuntimeError: it ended, or has not answered after so many seconds.
    """
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    where = ["--host", "127.0.0.1", "--port", str(port)]
    with (
        log.open("w") as said,
        _ended(subprocess.Popen([*command, *where], stdout=said, stderr=subprocess.STDOUT)) as process,
    ):
        server, end = Server(f"http://127.0.0.1:{port}/v1", process), time.monotonic() + seconds
        while not _answers(server):
            if process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"{' '.join(command)} did not start: see {log}")
            time.sleep(0.5)
        yield server


@contextmanager
def _ended(process: subprocess.Popen) -> Iterator[subprocess.Popen]:
    try:
        yield process
    finally:
        process.terminate()
        process.wait()


def _answers(server: Server) -> bool:
    try:
        return bool(server.client().models.list().data)
    except openai.APIError:
        return False


def ask(client: openai.OpenAI, model: str, messages: Sequence[dict], **fields) -> Served:
    """Ask for a chat completion, streamed, and time it."""
    began = last = time.perf_counter()
    pieces, gaps, first, tokens = [], [], 0.0, 0
    stream = client.chat.completions.create(
        model=model, messages=list(messages), stream=True, stream_options={"include_usage": True}, **fields
    )
    for chunk in stream:
        now = time.perf_counter()
        if chunk.usage is not None:
            tokens = chunk.usage.completion_tokens
        if not chunk.choices or not (piece := chunk.choices[0].delta.content):
            continue
        if pieces:
            gaps.append(now - last)
        else:
            first = now - began
        pieces.append(piece)
        last = now
    return Served("".join(pieces), tokens, first, gaps)


def at_once(clients: int, ask_one: Callable[[Any], Any], requests: Sequence[Any]) -> tuple[list[Any], float]:
    """Return the answers to requests by so many clients at a time, in order, and the seconds that all took."""
    began = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        answers = list(pool.map(ask_one, requests))
    return answers, time.perf_counter() - began
