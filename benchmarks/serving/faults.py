"""Clients that misbehave towards `lskip serve`: what it holds afterwards, and whether the others were harmed.

    python -m benchmarks.serving.faults --out result [--model smollm2] [--clients 100] [--malformed 50] [--quick]

Some clients leave at random moments, before the first piece among them, some read slowly, some send bodies that are no
requests or of 10 MB, while others ask and read to the end. Slots, threads and resident memory of the server before and
after, and the others' texts against those that they get when nothing else is asked.

Then SIGTERM to another server while clients ask again and again, streamed and not, more than have a slot: what became
of every request, those it had before the signal apart, and how the process ended. Writes result.json into --out.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import socket
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from urllib.parse import urlsplit

import torch
from rich.console import Console

from benchmarks.command_line import command_parser
from benchmarks.environment import environment
from benchmarks.serving.load import prompt_of
from benchmarks.serving.server_process import Server, ask, lskip_server
from lskip.utils.output_files import write_json

BODIES = (
    *("", "{", "[]", '{"messages": 5}', '{"prompt": {}}'),
    *('{"prompt": "a", "max_tokens": -1}', "\0\xff", '{"a":' * 900),
)
console = Console(width=120)


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    with lskip_server(options.model, "--max_batch_size=4", f"--max_waiting={2 * options.clients}") as server:
        found = misbehave(server, options)
    found["sigterm"] = end_under_load(options)
    result = {"environment": environment(torch.device("cpu")), "options": vars(options), **found}
    options.out.mkdir(parents=True, exist_ok=True)
    write_json(options.out / "result.json", result)
    console.print(result)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = command_parser("benchmarks.serving.faults", __doc__)
    parser.add_argument("--out", required=True, type=Path, help="folder for result.json")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--clients", type=int, default=100, help="that leave at random moments")
    parser.add_argument("--malformed", type=int, default=50, help="bodies that are no requests")
    parser.add_argument("--good", type=int, default=12, help="clients that read to the end")
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--asking", type=int, default=12, help="clients that ask when SIGTERM comes; 4 have a slot")
    parser.add_argument("--stop_seconds", type=int, default=60, help="of the server that gets SIGTERM")
    parser.add_argument("--quick", action="store_true", help="few, to see that it runs")
    options = parser.parse_args(arguments)
    if options.quick:
        options.clients, options.malformed, options.good, options.tokens = 6, 8, 2, 8
        options.asking = 6
    return options


def misbehave(server: Server, options: argparse.Namespace) -> dict:
    """Return what the server held before and after, and what became of each kind of client."""
    client, fields = server.client(), {"max_tokens": options.tokens, "temperature": 0.0}
    asked = [prompt_of(number) for number in range(options.good)]
    quiet = [ask(client, options.model, each, **fields).text for each in asked]
    before = held(server)
    with ThreadPoolExecutor(12) as pool:
        leaving = [pool.submit(leave, server, number, options.tokens) for number in range(options.clients)]
        slow = [pool.submit(read_slowly, server, options) for _ in range(4)]
        sent = [BODIES[number % len(BODIES)].encode() for number in range(options.malformed)]
        bodies = [pool.submit(send, server, each) for each in sent]
        large = pool.submit(send, server, b'{"prompt": "' + b"a" * 10_000_000 + b'"}')
        good = [pool.submit(ask, client, options.model, each, **fields) for each in asked]
        texts = [each.result().text for each in good]
        [each.result() for each in leaving]
    wait_until_idle(server)
    return {
        "before": before,
        "after": held(server),
        "left": len(leaving),
        "others_harmed": sum(a != b for a, b in zip(texts, quiet, strict=True)),
        "slow_readers_complete": sum(each.result() for each in slow),
        "malformed": sorted({each.result() for each in bodies}),
        "large": large.result(),
    }


def held(server: Server) -> dict[str, float]:
    """Return megabytes of resident memory, threads, and requests that have a slot or wait."""
    status = dict(line.split(":", 1) for line in Path(f"/proc/{server.process.pid}/status").read_text().splitlines())
    running, waiting = requests_of(server)
    megabytes = int(status["VmRSS"].split()[0]) / 1024
    return {"megabytes": megabytes, "threads": int(status["Threads"]), "running": running, "waiting": waiting}


def requests_of(server: Server) -> tuple[float, float]:
    text = urllib.request.urlopen(server.url.replace("/v1", "/metrics")).read().decode()
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    found = {name.partition("{")[0]: float(value) for name, value in values.items()}
    return found["lskip_requests_running"], found["lskip_requests_waiting"]


def wait_until_idle(server: Server, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while any(requests_of(server)) and time.monotonic() < end:
        time.sleep(0.2)


def connect(server: Server, path: str, body: bytes) -> socket.socket:
    place = urlsplit(server.url)
    connection = socket.create_connection((place.hostname, place.port), timeout=120)
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    with suppress(OSError):  # it has refused a large body by then
        connection.sendall(head.encode() + body)
    return connection


def leave(server: Server, number: int, tokens: int) -> None:
    """Ask for a long answer, streamed or not, and go away after a random number of bytes, perhaps none."""
    random_ = random.Random(number)
    body = {"messages": prompt_of(number), "max_tokens": 8 * tokens, "stream": random_.random() < 0.8}
    with connect(server, "/v1/chat/completions", json.dumps(body).encode()) as connection:
        connection.settimeout(random_.random() * 2)
        with suppress(TimeoutError):
            if random_.random() < 0.8:
                connection.recv(random_.randint(1, 4000))


def read_slowly(server: Server, options: argparse.Namespace) -> bool:
    """Read an answer by 200 bytes at a time with pauses, and return whether it came whole."""
    body, said = {"messages": prompt_of(3), "max_tokens": options.tokens, "stream": True}, b""
    with connect(server, "/v1/chat/completions", json.dumps(body).encode()) as connection:
        while part := connection.recv(200):
            said += part
            time.sleep(0.02)
    return b"data: [DONE]" in said


def send(server: Server, body: bytes) -> int:
    """Return the status of the answer to a body."""
    with connect(server, "/v1/completions", body) as connection:
        try:
            return int(connection.recv(4096).split()[1])
        except (OSError, IndexError):  # it closed the connection amid a large body
            return 0


def end_under_load(options: argparse.Namespace) -> dict:
    """Return what became of requests to a server that gets SIGTERM, and how it ended."""
    with tempfile.TemporaryFile("w+") as errors:
        bounds = ("--max_batch_size=4", f"--stop_seconds={options.stop_seconds}")
        with lskip_server(options.model, *bounds, errors=errors) as server, ThreadPoolExecutor(options.asking) as pool:
            asking = [pool.submit(ask_until_refused, server, number, options) for number in range(options.asking)]
            while sum(requests_of(server)) < options.asking:
                time.sleep(0.02)
            server.process.terminate()
            signalled = time.perf_counter()
            code = server.process.wait(timeout=options.stop_seconds + 120)
            seconds = time.perf_counter() - signalled
            found = [each.result() for each in asking]
        errors.seek(0)
        said = errors.read()
    return {
        "before_the_signal": Counter(first for first, *_ in found),
        "since": Counter(outcome for _, *since in found for outcome in since),
        **{"exit_code": code, "seconds": seconds, "in_time": seconds <= options.stop_seconds, "stderr": said},
    }


def ask_until_refused(server: Server, number: int, options: argparse.Namespace) -> list[str]:
    """Return the outcomes of a client's requests one after the other, of which the last was not answered."""
    body = {"messages": prompt_of(number), "max_tokens": options.tokens, "temperature": 0, "stream": number % 2 == 0}
    outcomes = []
    with closing(HTTPConnection(urlsplit(server.url).netloc, timeout=600)) as connection:
        while not outcomes or outcomes[-1] == "complete":
            outcomes.append(outcome_of(connection, body))
    return outcomes


def outcome_of(connection: HTTPConnection, body: dict) -> str:
    """Return what became of a request: complete, refused, told (an error ends its stream) or cut."""
    try:
        connection.request("POST", "/v1/chat/completions", json.dumps(body))
        response = connection.getresponse()
    except ConnectionError:
        return "refused"
    try:
        said = response.read().decode()
    except (ConnectionError, HTTPException):
        return "cut"
    if response.status != 200:
        return "refused" if response.status == 503 else f"status {response.status}"
    if 'data: {"error"' in said:
        return "told"
    ended = re.search(r'"finish_reason": ?"(stop|length)"', said) and ("data: [DONE]" in said or not body["stream"])
    return "complete" if ended else "cut"


if __name__ == "__main__":
    main(sys.argv[1:])
