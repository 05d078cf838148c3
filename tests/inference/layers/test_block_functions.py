"""Blocks in TorchScript against the same functions run by Python, and what happens where there is no TorchScript."""

import pytest
import torch

from lskip.inference import TextGenerator
from lskip.inference.layers.bags import Bagged, BaggedInt8
from lskip.inference.layers.block_functions import block_functions
from lskip.inference.layers.linear import (
    EXACT_WIDTH,
    Halved,
    Packed,
    Plain,
    Sliced,
)
from lskip.inference.layers.quantized import Int4, Int8
from lskip.inference.layers.torchscript import scripted
from lskip.inference.runners.fused_blocks import Stack
from lskip.inference.runners.fused_runner import FusedRunner
from lskip.models.decoder import Decoder
from tests.conftest import needs_halved

LAYOUTS = [
    Plain,
    Bagged,
    Packed,
    Sliced,
    Int8,
    BaggedInt8,
    Int4,
    pytest.param(Halved, marks=needs_halved),
]


def outcome_of(runner, starts, rows):
    """The rows' states and the whole cache, after a pass on random rows over a random cache."""
    generator = torch.Generator().manual_seed(1)
    cache = runner.new_cache(len(starts), 16)
    for part in cache.kv:
        part.normal_(generator=generator)
    x = torch.randn(len(starts), rows, runner.hidden_size, generator=generator)
    return runner.run(x, cache, starts, 0, runner.num_layers), list(cache.kv)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral", "gemma3_text"])
def test_torchscript_changes_no_bit(tiny_model, family, layout):
    """Not in the first call, nor in later ones, which TorchScript would like to make faster."""
    width = EXACT_WIDTH if layout in (Sliced, Packed) else 1
    model = tiny_model(family, hidden_size=64, head_dim=16)
    for parameter in model.parameters():
        parameter.data = parameter.bfloat16().float()  # what Halved can hold
    runner = FusedRunner(Decoder(model), [layout], width=width)
    inside, stack = [block.functions for block in runner.blocks], runner.stack
    assert all(isinstance(each, torch.jit.ScriptFunction) for block in runner.blocks for each in block.functions[1:])
    assert [type(run) for _, _, run in stack._runs] == [torch.jit.RecursiveScriptModule]
    with torch.inference_mode():
        for starts, rows in (([0], 6), ([6], 1), ([5], 3), ([7], 1), ([3, 0, 5], 1), ([4, 1, 0], 4)):
            fast = [outcome_of(runner, starts, rows) for _ in range(4)]
            for block in runner.blocks:
                block.functions = block_functions(tuple(map(type, block.matrices)), without_python=False)
            runner.stack = Stack(runner.blocks)
            slow = outcome_of(runner, starts, rows)
            runner.stack = stack
            for block, functions in zip(runner.blocks, inside, strict=True):
                block.functions = functions
            for x, cache in fast:
                assert torch.equal(x, slow[0])
                assert all(map(torch.equal, cache, slow[1]))


class NotNegative(Bagged):
    """A layout that some matrices cannot have."""

    def __init__(self, weight, bias=None):
        if weight[0, 0] < 0:
            raise ValueError("a number is negative")
        super().__init__(weight, bias)


def test_blocks_may_differ_in_their_layouts(tiny_model):
    model = tiny_model("llama", num_hidden_layers=5)
    decoder = Decoder(model)
    for layer, sign in zip(decoder.blocks, (1, 1, -1, -1, 1), strict=True):
        for name, parameter in layer.named_parameters():
            if name.endswith("proj.weight"):
                parameter.data[0, 0] = sign * parameter.data[0, 0].abs()
    mixed, plain = FusedRunner(decoder, [NotNegative]), FusedRunner(decoder, [Plain])
    assert [run[:2] for run in mixed.stack._runs] == [(0, 2), (2, 4), (4, 5)]
    for first in range(5):
        for last in range(first, 6):
            torch.manual_seed(0)
            x = torch.randn(2, 3, mixed.hidden_size)
            ends = [runner.run(x, runner.new_cache(2, 8), [0, 2], first, last) for runner in (mixed, plain)]
            torch.testing.assert_close(*ends)


def test_without_torchscript_the_text_is_the_same(tiny_model, monkeypatch):
    def write():
        generator = TextGenerator(tiny_model(hidden_size=64), draft_weights="int8")
        return generator, generator.generate([5, 6, 7], max_new_tokens=12, num_speculations=3).token_ids

    def no_longer(function):
        raise RuntimeError("torch.jit.script is gone")

    _, expected = write()
    monkeypatch.setattr(torch.jit, "script", no_longer)
    scripted.cache_clear(), block_functions.cache_clear()
    try:
        generator, token_ids = write()
        assert not isinstance(generator.runner.blocks[0].functions.project, torch.jit.ScriptFunction)
        assert not any(isinstance(run, torch.jit.ScriptModule) for _, _, run in generator.runner.stack._runs)
        assert token_ids == expected
    finally:
        scripted.cache_clear(), block_functions.cache_clear()
