"""Those who use `lskip serve` and `lskip chat`: a client that asks a server and ends it, a talk's lines."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from unittest.mock import patch

from benchmarks.bad_input.checks import texts
from benchmarks.bad_input.fixtures import NEW_TOKENS, PROMPTS
from benchmarks.bad_input.terminals import standard
from benchmarks.bad_input.verdict import Seen
from lskip.inference.options import LoadingOptions

ANSWER = "answer.json"
SAID = f"{PROMPTS[0]}\n/new\n{PROMPTS[2]}"


@contextmanager
def client(here: Path, api_key: str | None = None) -> Iterator[None]:
    """Ask a server once as soon as it says where it is, keep its answer in {here}/answer.json, and end it."""
    over = threading.Event()
    thread = threading.Thread(target=_ask_and_end, args=(here, api_key, over))
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _ask_and_end(here: Path, api_key: str | None, over: threading.Event) -> None:
    place = None
    while place is None:
        if over.wait(0.02):
            return
        said = here.with_name(f"{here.name}.out").read_text(encoding="utf-8", errors="replace")
        place = re.search(r"serving .* at http://\[?(.+?)]?:(\d+)/v1: ", said)
    try:
        (here / ANSWER).write_bytes(_answer(place[1], int(place[2]), api_key))
    except (OSError, HTTPException) as error:
        (here / ANSWER).write_text(json.dumps(repr(error)))
    if not over.is_set():
        os.kill(os.getpid(), signal.SIGTERM)


def _answer(host: str, port: int, api_key: str | None) -> bytes:
    asked_for = {"prompt": PROMPTS[0], "max_tokens": NEW_TOKENS, "temperature": 0}
    headers = {} if api_key in (None, "null") else {"Authorization": f"Bearer {api_key}"}
    connection = HTTPConnection(host, port, timeout=20)
    connection.request("POST", "/v1/completions", json.dumps(asked_for), headers)
    return connection.getresponse().read()


def answered(seen: Seen) -> str | None:
    """Check that the client got transformers' text."""
    answer = json.loads((seen.here / ANSWER).read_text())
    said = texts(seen.here.parent / "llama", (PROMPTS[0],))[0]
    right = isinstance(answer, dict) and answer.get("choices", [{}])[0].get("text") == said
    return None if right else f"answered {answer!r}, not {said!r}"


@contextmanager
def typed(text: str | bytes) -> Iterator[None]:
    """Give the command these lines as its standard input."""
    data = text if isinstance(text, bytes) else text.encode()
    with standard("stdin", lambda: io.TextIOWrapper(io.BytesIO(data), encoding="utf-8")):
        yield


def talked(seen: Seen) -> str | None:
    """Check that a talk of two conversations said transformers' texts."""
    said = "".join(f"{each}\n" for each in texts(seen.here.parent / "chat", (PROMPTS[0], PROMPTS[2])))
    return None if seen.out == said else f"said {seen.out!r}, not {said!r}"


@contextmanager
def loading(act: Callable[[], BaseException | None]) -> Iterator[None]:
    """Let something happen when the model is to be loaded; an exception that it returns is raised."""
    load = LoadingOptions.load

    def instead(self: LoadingOptions, *arguments):
        if (error := act()) is not None:
            raise error
        return load(self, *arguments)

    with patch.object(LoadingOptions, "load", instead):
        yield
