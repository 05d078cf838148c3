"""Long versions of tests/inference/test_decoding_*.py: correctness of the decoding engine, and how often it fails.

    python -m benchmarks.decoding.correctness equality     greedy text against transformers' generate, in float32
    python -m benchmarks.decoding.correctness rounded      the same of models in 8 bits, against the rounded model's
    python -m benchmarks.decoding.correctness bit_exact    logits under the bit-exact option, bit for bit
    python -m benchmarks.decoding.correctness sampling     draws against exact enumeration, by chi-square

Each prints a line for each model or setting with its mismatches; the exit code is 1 if there are any.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from random import Random

import torch

from benchmarks.command_line import command_parser
from benchmarks.environment import environment
from lskip.inference import TextGenerator
from lskip.utils.output_files import write_json
from tests.inference import test_decoding_bit_exact as bits
from tests.inference import test_decoding_distribution as draws
from tests.inference import test_decoding_equality as texts

PROMPTS, WAYS = 8, 4  # of each model in `equality`
CONTEXT, NEW_TOKENS = 256, 64
REAL_SIZES = {  # SmolLM2-135M's, with fewer blocks and words
    "vocab_size": 4096,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 2,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "initializer_range": 0.05,
}
ROUND_OF_DRAWS = 5000  # texts that are prepared at a time


def equality(options: argparse.Namespace) -> Iterator[dict]:
    """Models of every family in turn, each with prompts of its own, until so many tokens of `generate` are compared."""
    return of_families(tuple(texts.FAMILIES), options, texts.make_generators)


def rounded(options: argparse.Namespace) -> Iterator[dict]:
    """The same with `weights: int8`, of the families that it is for."""
    families = tuple(family for family in texts.FAMILIES if family != "modules")
    return of_families(families, options, texts.make_rounded_generators)


def of_families(families: tuple[str, ...], options: argparse.Namespace, make_generators: Callable) -> Iterator[dict]:
    done, seed = 0, options.seed
    while done < options.tokens:
        for family in families:
            record = compare_texts(family, seed, make_generators)
            done += record["tokens"]
            yield record
        seed += 1


def compare_texts(family: str, seed: int, make_generators: Callable) -> dict:
    """A random model's texts for some prompts, decoded in several ways; near-ties of its logits are counted too."""
    random, model = Random(f"{family} {seed}"), texts.make_case_model(family, seed, CONTEXT)
    lengths = [1, CONTEXT - 1, *(random.randint(1, CONTEXT - 2) for _ in range(PROMPTS - 2))]
    prompts = [texts.make_prompt(length, random) for length in lengths]
    generators = make_generators(model, family)  # those of rounded weights round the model itself
    reference = texts.transformers_texts(model, prompts, NEW_TOKENS, CONTEXT)
    compared, drafted, wrong = 0, 0, []
    for _ in range(WAYS):
        way = texts.make_way(generators, random.randint(1, texts.LAYERS - 1), random.randint(1, 16), random)
        ours = texts.decode(generators[way.generator], prompts, way, NEW_TOKENS)
        compared += reference.num_tokens
        drafted += sum(one.drafted for one in ours)
        for mismatch in texts.mismatches(reference, [one.token_ids for one in ours]):
            named = {"weights": way.generator, "batch_size": way.batch_size, "policy": type(way.policy).__name__}
            wrong.append({**mismatch, **named, **way.settings})
    return {
        "family": family,
        "seed": seed,
        "tokens": reference.num_tokens,
        "compared": compared,
        "drafted": drafted,
        "least_margin": min(map(min, reference.margins)),
        "mismatches": wrong,
    }


def bit_exact(options: argparse.Namespace) -> Iterator[dict]:
    """Two families in both types, on one thread and on two, up to a long context."""
    for threads, dtype, family in product(options.threads_tried, bits.DTYPES, ("llama", "qwen3")):
        with bits.threads(threads):
            yield {"threads": threads, **compare_bits(dtype, family, options.context)}


@torch.inference_mode()
def compare_bits(dtype: str, family: str, context: int) -> dict:
    """One token at a time against blocks of 1 to 16 rows at every start mod 4, and against batches of unequal rows."""
    model = bits.make_sized(family, dtype, **REAL_SIZES, max_position_embeddings=context)
    runner = TextGenerator(model, bit_exact=True).runner
    ids = bits.make_ids(context, REAL_SIZES["vocab_size"])
    truth, cache = bits.token_by_token(runner, ids)
    blocks = [case for length in (context // 4, context) for case in bits.blocks_everywhere(length)]
    batches = bits.batches(context, 12)
    wrong = bits.differing_blocks(runner, ids, truth, cache, blocks) + bits.differing_slots(runner, ids, truth, batches)
    positions = sum(rows for _, rows in blocks) + sum(rows * len(starts) for starts, rows in batches)
    return {
        "dtype": dtype,
        "family": family,
        "layout": runner.layout,
        "cpu": os.environ.get("ONEDNN_MAX_CPU_ISA", "all of it"),
        "context": context,
        "passes": len(blocks) + len(batches),
        "positions": positions,
        "mismatches": wrong,
    }


def sampling(options: argparse.Namespace) -> Iterator[dict]:
    """Each draft, draft length, acceptance and batch, so many draws each with seeds of their own."""
    generator, truth = draws.make_generator(), draws.joint(draws.next_word_probabilities(draws.LAYERS))
    for index, setup in enumerate(draws.ALL_SETUPS if options.all else draws.TESTED):
        seed, counts = 10**9 + 10**8 * index, 0.0
        for start in range(0, options.draws, ROUND_OF_DRAWS):
            size = min(ROUND_OF_DRAWS, options.draws - start)
            counts = counts + draws.draw(generator, setup, size, seed + start)
        p = draws.chi_square_p(counts, truth)
        wrong = [] if p > draws.LEAST_P else [f"p = {p}"]
        yield {**setup._asdict(), "draws": options.draws, "p": p, "mismatches": wrong}


CHECKS = {"equality": equality, "rounded": rounded, "bit_exact": bit_exact, "sampling": sampling}


def run(options: argparse.Namespace) -> list[dict]:
    """All records of the chosen check, each printed as it comes."""
    records, begin = [], time.perf_counter()
    for record in CHECKS[options.check](options):
        records.append(record)
        print(", ".join(f"{name} {value}" for name, value in record.items()), flush=True)
    print(f"{options.check}: {time.perf_counter() - begin:.0f} s, {summary(records)}")
    return records


def summary(records: list[dict]) -> str:
    """Totals of what counts, and the number of mismatches."""
    totals = {name: sum(one.get(name, 0) for one in records) for name in ("tokens", "compared", "positions", "draws")}
    counted = [f"{total:,} {name}" for name, total in totals.items() if total]
    return ", ".join([*counted, f"{sum(len(one['mismatches']) for one in records)} mismatches"])


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = command_parser("benchmarks.decoding.correctness", __doc__.splitlines()[0])
    parser.add_argument("check", choices=CHECKS)
    parser.add_argument(
        "--tokens", type=int, default=20_000, help="equality, rounded: tokens of `generate` to compare with"
    )
    parser.add_argument("--seed", type=int, default=0, help="equality, rounded: of the first model")
    parser.add_argument("--context", type=int, default=2_000, help="bit_exact: positions")
    parser.add_argument(
        "--threads_tried", type=int, nargs="+", default=[1, 2], help="bit_exact: two are slow on a busy machine"
    )
    parser.add_argument("--draws", type=int, default=50_000, help="sampling: of each setting")
    parser.add_argument("--all", action="store_true", help="sampling: all 32 settings, not only those of the tests")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, help="write the records here as JSON")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    records = run(options)
    if options.output is not None:
        result = {"environment": environment(torch.device("cpu")), "check": options.check, "records": records}
        write_json(options.output, result)
    return int(any(record["mismatches"] for record in records))


if __name__ == "__main__":
    sys.exit(main())
