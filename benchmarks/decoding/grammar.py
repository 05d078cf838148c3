"""Structured output with each kind of draft: whether texts are valid, whether they are those without drafts, its cost.

    python -m benchmarks.decoding.grammar --out result [--schemas 200] [--max_new_tokens 256] [--threads 2] [--quick]

Seeded random schemas (nested objects, arrays, enumerations, bounded and unbounded strings, numbers, patterns, unions),
each with a prompt of its own, are answered by SmolLM2: without drafts, then with each kind of draft. Every answer that
ends is checked by the library jsonschema. The cost of the grammar: some of the prompts without drafts, with and without
a grammar, in turns, as many tokens of each. Writes result.json into --out.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from pathlib import Path
from typing import Any

import jsonschema
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.command_line import command_parser
from benchmarks.environment import environment
from lskip.inference import Generation, TextGenerator, load_generator
from lskip.utils.output_files import write_json

NAMES = ("name", "title", "city", "country", "year", "price", "color", "size", "tags", "notes", "author", "active")
TOPICS = ("a river", "a book", "a phone", "a city", "a painter", "a recipe", "a train", "a bird", "a film", "a game")
PATTERNS = ("[A-Z]{2}-[0-9]{4}", "[a-z]{1,12}@[a-z]{1,12}\\.(com|org)", "(19|20)[0-9]{2}")
WAYS: dict[str, dict[str, Any]] = {
    "none": {},
    "layers": {"draft": "layers", "exit_layer": 20, "num_speculations": 3},
    "ngram": {"draft": "ngram", "num_speculations": 4},
    "int4": {"draft": "weights", "num_speculations": 8},
    "adapter": {"draft": "adapter", "num_speculations": 2},
    "auto": {"draft": "auto"},
}
console = Console(width=140)


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    generators = {name: generator_of(options.model, name) for name in options.ways}
    cases = [case(number) for number in range(options.schemas)]
    reference = [answer(generators["none"], *each, options) for each in cases]
    result: dict[str, Any] = {
        "environment": environment(torch.device("cpu")),
        "options": vars(options),
        "ways": {"none": record(cases, reference, reference)},
    }
    for name in options.ways:
        if name != "none":
            found = [answer(generators[name], *each, options, **WAYS[name]) for each in cases]
            result["ways"][name] = record(cases, found, reference)
        options.out.mkdir(parents=True, exist_ok=True)
        write_json(options.out / "result.json", result)
    result["cost"] = cost_of_grammar(generators["none"], cases[: options.timed], options)
    write_json(options.out / "result.json", result)
    print_result(result)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = command_parser("benchmarks.decoding.grammar", __doc__)
    add = parser.add_argument
    add("--out", required=True, type=Path, help="folder for result.json")
    add("--model", default="smollm2")
    add("--ways", type=lambda text: tuple(text.split(",")), default=tuple(WAYS), help=f"of {','.join(WAYS)}")
    add("--schemas", type=int, default=200)
    add("--max_new_tokens", type=int, default=256)
    add("--timed", type=int, default=20, help="prompts for the cost of the grammar")
    add("--threads", type=int, default=2)
    add("--quick", action="store_true", help="three schemas and short texts, to see that it runs")
    options = parser.parse_args(arguments)
    if unknown := set(options.ways) - WAYS.keys():
        parser.error(f"--ways: {', '.join(sorted(unknown))} is not one of {', '.join(WAYS)}")
    if options.quick:
        options.schemas, options.max_new_tokens, options.timed = 3, 48, 1
    options.ways = ("none", *(name for name in options.ways if name != "none"))
    return options


def generator_of(model: str, way: str) -> TextGenerator:
    """Return a generator with what a way of drafting needs."""
    adapter = "smollm2" if way == "adapter" else None
    weights = {"int4": "int4", "auto": "auto"}.get(way)
    return load_generator(model, draft_weights=weights, exit_adapter=adapter, costs_file="auto")


def case(number: int) -> tuple[str, dict]:
    """Return a prompt and a schema."""
    random_ = random.Random(number)
    schema = object_schema(random_, depth=0)
    topic = random_.choice(TOPICS)
    return f"Describe {topic} as JSON with the fields {', '.join(schema['properties'])}. Answer with JSON only.", schema


def object_schema(random_: random.Random, depth: int) -> dict:
    names = random_.sample(NAMES, random_.randint(1, 4))
    required = [name for name in names if random_.random() < 0.8]
    properties = {name: value_schema(random_, depth + 1) for name in names}
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


def value_schema(random_: random.Random, depth: int) -> dict:
    makers = [
        lambda: {"type": "string"},
        lambda: {"type": "string", "maxLength": random_.choice((5, 20, 60))},
        lambda: {"type": "string", "pattern": f"^{random_.choice(PATTERNS)}$"},
        lambda: {"type": "integer"},
        lambda: {"type": "integer", "minimum": 1, "maximum": random_.choice((10, 5000))},
        lambda: {"type": "number"},
        lambda: {"type": "boolean"},
        lambda: {"enum": random_.sample(("red", "green", "blue", "small", "large", 1, None), 3)},
        lambda: {"anyOf": [{"type": "integer"}, {"type": "null"}]},
    ]
    if depth < 3:
        makers += [
            lambda: object_schema(random_, depth),
            lambda: {"type": "array", "items": value_schema(random_, depth + 1)},
            lambda: {"type": "array", "items": value_schema(random_, depth + 1), "minItems": 1, "maxItems": 3},
        ]
    return random_.choice(makers)()


def answer(
    generator: TextGenerator, prompt: str, schema: dict | None, options: argparse.Namespace, **way
) -> Generation:
    given = {} if schema is None else {"json_schema": schema}
    return generator.generate(prompt, max_new_tokens=options.max_new_tokens, temperature=0, **given, **way)


def record(cases: list, found: list[Generation], reference: list[Generation]) -> dict[str, Any]:
    """Count valid, invalid and cut texts, those that differ from the reference, tokens, rounds and seconds."""
    ended = [(each, schema) for each, (_, schema) in zip(found, cases, strict=True) if each.finish_reason == "eos"]
    rounds = sum(len(each.history) for each in found)
    tokens = sum(len(each.token_ids) for each in found)
    return {
        "texts": len(found),
        "valid": sum(is_valid(each.text, schema) for each, schema in ended),
        "ended": len(ended),
        "cut": len(found) - len(ended),
        "mismatches": sum(a.token_ids != b.token_ids for a, b in zip(found, reference, strict=True)),
        "tokens": tokens,
        "tokens_per_round": tokens / rounds if rounds else None,
        "seconds": sum(each.seconds for each in found),
    }


def is_valid(text: str, schema: dict) -> bool:
    try:
        jsonschema.validate(json.loads(text), schema)
    except (ValueError, jsonschema.ValidationError):
        return False
    return True


def cost_of_grammar(generator: TextGenerator, cases: list, options: argparse.Namespace) -> dict[str, float]:
    """Return milliseconds a token without and with a grammar, of as many tokens each, in turns."""
    seconds, tokens = {"free": 0.0, "grammar": 0.0}, {"free": 0, "grammar": 0}
    for number, (prompt, schema) in enumerate(cases):
        length = len(answer(generator, prompt, schema, options).token_ids)
        for name in ("free", "grammar") if number % 2 else ("grammar", "free"):
            given = {"json_schema": schema} if name == "grammar" else {}
            began = time.perf_counter()
            outcome = generator.generate(prompt, max_new_tokens=length, temperature=0, **given)
            seconds[name] += time.perf_counter() - began
            tokens[name] += len(outcome.token_ids)
    return {name: 1000 * seconds[name] / tokens[name] for name in seconds}


def print_result(result: dict[str, Any]) -> None:
    table = Table("draft", "texts", "valid of ended", "cut by length", "others than without", "tokens a round", "s")
    for name, row in result["ways"].items():
        counts = (row["texts"], f"{row['valid']} of {row['ended']}", row["cut"], row["mismatches"])
        pace = "" if row["tokens_per_round"] is None else f"{row['tokens_per_round']:.2f}"
        table.add_row(name, *map(str, counts), pace, f"{row['seconds']:.0f}")
    console.print(table)
    cost = result["cost"]
    console.print(f"{cost['free']:.1f} ms a token without a grammar, {cost['grammar']:.1f} with, no drafts")


if __name__ == "__main__":
    main(sys.argv[1:])
