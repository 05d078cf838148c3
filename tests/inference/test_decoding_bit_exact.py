"""The bit-exact option: a position's logits are the same bits alone, among others, in any batch, drafted or not.

Each part of this claim is compared with one token at a time in a cache of its own. Longer contexts and real sizes:
`python -m benchmarks.decoding.correctness bit_exact`.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from random import Random

import pytest
import torch
from torch import Tensor

from lskip.inference import TextGenerator
from lskip.inference.layers.kv_cache import KVCache
from lskip.inference.layers.layout_choice import obstacle_to
from lskip.inference.layers.linear import Packed, Plain, Sliced
from lskip.inference.runners.base import ModelRunner
from lskip.inference.runners.fused_runner import FusedRunner
from lskip.models.decoder import Decoder
from tests.conftest import make_model

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# Wide enough that kernels do choose by the number of rows, with sizes that no kernel likes.
SIZES = {
    "vocab_size": 501,
    "hidden_size": 192,
    "intermediate_size": 432,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "eos_token_id": None,
    "initializer_range": 0.1,
}
# Without AVX-512 oneDNN packs no bfloat16.
PACKS_BFLOAT16 = obstacle_to(Packed, torch.ones(8, 8, dtype=torch.bfloat16)) is None


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Set torch's threads, and afterwards as many as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def make_sized(family: str, dtype: str, **overrides):
    return make_model(family, **{**SIZES, **overrides}).to(DTYPES[dtype])


def make_ids(count: int, vocab_size: int = 501, seed: int = 0) -> Tensor:
    """Return random token ids [1, count]."""
    return torch.randint(1, vocab_size, (1, count), generator=torch.Generator().manual_seed(seed))


def logits_of(runner: ModelRunner, ids: Tensor, cache: KVCache, starts: list[int]) -> Tensor:
    """Return logits [A, n, V] of ids [A, n] at positions from `starts` on."""
    return runner.decode(runner.run(runner.embed(ids), cache, starts, 0, runner.num_layers))


def token_by_token(runner: ModelRunner, ids: Tensor) -> tuple[Tensor, KVCache]:
    """Return logits [S, V] of ids [1, S], with a pass for each, and the cache that this leaves."""
    cache = runner.new_cache(1, ids.shape[1])
    rows = [logits_of(runner, ids[:, place : place + 1], cache, [place])[0] for place in range(ids.shape[1])]
    return torch.cat(rows), cache


def differing_blocks(runner: ModelRunner, ids: Tensor, truth: Tensor, cache: KVCache, cases) -> list[tuple[int, int]]:
    """Return the (start, rows) that give other bits than one token at a time, each in one pass over the filled cache.

    The passes write keys and values again, the same ones unless there is a difference to be found.
    """
    found = []
    for start, rows in cases:
        ours = logits_of(runner, ids[:, start : start + rows], cache, [start])[0]
        if not torch.equal(ours, truth[start : start + rows]):
            found.append((start, rows))
    return found


def blocks_everywhere(length: int, most: int = 16) -> list[tuple[int, int]]:
    """Return (start, rows): every number of rows from each start mod 4, early, late and in between."""
    random, cases = Random(length), []
    for rows, offset in product(range(1, most + 1), range(4)):
        last = (length - rows - offset) // 4
        if last >= 0:
            cases += [(4 * group + offset, rows) for group in (0, last, random.randint(0, last))]
    return cases


def differing_slots(runner: ModelRunner, ids: Tensor, truth: Tensor, cases) -> list[tuple[list[int], int]]:
    """Return the (starts, rows) that give other bits than one token at a time in some slot of a batch.

    Each slot has the same text up to another length, prefilled alone in one pass, and garbage after it.
    """
    found = []
    for starts, rows in cases:
        cache = runner.new_cache(len(starts) + 1, max(starts) + rows)
        cache.kv.normal_()
        for slot, start in enumerate(starts):
            if start:
                runner.run(runner.embed(ids[:, :start]), cache.slot(slot), [0], 0, runner.num_layers)
        ours = logits_of(runner, torch.cat([ids[:, start : start + rows] for start in starts]), cache, starts)
        if not all(torch.equal(ours[slot], truth[start : start + rows]) for slot, start in enumerate(starts)):
            found.append((starts, rows))
    return found


def batches(length: int, count: int) -> list[tuple[list[int], int]]:
    """Return random (starts, rows), with slots of unequal length."""
    random = Random(count)
    cases = []
    for rows in (random.randint(1, 8) for _ in range(count)):
        cases.append(([random.randint(0, length - rows) for _ in range(random.randint(2, 6))], rows))
    return cases


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("dtype", DTYPES)
@torch.inference_mode()
def test_logits_keep_their_bits(dtype, family):
    windows = {"sliding_window": 21, "use_sliding_window": True, "max_window_layers": 1} if family == "qwen3" else {}
    runner = TextGenerator(make_sized(family, dtype, **windows), bit_exact=True).runner
    ids = make_ids(280 if family == "llama" else 90)
    truth, cache = token_by_token(runner, ids)
    assert truth.isfinite().all()
    assert differing_blocks(runner, ids, truth, cache, blocks_everywhere(ids.shape[1])) == []
    assert differing_slots(runner, ids, truth, batches(ids.shape[1], 12)) == []
    if dtype == "bfloat16" and not PACKS_BFLOAT16:
        assert runner.layout in ("Widened", "Sliced")


@pytest.mark.parametrize("dtype", DTYPES)
@torch.inference_mode()
def test_logits_keep_their_bits_on_two_threads(dtype):
    """Only a few passes: on a busy machine threads wait for each other in every product."""
    with threads(2):
        runner = TextGenerator(make_sized("llama", dtype, num_hidden_layers=1), bit_exact=True).runner
        ids = make_ids(20)
        truth, cache = token_by_token(runner, ids)
        cases = [(0, 16), (1, 5), (2, 12), (3, 8), (6, 3), (9, 9)]
        assert differing_blocks(runner, ids, truth, cache, cases) == []
        assert differing_slots(runner, ids, truth, [([15, 0, 7], 5), ([3, 11], 2)]) == []


@pytest.mark.parametrize("dtype", DTYPES)
@torch.inference_mode()
def test_bits_do_not_depend_on_how_threads_share_the_work(dtype):
    """Large enough that torch cuts elementwise operations in three, in the middle of a row."""
    with threads(4):
        model = make_sized("llama", dtype, num_hidden_layers=1, intermediate_size=2000)
        runner = TextGenerator(model, bit_exact=True).runner
        ids, cache = make_ids(44), runner.new_cache(1, 44)
        truth = [logits_of(runner, ids[:, start : start + 4], cache, [start]) for start in range(0, 44, 4)]
        assert torch.equal(logits_of(runner, ids, cache, [0]), torch.cat(truth, 1))


@pytest.mark.parametrize("layout", [Sliced, Packed])
@pytest.mark.parametrize("dtype", DTYPES)
@torch.inference_mode()
def test_a_prompt_in_one_pass_and_a_draft_left_at_an_exit(dtype, layout):
    """Prefill against single tokens; rows that ran to the exit one by one and go on together, as drafts do."""
    if layout is Packed and dtype == "bfloat16" and not PACKS_BFLOAT16:
        pytest.skip("this CPU packs no bfloat16")
    runner = FusedRunner(Decoder(make_sized("llama", dtype)), [layout], width=4)
    ids = make_ids(150)
    truth, _ = token_by_token(runner, ids)
    cache = runner.new_cache(1, 150)
    prefix = logits_of(runner, ids[:, :131], cache, [0])[0]
    assert torch.equal(prefix, truth[:131])
    drafted = [runner.run(runner.embed(ids[:, place : place + 1]), cache, [place], 0, 1) for place in range(131, 150)]
    verified = runner.decode(runner.run(torch.cat(drafted, 1), cache, [131], 1, runner.num_layers))
    assert torch.equal(verified[0], truth[131:])


@torch.inference_mode()
def test_without_the_option_bits_do_depend_on_the_rows():
    """Otherwise the tests above would show nothing about the option."""
    for layout in (Packed, Plain) if PACKS_BFLOAT16 else (Plain,):
        runner = FusedRunner(Decoder(make_sized("llama", "bfloat16")), [layout])
        ids = make_ids(120)
        truth, cache = token_by_token(runner, ids)
        if differing_blocks(runner, ids, truth, cache, blocks_everywhere(120)):
            return
    pytest.skip("on this machine no bfloat16 product depends on the number of rows, without the option either")


WAYS = {
    "layers": {"exit_layer": 1, "num_speculations": 3, "draft": "layers"},
    "long draft": {"exit_layer": 2, "num_speculations": 7, "draft": "layers"},
    "weights": {"num_speculations": 4, "draft": "weights"},
    "ngram": {"num_speculations": 5, "draft": "ngram"},
}


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.8, "top_p": 0.9, "seed": 11}], ids=["greedy", "sampled"])
def test_bfloat16_texts_do_not_depend_on_draft_and_batch(sampling):
    """The vocabulary is small, so that n-grams come again."""
    generator = TextGenerator(make_sized("llama", "bfloat16", vocab_size=30), draft_weights="int8", bit_exact=True)
    prompts = [make_ids(length, 30, seed=length)[0].tolist() for length in (5, 83, 1, 40)]
    settings = {"max_new_tokens": 18, **sampling}
    truth = []
    for index, prompt in enumerate(prompts):
        seed = {"seed": sampling["seed"] + index} if sampling else {}
        truth.append(generator.generate(prompt, **{**settings, **seed}).token_ids)
    assert len({token for text in truth for token in text}) > 12
    for way, batch_size in [*product(WAYS, (1, 4)), (None, 4)]:
        outcomes = dict(generator.generate_batch(prompts, batch_size, **settings, **WAYS.get(way, {})))
        assert [outcomes[index].token_ids for index in range(len(prompts))] == truth, (way, batch_size)
        assert way is None or sum(one.drafted for one in outcomes.values()) > 0


@pytest.mark.skipif(not PACKS_BFLOAT16, reason="this is such a CPU, or the process that the test below starts")
def test_all_of_it_on_a_cpu_without_avx512():
    """oneDNN then refuses to pack bfloat16, and Widened or Sliced stands in for it."""
    chosen = "(keep_their_bits and bfloat16 and llama and not two) or a_prompt or (texts and greedy)"
    outcome = subprocess.run(
        [sys.executable, "-m", "pytest", __file__, "-p", "no:cacheprovider", "-k", chosen],
        env={**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert outcome.returncode == 0, outcome.stdout[-3000:] + outcome.stderr[-1000:]
