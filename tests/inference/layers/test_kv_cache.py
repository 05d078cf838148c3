"""Windows far shorter than the text: what a rolling cache holds, and that no text changes by it."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lskip.inference import TextGenerator
from lskip.inference.decoding import batch, engine
from lskip.inference.layers import kv_cache
from lskip.inference.layers.kv_cache import KVCache, RollingCache, cell_positions
from lskip.inference.layers.linear import Plain
from lskip.inference.runners.fused_runner import FusedRunner
from lskip.inference.runners.module_runner import ModuleRunner
from lskip.models.decoder import Decoder
from lskip.models.exit_adapter import AdapterShape, ExitAdapter
from lskip.module import LayerSkipModule
from tests.models.test_families import make, random_ids, text_of

SLIDING = {
    "mistral": {},
    "qwen3": {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 2},
    "phi3": {},
    "gemma2": {},
    "gemma3_text": {},
}
PROMPTS = [random_ids(length, seed=length).tolist() for length in (5, 61, 30, 44)]
SPECULATION = [
    {},
    {"exit_layer": 2, "num_speculations": 3},
    {"exit_layer": 2, "num_speculations": 19},  # more than a pass may verify
    {"draft": "ngram", "num_speculations": 7},
]


@pytest.fixture(autouse=True)
def few_rows_a_pass(monkeypatch):
    """So that a ring of 6 + 8 cells goes round several times in a short text."""
    set_rows_of_a_pass(monkeypatch, 8)


def set_rows_of_a_pass(monkeypatch, rows):
    for module in (engine, kv_cache):
        monkeypatch.setattr(module, "PREFILL_ROWS", rows)
    monkeypatch.setattr(batch, "LONGEST_DRAFT", rows - 1)


def test_the_positions_in_cells():
    """By a slow account: each slot writes its positions one after another, each into its cell."""
    starts, rows, size = [0, 9, 21], 3, 10
    expected = []
    for start in starts:
        ring = [None] * size
        for position in range(start + rows):
            ring[position % size] = position
        expected.append([start + rows if cell is None else cell for cell in ring])
    assert cell_positions(starts, rows, size, torch.device("cpu")).tolist() == expected
    assert cell_positions([2, 0], 2, 10, torch.device("cpu")).tolist() == [[0, 1, 2, 3], [0, 1, 2, 2]]


@pytest.mark.parametrize("family", SLIDING)
def test_texts_are_those_of_transformers(family):
    """In a batch whose slots are refilled, with refused drafts, many windows past the first."""
    model = make(family, **SLIDING[family])
    generator, expected = TextGenerator(model), [text_of(model, prompt) for prompt in PROMPTS]
    for settings in SPECULATION:
        ours = dict(generator.generate_batch(PROMPTS, batch_size=3, max_new_tokens=20, **settings))
        assert [ours[index].token_ids for index in range(4)] == expected


def test_rounded_weights_and_exit_adapters_draft_over_it():
    model = make("mistral")
    expected = text_of(model, PROMPTS[1])
    adapter = ExitAdapter(model, AdapterShape(2)).eval()
    for generator in (TextGenerator(model, draft_weights="int8"), TextGenerator(model, exit_adapter=adapter)):
        answer = generator.generate(PROMPTS[1], max_new_tokens=20, num_speculations=3)
        assert answer.token_ids == expected and answer.drafted > 0


RUNNERS = [(family, False) for family in SLIDING] + [("mistral", True), ("qwen3", True)]


@pytest.mark.parametrize(("family", "fused"), RUNNERS)
@torch.inference_mode()
def test_logits_of_slots_that_were_rolled_back(family, fused):
    """Two slots of unequal length; drafts of 8 tokens are run and refused before the true ones come."""
    model = make(family, **SLIDING[family])
    decoder, texts = Decoder(model), random_ids(2, 60)
    runner = FusedRunner(decoder, [Plain]) if fused else ModuleRunner(decoder)
    cache, starts = runner.new_cache(3, 64), [40, 17]
    assert isinstance(cache, RollingCache)
    for slot, start in enumerate(starts):
        for begin in range(0, start, 8):
            piece = texts[slot : slot + 1, begin : min(begin + 8, start)]
            runner.run(runner.embed(piece, [begin]), cache.slot(slot), [begin], 0, 4)
    runner.run(runner.embed(random_ids(2, 8, seed=9), starts), cache, starts, 0, 4)
    rows = torch.stack([texts[slot, start : start + 5] for slot, start in enumerate(starts)])
    ours = runner.decode(runner.run(runner.embed(rows, starts), cache, starts, 0, 4))
    for slot, start in enumerate(starts):
        truth = model(texts[slot : slot + 1, : start + 5]).logits[0, -5:]
        torch.testing.assert_close(ours[slot], truth, rtol=1e-4, atol=1e-4)


def test_blocks_keep_their_window_and_the_rows_of_a_pass():
    cache = ModuleRunner(Decoder(make("gemma3_text"))).new_cache(2, 100)
    assert [part.shape[3] for part in cache.kv] == [14, 100, 14, 100] and cache.cells == 100
    assert all(part.shape[0] == 2 for part in cache.kv)
    fused = FusedRunner(Decoder(make("mistral")), [Plain])
    assert [part.shape[3] for part in fused.new_cache(1, 100).kv] == [14] * 4
    # No longer than the text; and where a cell has to stand for its position, whole.
    assert type(fused.new_cache(1, 14)) is KVCache
    assert type(FusedRunner(Decoder(make("mistral")), [Plain], width=4).new_cache(1, 100)) is KVCache


class LargestTensor(TorchDispatchMode):
    """The elements of the largest tensor that any operation gives."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for part in result if isinstance(result, tuple | list) else [result]:
            if isinstance(part, torch.Tensor):
                self.numel = max(self.numel, part.numel())
        return result


LONG = 8192
ONE_BLOCK = {"num_hidden_layers": 1, "hidden_size": 16, "num_attention_heads": 2, "max_position_embeddings": 2 * LONG}


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gpt2"])
def test_decoding_at_8k_tokens_makes_nothing_quadratic(monkeypatch, family):
    set_rows_of_a_pass(monkeypatch, 256)
    heads = {} if family == "gpt2" else {"num_key_value_heads": 1}
    layers = {"layer_types": ["sliding_attention"]} if family == "gemma2" else {}
    generator = TextGenerator(make(family, **ONE_BLOCK, **heads, **layers))
    with LargestTensor() as largest:
        generator.generate(random_ids(LONG).tolist(), max_new_tokens=3)
    rows_and_keys = 256 * (LONG if family in ("llama", "gpt2") else 256 + 6)
    assert largest.numel <= 2 * max(rows_and_keys, 64 * LONG)


def test_a_training_step_at_8k_tokens_makes_nothing_quadratic():
    module = LayerSkipModule(make("llama", **ONE_BLOCK, num_key_value_heads=1))
    with LargestTensor() as largest:
        module.early_exit_loss({"input_ids": random_ids(1, LONG)}, 0)[0].backward()
    assert largest.numel <= 100 * LONG
