"""`lskip serve` beside `transformers serve` and llama-cpp-python's server: tokens a second, in turns.

    python -m benchmarks.serving.peers --out result [--llama_cpp_python PATH] [--quick]

All serve the same float32 weights, which `lskip export` writes, on as many threads, and stay up throughout; one is
asked at a time, and each turn begins with another one. Greedy chats, streamed, by OpenAI's own client. An answer's
tokens are those of its text, counted by one tokenizer, since llama-cpp-python's stream does not tell them.

transformers batches continuously; its cache gets a twentieth of the memory, where by default it takes most of it.
llama-cpp-python answers one request at a time, so one client asks it; its keys and values are in float16, as it comes.
A peer that is not installed is left out.

Writes result.json into --out.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from rich.console import Console
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from benchmarks.command_line import command_parser
from benchmarks.decoding.options import numbers
from benchmarks.environment import environment
from benchmarks.serving.load import prompt_of
from benchmarks.serving.server_process import Server, ask, at_once, lskip_server, other_server
from lskip.export.to_hf import GGUF_FILE, export
from lskip.utils.output_files import write_json

FIRST = "lskip, draft auto"  # whose speed is told as a multiple of each other's
console = Console(width=140)


class Contestant(NamedTuple):
    """A server to ask.

    Attributes:
        started: serves as long as it is entered.
        model: its name for clients.
        concurrency: clients at a time.
        fields: of its requests, beside those of all.
    """

    started: AbstractContextManager[Server]
    model: str
    concurrency: tuple[int, ...]
    fields: dict[str, Any]


class Turn(NamedTuple):
    """What a server did in one turn: tokens a second, seconds until the first ones, its texts."""

    rate: float
    firsts: list[float]
    texts: list[str]


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    os.environ |= {"OMP_NUM_THREADS": str(options.threads), "HF_HUB_OFFLINE": "1"}  # for the servers
    options.out.mkdir(parents=True, exist_ok=True)
    result = {"environment": environment(torch.device("cpu")), "options": vars(options)}
    with TemporaryDirectory(dir=options.out) as folder:
        exported = Path(folder) / "model"
        export(options.model, str(exported), gguf=True)
        result["rows"] = compare(dict(contestants(options, exported)), exported, options)
    console.print(result["rows"])
    write_json(options.out / "result.json", result)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = command_parser("benchmarks.serving.peers", __doc__)
    add = parser.add_argument
    add("--out", required=True, type=Path, help="folder for result.json and the peers' logs")
    add("--model", default="smollm2", help="of the Llama family, which llama.cpp reads")
    add("--transformers_python", default=sys.executable, help="interpreter that has transformers[serving]")
    add("--llama_cpp_python", default=sys.executable, help="interpreter that has llama-cpp-python[server]")
    add("--concurrency", type=numbers, default=(1, 8), help="clients")
    add("--prompts", type=int, default=16, help="of a turn, for each number of clients")
    add("--turns", type=int, default=5, help="behind one that warms up")
    add("--tokens", type=int, default=64, help="of an answer, at most")
    add("--threads", type=int, default=2, help="of each server")
    add("--quick", action="store_true", help="few and short answers, to see that it runs; its times say nothing")
    options = parser.parse_args(arguments)
    if options.quick:
        options.concurrency, options.prompts, options.turns, options.tokens = (1, 2), 2, 1, 16
    return options


def contestants(options: argparse.Namespace, exported: Path) -> Iterator[tuple[str, Contestant]]:
    """Yield lskip's servers and those of the peers that are installed, each with its name."""
    slots = f"--max_batch_size={max(options.concurrency)}"
    for draft in ("auto", "null"):
        started = lskip_server(str(exported), slots, f"--draft={draft}", "--max_context=1024")
        yield f"lskip, draft {draft}", Contestant(started, exported.name, options.concurrency, {})
    if has(options.transformers_python, "import fastapi, openai, transformers.cli.serving, uvicorn"):
        # the command of that interpreter, whose folder need not be in PATH
        command = [options.transformers_python, "-c", "from transformers.cli.transformers import main; main()", "serve"]
        command += [str(exported), "--device=cpu", "--dtype=float32"]
        command += ["--continuous-batching", "--cb-max-memory-percent=0.05"]
        started = other_server(command, options.out / "transformers.log")
        yield "transformers", Contestant(started, str(exported), options.concurrency, {})
    if has(options.llama_cpp_python, "import llama_cpp.server.app"):
        command = [options.llama_cpp_python, "-m", "llama_cpp.server", "--model", str(exported / GGUF_FILE)]
        command += ["--n_ctx=1024", f"--n_threads={options.threads}", f"--n_threads_batch={options.threads}"]
        started = other_server(command, options.out / "llama_cpp.log")
        fields = {"extra_body": {"repeat_penalty": 1.0}}  # 1.1 if nothing is said, also where greedy
        yield "llama-cpp-python", Contestant(started, exported.name, (1,), fields)


def has(python: str, statement: str) -> bool:
    """Return whether an interpreter can import what a peer needs, and say so where it cannot."""
    tried = subprocess.run([python, "-c", statement], capture_output=True, text=True)
    if tried.returncode:
        said = tried.stderr.strip().rpartition("\n")[2]
        console.print(f"left out, since {python} cannot do '{statement}': {said}", soft_wrap=True, markup=False)
    return not tried.returncode


def compare(servers: dict[str, Contestant], exported: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return a row for each number of clients and server: what it did in the turns behind the first."""
    tokenizer = AutoTokenizer.from_pretrained(exported)
    cells = [(clients, name) for clients in options.concurrency for name in servers]
    cells = [(clients, name) for clients, name in cells if clients in servers[name].concurrency]
    turns: dict[tuple[int, str], list[Turn]] = {cell: [] for cell in cells}
    with ExitStack() as stack:
        running = {name: stack.enter_context(each.started) for name, each in servers.items()}
        for turn in range(options.turns + 1):
            start = turn % len(cells)
            for clients, name in cells[start:] + cells[:start]:
                found = take_turn(servers[name], running[name], clients, tokenizer, options)
                turns[clients, name].append(found)
                console.print(f"turn {turn}, clients {clients}, {name}: {found.rate:.1f} tokens a second")
    reference = turns[cells[0]][0].texts
    return [
        {"clients": clients, "server": name, **summary(done, turns[clients, FIRST], reference)}
        for (clients, name), done in turns.items()
    ]


def take_turn(
    asked: Contestant,
    server: Server,
    clients: int,
    tokenizer: PreTrainedTokenizerBase,
    options: argparse.Namespace,
) -> Turn:
    """Return what a server did with the prompts."""
    fields = {"max_tokens": options.tokens, "temperature": 0.0, **asked.fields}
    prompts = [prompt_of(1000 + number) for number in range(options.prompts)]
    with server.client() as client:
        answers, seconds = at_once(clients, lambda each: ask(client, asked.model, each, **fields), prompts)
    texts = [each.text for each in answers]
    tokens = sum(len(tokenizer.encode(text, add_special_tokens=False)) for text in texts)
    return Turn(tokens / seconds, [each.first for each in answers], texts)


def summary(turns: list[Turn], first: list[Turn], reference: list[str]) -> dict[str, Any]:
    """Return medians over turns, the ratio of FIRST's speed to this one's in the same turn among them."""
    timed = turns[1:]  # the first warms up, and a policy learns
    ratios = [one.rate / other.rate for one, other in zip(first[1:], timed, strict=True)]
    return {
        "tokens_per_second": statistics.median(turn.rate for turn in timed),
        "of_each_turn": [turn.rate for turn in timed],
        "first_over_this": statistics.median(ratios),
        "first_token": statistics.median(seconds for turn in timed for seconds in turn.firsts),
        "answers": len(turns) * len(reference),
        "differing": sum(a != b for turn in turns for a, b in zip(turn.texts, reference, strict=True)),
    }


if __name__ == "__main__":
    main(sys.argv[1:])
