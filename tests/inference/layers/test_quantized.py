"""Drafts from rounded weights: the products, and the text that must not depend on them."""

from typing import get_args

import pytest
import torch

from lskip.inference import TextGenerator
from lskip.inference.layers import quantized
from lskip.inference.layers.linear import Mixed, Plain
from lskip.inference.layers.quantized import DRAFT_FORMS, BaggedInt8, DynamicInt8, Int4, Int8, choose_draft_form
from lskip.inference.options import DraftWeights
from lskip.inference.runners.fused_blocks import sample_weights
from lskip.models.decoder import Decoder


def by_hand(form, weight):
    """What the rounded matrix stands for, worked out in float64 without the kernels."""
    exact = weight.double()
    if form in (Int8, DynamicInt8):
        scale = exact.abs().amax(1, keepdim=True) / (127 if form is Int8 else 80)
        return torch.round(exact / scale) * scale
    groups = exact.view(len(exact), -1, 32)
    low = groups.amin(-1, keepdim=True)
    scale = (groups.amax(-1, keepdim=True) - low) / 15
    return (torch.round((groups - low) / scale) * scale + low).view_as(exact)


@pytest.mark.parametrize("form", [Int8, Int4])
@pytest.mark.parametrize("bias", [False, True])
def test_products_are_those_of_the_rounded_matrix(form, bias):
    torch.manual_seed(0)
    weight, offset = torch.randn(96, 64), torch.randn(96) if bias else None
    x, residual = torch.randn(3, 64), torch.randn(3, 96)
    held = form(weight, offset)
    expected = x.double() @ by_hand(form, weight).T + (0 if offset is None else offset)

    def distance(product, truth):
        return float((product.double() - truth).norm() / truth.norm())

    # The kernels multiply in bfloat16: 1 % is far above that, and far below what 4 bits change.
    assert distance(held(x), expected) < 0.01
    assert distance(held.add_to(residual, x), expected + residual) < 0.01
    assert held.add_to(residual, x).dtype == torch.float32  # the sum is not rounded
    assert form is Int8 or distance(Plain(weight, offset)(x), expected) > 0.03


def rounded_to_8_bits(x):
    """Levels 0 … 255 from the least to the largest number, 0 among them, in float64."""
    x = x.double()
    low, high = x.min().clamp(max=0), x.max().clamp(min=0)
    scale = (high - low) / 255
    zero = torch.round(-low / scale)
    return ((torch.round(x / scale) + zero).clamp(0, 255) - zero) * scale


@pytest.mark.parametrize("bias", [False, True])
def test_dynamic_int8_rounds_both_sides_and_nothing_else(bias):
    """Whole numbers are multiplied exactly; some of these would overflow 16 bits if weights had all 8."""
    torch.manual_seed(0)
    weight, offset = torch.randn(96, 64), torch.randn(96) if bias else None
    x, residual = torch.randn(3, 64), torch.randn(3, 96)
    held = DynamicInt8(weight, offset)

    def expected_of(x):
        return rounded_to_8_bits(x) @ by_hand(DynamicInt8, weight).T + (0 if offset is None else offset)

    expected = expected_of(x)
    assert torch.allclose(held(x).double(), expected, atol=1e-4) and held(x).dtype == torch.float32
    assert torch.allclose(held(x.bfloat16()).double(), expected_of(x.bfloat16()), atol=1e-4)
    assert torch.allclose(held.add_to(residual, x).double(), expected + residual, atol=1e-4)
    assert held.nbytes == 96 * 64 + 4 * 96 * (1 + bias)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 2, 7])
def test_bagged_int8_rounds_each_part_of_a_column_on_its_own(rows, bias):
    """To 256 levels from its least to its largest number; inputs are not rounded."""
    torch.manual_seed(0)
    scales = torch.logspace(-3, 3, 240)[:, None]  # rows that one scale for a column would leave nothing of
    weight, offset = torch.randn(240, 64) * scales, torch.randn(240) if bias else None
    x, residual = torch.randn(rows, 64), torch.randn(rows, 240)
    parts = weight.double().view(2, 120, 64)
    low = parts.amin(1, keepdim=True)
    scale = (parts.amax(1, keepdim=True) - low) / 255
    rounded = (torch.round((parts - low) / scale) * scale + low).view(240, 64)
    expected = x.double() @ rounded.T + (0 if offset is None else offset)
    held = BaggedInt8(weight, offset)
    # The kernel's scales are float32: by them some numbers fall to the neighbouring level.
    off = (held(x).double() - expected).norm() / (x.double() @ (rounded - weight.double()).T).norm()
    assert off < 0.05 and held(x).dtype == torch.float32
    assert torch.allclose(held.add_to(residual, x), residual + held(x))
    assert held.nbytes == 240 * 64 + 2 * 64 * (4 + 4) + 4 * 240 * bias  # a scale and a zero for each part of a column


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral"])
@pytest.mark.parametrize("form", [form for forms in DRAFT_FORMS.values() for form in forms])
def test_text_is_the_models_own(tiny_model, monkeypatch, family, form):
    monkeypatch.setitem(DRAFT_FORMS, "int8", (form,))
    model = tiny_model(family, head_dim=8)
    plain = TextGenerator(model).generate([5, 6, 7], max_new_tokens=40, min_new_tokens=40)
    generator = TextGenerator(model, draft_weights="int8")
    assert generator.draft_runner.form is form
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
    monkeypatch.setitem(DRAFT_FORMS, "int8", (Plain,))
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


def test_of_the_forms_of_a_name_the_fastest_that_work_are_taken(monkeypatch):
    timed = []
    choose = lambda forms, samples, mix: timed.append((forms, mix)) or forms[-1]  # noqa: E731
    monkeypatch.setattr(quantized, "fastest_by_shape", choose)
    assert choose_draft_form("int4", [torch.randn(32, 32)], rows=3) is BaggedInt8
    assert choose_draft_form("int4", [torch.randn(32, 32), torch.randn(12, 32)]) is Int4  # no parts of 8
    assert timed == [([Int4, BaggedInt8], ((1, 3),)), ([Int4], ((1, 1),))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shapes_may_be_held_in_forms_of_their_own(tiny_model, monkeypatch, dtype):
    model = tiny_model("qwen2").to(dtype)  # its q, k and v have biases
    plain = TextGenerator(model, bit_exact=True).generate([5, 6, 7], max_new_tokens=30, min_new_tokens=30)
    for forms in ((Int4, BaggedInt8), (BaggedInt8, Int4)):
        mixed = Mixed({tuple(samples.shape): forms[0] for samples in sample_weights(Decoder(model))[::2]}, forms[1])
        monkeypatch.setattr(quantized, "fastest_by_shape", lambda *_, mixed=mixed: mixed)
        generator = TextGenerator(model, draft_weights="int4", bit_exact=True)
        assert {type(matrix) for matrix in generator.draft_runner.blocks[0].matrices} == {Int4, BaggedInt8}
        assert type(generator.draft_runner.head) is Int8
        drafted = generator.generate([5, 6, 7], max_new_tokens=30, min_new_tokens=30, num_speculations=3)
        assert drafted.token_ids == plain.token_ids and drafted.accepted > 0


def test_the_command_line_offers_what_there_is():
    assert get_args(DraftWeights) == tuple(DRAFT_FORMS)


def test_bad_draft_weights(tiny_model, monkeypatch):
    with pytest.raises(ValueError, match=r"draft_weights: 'int3' is not one of int8, int4, int8_dynamic"):
        TextGenerator(tiny_model("llama"), draft_weights="int3")
    with pytest.raises(ValueError, match=r"draft_weights: 'int4' does not work here"):
        TextGenerator(tiny_model("llama", hidden_size=48, head_dim=12), draft_weights="int4")
    with pytest.raises(ValueError, match=r"draft_weights: 'int8' is not for this model \(its activation is gelu\)"):
        TextGenerator(tiny_model("llama", hidden_act="gelu"), draft_weights="int8")


@pytest.mark.parametrize("draft_weights", DRAFT_FORMS)
def test_a_width_that_the_kernels_would_read_beyond_is_refused(tiny_model, draft_weights):
    """Called with it, the int8 kernel reads what is not the matrix's: garbage, or the end of the process."""
    with pytest.raises(ValueError, match=f"draft_weights: '{draft_weights}' does not work here .*40 numbers"):
        TextGenerator(tiny_model("llama", intermediate_size=40), draft_weights=draft_weights)
