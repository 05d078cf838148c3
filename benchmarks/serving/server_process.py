"""A server in a process of its own, and what clients do with it."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, NamedTuple

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
    pid: int

    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=self.url, api_key="none", max_retries=0, timeout=600)


@contextmanager
def lskip_server(model: str, *options: str) -> Iterator[Server]:
    """Serve a model by `lskip serve`."""
    command = [sys.executable, "-m", "lskip", "serve", f"--model={model}", "--port=0", *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        said = process.stdout.readline()
        if (found := re.search(r"http://\S+/v1", said)) is None:
            raise RuntimeError(f"lskip serve did not start: {said!r}")
        yield Server(found[0], process.pid)
    finally:
        process.terminate()
        process.wait()


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
