"""`lskip serve` under load, asked by OpenAI's own client: texts, speed, first tokens.

    python -m benchmarks.serving.load --out result [--model smollm2] [--parts texts,speed,turns,delay] [--quick]

texts: 300 requests by 32 clients, of mixed lengths, greedy and sampled with a seed, with mixed bounds on drafts: every
    text against the one that `generate` makes alone. Where they differ, by how much the token that was chosen alone
    led there. `--bit_exact` loads the model so that none may.
speed: tokens a second at 1, 4, 8 and 16 clients over `generate_batch` in this process with as many slots, in turns,
    without drafts and with `auto`.
turns: seconds until the first token of a conversation's second turn over those of the same prompt cold.
delay: the longest pause of an answer while prompts of 2,000 tokens come in, beside a piece's time.

Writes result.json into --out.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from threading import Thread
from typing import Any

import torch
from openai import OpenAI
from rich.console import Console

from benchmarks.command_line import command_parser
from benchmarks.decoding.options import numbers
from benchmarks.environment import environment
from benchmarks.serving.server_process import Served, ask, at_once, lskip_server
from lskip.inference import TextGenerator, load_generator
from lskip.utils.output_files import write_json

PARTS = ("texts", "speed", "turns", "delay")
THINGS = ("a river", "bread", "the moon", "a bicycle", "rain", "a letter to a friend", "the number seven", "winter")
ASKED = ("Explain {}.", "Write three sentences about {}.", "What is {}? Answer in one word.", "List facts about {}.")
console = Console(width=140)


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    result: dict[str, Any] = {"environment": environment(torch.device("cpu")), "options": vars(options)}
    options.out.mkdir(parents=True, exist_ok=True)
    for part in options.parts:
        result[part] = {"texts": check_texts, "speed": measure_speed, "turns": time_turns, "delay": time_delay}[part](
            options
        )
        console.print(part, result[part])
        write_json(options.out / "result.json", result)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = command_parser("benchmarks.serving.load", __doc__)
    add = parser.add_argument
    add("--out", required=True, type=Path, help="folder for result.json")
    add("--model", default="smollm2")
    add("--parts", type=lambda text: tuple(text.split(",")), default=PARTS, help=f"of {','.join(PARTS)}")
    add("--requests", type=int, default=300, help="of the part texts")
    add("--clients", type=int, default=32, help="of the part texts")
    add("--concurrency", type=numbers, default=(1, 4, 8, 16), help="clients of the part speed")
    add("--turns", type=int, default=3, help="of the parts speed and turns")
    add("--tokens", type=int, default=64, help="of an answer, at most")
    add("--long", type=int, default=2000, help="tokens of a long prompt, about")
    add("--bit_exact", action="store_true")
    add("--threads", type=int, default=2)
    add("--quick", action="store_true", help="few and short answers, to see that it runs; its times say nothing")
    options = parser.parse_args(arguments)
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"--parts: {', '.join(sorted(unknown))} is not one of {', '.join(PARTS)}")
    if options.quick:
        options.requests, options.clients, options.concurrency, options.turns = 8, 4, (2,), 1
        options.tokens, options.long = 8, 300
    return options


def prompt_of(number: int) -> list[dict[str, str]]:
    random_ = random.Random(number)
    return [{"role": "user", "content": random_.choice(ASKED).format(random_.choice(THINGS))}]


def check_texts(options: argparse.Namespace) -> dict[str, Any]:
    """Return how many answers of a loaded server are those of `generate` alone, and the margins where one is not."""
    requests = [mixed_request(number, options.tokens) for number in range(options.requests)]
    exact = ("--bit_exact=true",) if options.bit_exact else ()
    with lskip_server(options.model, "--max_batch_size=8", f"--max_waiting={options.requests}", *exact) as server:
        client = server.client()
        found, seconds = at_once(
            options.clients, lambda each: ask(client, options.model, each["messages"], **each["fields"]), requests
        )
    generator = load_generator(options.model, bit_exact=True if options.bit_exact else None)
    differing = []
    for request, answer in zip(requests, found, strict=True):
        alone = generator.generate(request["messages"], **request["settings"])
        if alone.text != answer.text:
            differing.append(margin(generator, request, alone.token_ids, answer))
    firsts = sorted(each.first for each in found)
    return {
        "answers": len(found),
        "differing": len(differing),
        "margins": differing,
        "tokens_per_second": sum(each.tokens for each in found) / seconds,
        "first_token_p50": statistics.median(firsts),
        "first_token_p95": firsts[int(0.95 * (len(firsts) - 1))],
    }


def mixed_request(number: int, tokens: int) -> dict[str, Any]:
    """Return a request: its messages, the client's fields, and the same as settings of `generate`."""
    random_ = random.Random(number)
    length = random_.randint(1, tokens)
    sampling = {"temperature": 0.0} if random_.random() < 0.5 else {"temperature": 0.8, "top_p": 0.9, "seed": number}
    bounds = random_.choice(({}, {}, {"draft": "none"}, {"num_speculations": 2}, {"exit_layer": 8}))
    fields = {"max_tokens": length, **sampling, "extra_body": bounds}
    return {"messages": prompt_of(number), "fields": fields, "settings": {"max_new_tokens": length, **sampling}}


@torch.inference_mode()
def margin(generator: TextGenerator, request: dict[str, Any], alone: list[int], answer: Served) -> float:
    """Return by how much the token that is chosen alone leads the next best, where the texts part."""
    settings = generator.settings(**request["settings"])
    prepared = generator.prepare(request["messages"], settings)
    shared = 0
    while answer.text.startswith(generator.tokenizer.decode(alone[: shared + 1], skip_special_tokens=True)):
        shared += 1
        if shared == len(alone):
            return 0.0
    prepared.chooser.text += alone[:shared]
    ids = torch.tensor([prepared.chooser.text])
    runner, cache = generator.runner, generator.runner.new_cache(1, ids.shape[1])
    x = runner.run(runner.embed(ids, [0]), cache, [0], 0, runner.num_layers)
    none = torch.empty(0, dtype=torch.long)
    scores = prepared.chooser.scores(runner.decode(x[:, -1:])[0], none)
    if not prepared.chooser.greedy:
        scores = scores + prepared.chooser.noise(ids.shape[1], scores)
    best, second = scores[0].topk(2).values.tolist()
    return best - second


def measure_speed(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return tokens a second, served and in process, by the number of clients and what drafts."""
    rows = []
    prompts = [prompt_of(1000 + number) for number in range(max(16, 2 * max(options.concurrency)))]
    prompts = prompts[: 4 if options.quick else None]
    for draft in ("null", "auto"):
        for clients in options.concurrency:
            rows.append(speed_at(options, prompts, clients, draft))
            console.print(rows[-1])
    return rows


def speed_at(options: argparse.Namespace, prompts: list, clients: int, draft: str) -> dict[str, Any]:
    settings = {"max_new_tokens": options.tokens, "temperature": 0.0, **({} if draft == "null" else {"draft": draft})}
    weights = None if draft == "null" else "auto"
    generator = load_generator(options.model, batch_size=clients, draft_weights=weights, costs_file="auto")
    rates: dict[str, list[float]] = {"served": [], "in_process": []}
    differing = 0
    with lskip_server(options.model, f"--max_batch_size={clients}", f"--draft={draft}", "--max_context=1024") as server:
        client = server.client()
        fields = {"max_tokens": options.tokens, "temperature": 0.0}
        for turn in range(options.turns + 1):
            served, taken = at_once(clients, lambda each: ask(client, options.model, each, **fields), prompts)
            rate = sum(each.tokens for each in served) / taken
            own, seconds = at_once(1, lambda _: dict(generator.generate_batch(prompts, clients, **settings)), [None])
            differing += sum(each.text != own[0][place].text for place, each in enumerate(served))
            if turn:  # the first warms up, and a policy learns
                rates["served"].append(rate)
                rates["in_process"].append(sum(len(each.token_ids) for each in own[0].values()) / seconds)
    served, in_process = (statistics.median(rates[name]) for name in ("served", "in_process"))
    return {
        **{"clients": clients, "draft": draft, "served": served, "in_process": in_process},
        **{"ratio": served / in_process, "answers": len(prompts) * (options.turns + 1), "differing": differing},
    }


def time_turns(options: argparse.Namespace) -> dict[str, float]:
    """Return seconds until the first token of second turns, cold and behind their first turn."""
    cold, warm = [], []
    with lskip_server(options.model, "--max_batch_size=2", "--draft=null") as server:
        client = server.client()
        for number in range(4 * options.turns):
            start = {"role": "user", "content": f"Talk {number}. " + long_text(options.long // 4, number)}
            first = ask(client, options.model, [start], max_tokens=options.tokens, temperature=0)
            more = [start, {"role": "assistant", "content": first.text}, {"role": "user", "content": "And then?"}]
            warm.append(ask(client, options.model, more, max_tokens=2, temperature=0).first)
            other = {**start, "content": f"Another {number}. " + start["content"]}
            cold.append(ask(client, options.model, [other, *more[1:]], max_tokens=2, temperature=0).first)
    ratio = statistics.median(a / b for a, b in zip(warm, cold, strict=True))
    return {"cold": statistics.median(cold), "second_turn": statistics.median(warm), "ratio": ratio}


def long_text(words: int, seed: int) -> str:
    random_ = random.Random(seed)
    return " ".join(random_.choice(THINGS[1:]) for _ in range(words // 2))


def time_delay(options: argparse.Namespace) -> dict[str, float]:
    """Return the longest pause of an answer alone and while a long prompt comes in, and a piece's time."""
    long = [{"role": "user", "content": long_text(options.long, 1)}]
    again = [{"role": "user", "content": "Again. " + long[0]["content"]}]
    with lskip_server(options.model, "--max_batch_size=2", "--draft=null") as server:
        client = server.client()
        one_token = partial(ask, client, options.model, max_tokens=1, temperature=0)
        whole = one_token(long).first
        alone, beside = (longest_pause(client, options, then) for then in (None, partial(one_token, again)))
    pieces = max(1, -(-options.long // 256))
    return {"alone": alone, "beside_a_long_prompt": beside, "a_piece": whole / pieces, "long_prompt": whole}


def longest_pause(client: OpenAI, options: argparse.Namespace, then: Callable[[], Any] | None) -> float:
    """Return the longest time between two pieces of an answer; `then` is begun behind the third."""
    stream = client.chat.completions.create(
        model=options.model, messages=prompt_of(0), max_tokens=4 * options.tokens, temperature=0, stream=True
    )
    last, longest, asking = None, 0.0, None
    for count, _ in enumerate(stream, 1):
        now = time.perf_counter()
        longest, last = (0.0 if last is None else max(longest, now - last)), now
        if count == 3 and then is not None:
            asking = Thread(target=then)
            asking.start()
    if asking is not None:
        asking.join()
    return longest


if __name__ == "__main__":
    main(sys.argv[1:])
