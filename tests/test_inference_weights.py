"""Plain and packed products, and the choice between them."""

import time

import pytest
import torch

from lskip.inference import TextGenerator
from lskip.inference.weights import (
    Packed,
    PackedWide,
    Plain,
    Sliced,
    Transposed,
    Widened,
    choose_form,
    fastest,
    obstacle_to,
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", [Plain, Transposed, Packed])
@pytest.mark.parametrize("rows", [1, 2, 5, 40])
def test_products(form, dtype, rows):
    if obstacle_to(form, torch.randn(8, 8, dtype=dtype)) is not None:
        pytest.skip("this CPU does not have the form in this dtype")
    weight, bias, x, residual = (torch.randn(*shape).to(dtype) for shape in ((48, 20), (48,), (rows, 20), (rows, 48)))
    exact = x.double() @ weight.double().T + bias.double()
    tolerance = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 5e-2}
    held, before = form(weight, bias), residual.clone()
    assert torch.allclose(held(x).double(), exact, **tolerance)
    assert torch.allclose(held.add_to(residual, x).double(), exact + residual.double(), **tolerance)
    assert torch.equal(residual, before)


def refuse(*_):
    raise RuntimeError("unsupported CPU")


PACK = torch.ops.mkldnn._reorder_linear_weight


@pytest.mark.parametrize("broken", [refuse, lambda weight, rows: PACK(torch.zeros_like(weight), rows)])
def test_auto_falls_back_to_plain_and_packed_says_why(tiny_model, monkeypatch, broken):
    model = tiny_model("llama")
    truth = TextGenerator(model, weights="plain").generate([5, 6, 7], max_new_tokens=10).token_ids
    monkeypatch.setattr(torch.ops.mkldnn, "_reorder_linear_weight", broken)
    generator = TextGenerator(model)
    assert generator.step.form in (Plain, Transposed)
    assert generator.generate([5, 6, 7], max_new_tokens=10).token_ids == truth
    with pytest.raises(ValueError, match="weights: 'packed' does not work here"):
        TextGenerator(model, weights="packed")


@pytest.mark.parametrize("bit_exact", [None, True])
def test_without_bfloat16_products_weights_are_widened(tiny_model, monkeypatch, bit_exact):
    """Older CPUs: the text is that of the same weights in a float32 model."""
    model = tiny_model("llama").to(torch.bfloat16)
    product = torch.ops.mkldnn._reorder_linear_weight
    monkeypatch.setattr(
        torch.ops.mkldnn,
        "_reorder_linear_weight",
        lambda weight, rows: refuse() if weight.dtype == torch.bfloat16 else product(weight, rows),
    )
    generator = TextGenerator(model, bit_exact=bit_exact)
    assert generator.step.form in ((Widened,) if bit_exact is None else (Widened, Sliced))
    if generator.step.form is Widened:
        alone = TextGenerator(model.float(), weights="plain").generate([5, 6, 7], max_new_tokens=30)
        assert generator.generate([5, 6, 7], max_new_tokens=30).token_ids == alone.token_ids
        drafted = generator.generate([5, 6, 7], max_new_tokens=30, exit_layer=2, num_speculations=3)
        assert drafted.token_ids == alone.token_ids
    assert generator.memory()["blocks"] == 4 * sum(p.numel() for p in model.model.layers.parameters() if p.ndim > 1)


def test_the_choice():
    sample = torch.randn(16, 8)
    assert choose_form("plain", [sample]) is Plain
    assert choose_form("auto", [sample.half()]) is Plain
    assert choose_form("auto", [torch.empty(16, 8, device="meta")]) is Plain
    assert choose_form("auto", [sample.bfloat16()]) in (Packed, Widened, Plain)  # never by a timing
    with pytest.raises(ValueError, match="weights: 'int3' is not one of"):
        choose_form("int3", [sample])


def test_the_fastest_form_wins():
    class Slow(Plain):
        def __call__(self, x):
            time.sleep(0.002)
            return super().__call__(x)

    class SlowAlone(Plain):
        lone_row_width = 2

        def __call__(self, x):
            time.sleep(0.002 * (len(x) == 2))
            return super().__call__(x)

    samples = [torch.randn(16, 8), torch.randn(8, 16)]
    for forms in ([Slow, Plain, SlowAlone], [SlowAlone, Slow, Plain]):
        assert fastest(forms, samples, ((3, 1), (1, 5))) is Plain
    assert PackedWide.lone_row_width == 4


def test_where_bits_are_kept_by_default(tiny_model):
    """A table by device, type and form of weights."""
    single = tiny_model("llama")
    assert TextGenerator(single, weights="packed").step.width == 1
    assert TextGenerator(single, weights="packed", bit_exact=True).step.width == 4
    half = tiny_model("llama").to(torch.bfloat16)
    assert TextGenerator(half, weights="plain").step.width == 1
    if obstacle_to(Packed, half.lm_head.weight.detach()) is None:
        assert TextGenerator(half, weights="packed").step.width == 4
        assert TextGenerator(half, weights="packed", bit_exact=False).step.width == 1
