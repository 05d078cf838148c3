"""Drafts from rounded weights: the products, and the text that must not depend on them."""

from typing import get_args

import pytest
import torch

from lskip.inference import TextGenerator
from lskip.inference.layers.bags import BaggedInt8
from lskip.inference.layers.linear import Plain
from lskip.inference.layers.quantized import DRAFT_WEIGHTS, Int4, Int8, choose_draft_layouts
from lskip.inference.options import DraftWeights
from lskip.inference.runners import build


def by_hand(layout, weight):
    """What the rounded matrix stands for, worked out in float64 without the kernels."""
    exact = weight.double()
    if layout is Int8:
        scale = exact.abs().amax(1, keepdim=True) / 127
        return torch.round(exact / scale) * scale
    groups = exact.view(len(exact), -1, 32)
    low = groups.amin(-1, keepdim=True)
    scale = (groups.amax(-1, keepdim=True) - low) / 15
    return (torch.round((groups - low) / scale) * scale + low).view_as(exact)


@pytest.mark.parametrize("layout", [Int8, Int4])
@pytest.mark.parametrize("bias", [False, True])
def test_products_are_those_of_the_rounded_matrix(layout, bias):
    torch.manual_seed(0)
    weight, offset = torch.randn(96, 64), torch.randn(96) if bias else None
    x, residual = torch.randn(3, 64), torch.randn(3, 96)
    matrix = layout(weight, offset)
    expected = x.double() @ by_hand(layout, weight).T + (0 if offset is None else offset)

    def distance(product, truth):
        return float((product.double() - truth).norm() / truth.norm())

    # The kernels multiply in bfloat16: 1 % is far above that, and far below what 4 bits change.
    assert distance(matrix(x), expected) < 0.01
    assert distance(matrix.add_to(residual, x), expected + residual) < 0.01
    assert matrix.add_to(residual, x).dtype == torch.float32  # the sum is not rounded
    assert layout is Int8 or distance(Plain(weight, offset)(x), expected) > 0.03


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 2, 7, 9, 40])
def test_bagged_int8_rounds_each_part_of_a_column_on_its_own(rows, bias):
    """To 256 levels from its least to its largest number; inputs are not rounded.

    Parts are four, not three: so that two threads have as much to do.
    """
    torch.manual_seed(0)
    scales = torch.logspace(-3, 3, 288)[:, None]  # rows that one scale for a column would leave nothing of
    weight, offset = torch.randn(288, 64) * scales, torch.randn(288) if bias else None
    x, residual = torch.randn(rows, 64), torch.randn(rows, 288)
    parts = weight.double().view(4, 72, 64)
    low = parts.amin(1, keepdim=True)
    scale = (parts.amax(1, keepdim=True) - low) / 255
    rounded = (torch.round((parts - low) / scale) * scale + low).view(288, 64)
    expected = x.double() @ rounded.T + (0 if offset is None else offset)
    matrix = BaggedInt8(weight, offset)
    # The kernel's scales are float32: by them some numbers fall to the neighbouring level.
    off = (matrix(x).double() - expected).norm() / (x.double() @ (rounded - weight.double()).T).norm()
    assert off < 0.05 and matrix(x).dtype == torch.float32
    assert torch.allclose(matrix.add_to(residual, x), residual + matrix(x))
    assert (matrix.numbers - rounded).norm() / (rounded - weight).norm() < 0.05
    assert matrix.nbytes == 288 * 64 + 4 * 64 * (4 + 4) + 4 * 288 * bias  # a scale and a zero for each part of a column


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral", "gemma3_text"])
@pytest.mark.parametrize("layout", [Int8, BaggedInt8, Int4])
def test_text_is_the_models_own(tiny_model, monkeypatch, family, layout):
    monkeypatch.setattr(build, "choose_draft_layouts", lambda *_: [layout])
    model = tiny_model(family, head_dim=8)
    plain = TextGenerator(model).generate([5, 6, 7], max_new_tokens=40, min_new_tokens=40)
    generator = TextGenerator(model, draft_weights="int8")
    assert generator.draft_runner.layout == layout.__name__
    for exit_layer in (None, 2, 4):
        for num_speculations in (1, 2, 5):
            drafted = generator.generate(
                [5, 6, 7],
                max_new_tokens=40,
                min_new_tokens=40,
                exit_layer=exit_layer,
                num_speculations=num_speculations,
            )
            assert drafted.token_ids == plain.token_ids
            assert drafted.drafted > 0


@pytest.mark.parametrize("num_speculations", [1, 2, 4])
def test_exact_weights_as_their_own_draft_are_always_accepted(tiny_model, monkeypatch, num_speculations):
    """A lagging or misplaced draft position would make even the same weights disagree."""
    monkeypatch.setattr(build, "choose_draft_layouts", lambda *_: [Plain])
    generator = TextGenerator(tiny_model("llama"), draft_weights="int8")
    answer = generator.generate([3, 1, 4], max_new_tokens=50, min_new_tokens=50, num_speculations=num_speculations)
    assert answer.accepted == answer.drafted > 0
    assert answer.rounds == 1 - (-49 // (num_speculations + 1))  # the first token is from the prompt's pass


def test_sampled_text_does_not_depend_on_the_draft(tiny_model):
    model = tiny_model("llama")
    settings = {"max_new_tokens": 30, "temperature": 1.0, "top_p": 0.9, "seed": 7}
    plain = TextGenerator(model).generate([5, 6, 7], **settings)
    drafted = TextGenerator(model, draft_weights="int4").generate([5, 6, 7], num_speculations=3, **settings)
    assert drafted.token_ids == plain.token_ids


def test_the_rule():
    """Bags for a lone row, which they read fastest; the head of a draft in 4 bits has 8."""
    samples = [torch.randn(32, 32), torch.randn(16, 48)]
    assert choose_draft_layouts("int8", samples) == [BaggedInt8, Int8]
    assert choose_draft_layouts("int8", samples, batch_size=3) == [Int8]
    assert choose_draft_layouts("int4", samples[:1]) == choose_draft_layouts("int4", samples[:1], 3) == [Int4]


def test_without_bags_int8_is_the_other_layout(monkeypatch):
    def refuse(*_):
        raise RuntimeError("no FBGEMM")

    monkeypatch.setattr(torch.ops.quantized, "embedding_bag_byte_prepack", refuse)
    assert choose_draft_layouts("int8", [torch.randn(32, 32)]) == [Int8]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_matrices_may_differ_in_their_layouts(tiny_model, dtype):
    """Of 20 rows there are no bags, nor of 300; q, k and v have biases here."""
    model = tiny_model("qwen2", num_attention_heads=8, num_key_value_heads=1, head_dim=2).to(dtype)
    plain = TextGenerator(model, bit_exact=True).generate([5, 6, 7], max_new_tokens=30, min_new_tokens=30)
    generator = TextGenerator(model, draft_weights="int8", bit_exact=True)
    assert generator.draft_runner.layout == "BaggedInt8+Int8" and type(generator.draft_runner.head) is Int8
    drafted = generator.generate([5, 6, 7], max_new_tokens=30, min_new_tokens=30, num_speculations=3)
    assert drafted.token_ids == plain.token_ids and drafted.accepted > 0


def test_the_command_line_offers_what_there_is():
    assert get_args(DraftWeights) == DRAFT_WEIGHTS


def test_bad_draft_weights(tiny_model, monkeypatch):
    with pytest.raises(ValueError, match=r"draft_weights: 'int3' is not one of int8, int4$"):
        TextGenerator(tiny_model("llama"), draft_weights="int3")
    with pytest.raises(ValueError, match=r"draft_weights: 'int4' does not work here"):
        TextGenerator(tiny_model("llama", hidden_size=48, head_dim=12), draft_weights="int4")
    with pytest.raises(ValueError, match=r"draft_weights: 'int8' is not for this model \(its activation is gelu\)"):
        TextGenerator(tiny_model("llama", hidden_act="gelu"), draft_weights="int8")


@pytest.mark.parametrize("draft_weights", DRAFT_WEIGHTS)
def test_a_width_that_the_kernels_would_read_beyond_is_refused(tiny_model, draft_weights):
    """Called with it, the int8 kernel reads what is not the matrix's: garbage, or the end of the process."""
    with pytest.raises(ValueError, match=f"draft_weights: '{draft_weights}' does not work here .*40 numbers"):
        TextGenerator(tiny_model("llama", intermediate_size=40), draft_weights=draft_weights)
