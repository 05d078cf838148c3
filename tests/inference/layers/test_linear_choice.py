"""Which form a model's weights get on a machine, and what becomes of its text."""

import time

import pytest
import torch

from lskip.inference import TextGenerator
from lskip.inference.layers import linear_choice as form_choice
from lskip.inference.layers.bagged import Bagged
from lskip.inference.layers.convolved import Convolved
from lskip.inference.layers.linear import (
    Halved,
    Packed,
    PackedWide,
    Plain,
    Sliced,
    Split,
    Transposed,
    Widened,
    plain_product,
)
from lskip.inference.layers.linear_choice import (
    choose_exact_form,
    choose_form,
    cost_of,
    fastest,
    fastest_by_shape,
    mix_for,
    obstacle_to,
)
from lskip.inference.runners import build as steps
from lskip.models.exit_adapter import AdapterShape, ExitAdapter
from tests.conftest import HALVED_WORKS, needs_halved


@needs_halved
def test_a_checkpoint_of_bfloat16_numbers_decodes_halved_to_the_same_text(tiny_model):
    model = tiny_model("llama").bfloat16().float()
    plain, halved = TextGenerator(model, weights="plain"), TextGenerator(model, weights="halved")
    blocks = sum(p.numel() for p in model.model.layers.parameters() if p.ndim > 1)
    assert halved.runner.form is Halved and halved.memory()["blocks"] == 2 * blocks
    truth = plain.generate([5, 6, 7], max_new_tokens=30).token_ids
    assert halved.generate([5, 6, 7], max_new_tokens=30).token_ids == truth
    drafted = halved.generate([5, 6, 7], max_new_tokens=30, exit_layer=2, num_speculations=3)
    assert drafted.token_ids == truth
    # One matrix more that does not fit is packed by itself.
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = 1 + 2.0**-20
    mixed = TextGenerator(model, weights="halved")
    assert type(mixed.runner.blocks[1].down) is Widened and type(mixed.runner.blocks[0].down) is Halved
    changed = TextGenerator(model, weights="plain").generate([5, 6, 7], max_new_tokens=30).token_ids
    assert mixed.generate([5, 6, 7], max_new_tokens=30).token_ids == changed


@needs_halved
def test_weights_that_need_all_their_bits_are_not_halved(tiny_model):
    model = tiny_model("llama")
    assert TextGenerator(model).runner.form is not Halved
    with pytest.raises(ValueError, match="'halved' does not work here"):
        TextGenerator(model, weights="halved")
    with pytest.raises(ValueError, match="'halved' does not go with bit_exact"):
        TextGenerator(model.bfloat16(), weights="halved", bit_exact=True)


def refuse(*_):
    raise RuntimeError("unsupported CPU")


PACK = torch.ops.mkldnn._reorder_linear_weight


@pytest.mark.parametrize("broken", [refuse, lambda weight, rows: PACK(torch.zeros_like(weight), rows)])
def test_auto_falls_back_to_plain_and_packed_says_why(tiny_model, monkeypatch, broken):
    model = tiny_model("llama", vocab_size=320)  # a multiple of 8, as Bagged wants it
    truth = TextGenerator(model, weights="plain").generate([5, 6, 7], max_new_tokens=10).token_ids
    monkeypatch.setattr(torch.ops.mkldnn, "_reorder_linear_weight", broken)
    generator = TextGenerator(model)
    forms = {type(matrix) for block in generator.runner.blocks for matrix in block.matrices}
    assert forms <= {Plain, Transposed, Split, Bagged}
    assert generator.generate([5, 6, 7], max_new_tokens=10).token_ids == truth
    with pytest.raises(ValueError, match="weights: 'packed' does not work here"):
        TextGenerator(model, weights="packed")


@pytest.mark.parametrize(("bit_exact", "form"), [(None, Halved), (None, Widened), (True, Widened)])
def test_without_bfloat16_products_they_are_float32(tiny_model, monkeypatch, bit_exact, form):
    """Older CPUs: the text is that of the same weights in a float32 model."""
    if form is Halved and not HALVED_WORKS:
        pytest.skip("this build has no FBGEMM")
    model = tiny_model("llama").to(torch.bfloat16)
    product = torch.ops.mkldnn._reorder_linear_weight
    monkeypatch.setattr(
        torch.ops.mkldnn,
        "_reorder_linear_weight",
        lambda weight, rows: refuse() if weight.dtype == torch.bfloat16 else product(weight, rows),
    )
    if form is Widened:
        monkeypatch.setattr(torch.ops.quantized, "linear_prepack_fp16", refuse)
    generator = TextGenerator(model, bit_exact=bit_exact)
    assert generator.runner.form in ((form,) if bit_exact is None else (form, Sliced))
    if generator.runner.form is form:
        alone = TextGenerator(model.float(), weights="plain").generate([5, 6, 7], max_new_tokens=30)
        assert generator.generate([5, 6, 7], max_new_tokens=30).token_ids == alone.token_ids
        drafted = generator.generate([5, 6, 7], max_new_tokens=30, exit_layer=2, num_speculations=3)
        assert drafted.token_ids == alone.token_ids
    assert generator.memory()["blocks"] == (2 if form is Halved else 4) * sum(
        p.numel() for p in model.model.layers.parameters() if p.ndim > 1
    )


def test_the_choice():
    sample = torch.randn(16, 8)
    assert choose_form("plain", [sample]) is Plain
    assert choose_form("auto", [sample.half()]) in (Halved, Widened, Plain)
    assert choose_form("auto", [torch.empty(16, 8, device="meta")]) is Plain
    assert choose_form("auto", [sample.bfloat16()]) in (Packed, Halved, Widened, Plain)  # never by a timing
    with pytest.raises(ValueError, match="weights: 'int3' is not one of"):
        choose_form("int3", [sample])


def test_a_form_is_chosen_for_the_rows_that_will_be(tiny_model, monkeypatch):
    tried = []
    monkeypatch.setattr(steps, "choose_form", lambda weights, samples, mix: tried.append(mix) or Plain)
    model = tiny_model("llama")
    adapter = ExitAdapter(model, AdapterShape(2))
    TextGenerator(model)
    TextGenerator(model, batch_size=8)
    TextGenerator(model, draft_weights="int8", batch_size=2)
    TextGenerator(model, exit_adapter=adapter, batch_size=3)
    # A token in each text, or several to verify, as long as that many pay.
    assert tried == [((12, 1), (1, 5)), ((12, 8), (1, 16)), ((1, 2), (4, 16)), ((1, 3), (4, 9))]
    assert mix_for(20) == ((12, 20), (1, 20)) and mix_for(1000) == ((12, 64), (1, 64))


def test_a_form_is_tried_on_the_head_unless_it_is_large(tiny_model, monkeypatch):
    tried = []
    monkeypatch.setattr(steps, "choose_form", lambda weights, samples, mix: tried.append(samples) or Plain)
    model = tiny_model("llama")
    TextGenerator(model)
    monkeypatch.setattr(steps, "LARGEST_TRIED", model.lm_head.weight.nbytes - 1)
    TextGenerator(model)
    with_head, without = tried
    assert with_head[-1].data_ptr() == model.lm_head.weight.data_ptr() and len(with_head) == len(without) + 1


def test_convolutions_are_tried_for_batches_alone(tiny_convolutions, monkeypatch):
    monkeypatch.setattr(form_choice, "fastest_by_shape", lambda forms, *_, **__: forms)
    samples = [torch.randn(16, 8)]
    if (reason := obstacle_to(Convolved, samples[0])) is not None:
        pytest.skip(reason)
    few = [mix_for(1), mix_for(1, rounded=True), mix_for(1, adapter=True), mix_for(3)]
    many = [mix_for(4), mix_for(8, rounded=True), mix_for(5, adapter=True), mix_for(1000)]
    assert not any(Convolved in choose_form("auto", samples, mix) for mix in few)
    assert all(Convolved in choose_form("auto", samples, mix) for mix in many)
    assert Convolved not in choose_form("auto", samples)
    assert choose_exact_form("auto", samples) in (Packed, Sliced)
    # Not where its products are wrong, or the build has none.
    convolution = torch.ops.mkldnn._convolution_pointwise
    for broken in (refuse, lambda x, *rest: convolution(x, *rest) + 1):
        monkeypatch.setattr(torch.ops.mkldnn, "_convolution_pointwise", broken)
        assert Convolved not in choose_form("auto", samples, mix_for(8))


def test_a_batch_decodes_convolved_to_the_same_text(tiny_model, tiny_convolutions, monkeypatch):
    """A batch's choice, then texts that end one by one, down to a lone row."""
    model = tiny_model("qwen2")
    if (reason := obstacle_to(Convolved, model.lm_head.weight.detach())) is not None:
        pytest.skip(reason)
    plain = TextGenerator(model, weights="plain")
    seconds = {Convolved: 1.0}
    monkeypatch.setattr(
        form_choice,
        "cost_of",
        lambda forms, samples, mix: {form: [seconds.get(form, 2.0)] * len(samples) for form in forms},
    )
    generator = TextGenerator(model, batch_size=4)
    assert generator.runner.form.__name__ == "Convolved"
    prompts = [[5, 6, 7], [8], list(range(1, 40)), [9, 10], [11, 12, 13, 14]]
    for settings in ({}, {"exit_layer": 2, "num_speculations": 3}):
        written = dict(generator.generate_batch(prompts, batch_size=4, max_new_tokens=20, **settings))
        for index, prompt in enumerate(prompts):
            assert written[index].token_ids == plain.generate(prompt, max_new_tokens=20).token_ids


def test_the_fastest_form_wins():
    def slow(x, held):
        time.sleep(0.002)
        return plain_product(x, held)

    def slow_alone(x, held):
        time.sleep(0.002 * (len(x) == 2))
        return plain_product(x, held)

    class Slow(Plain):
        product = staticmethod(slow)

    class SlowAlone(Plain):
        lone_row_width = 2
        product = staticmethod(slow_alone)

    samples = [torch.randn(16, 8), torch.randn(8, 16)]
    for forms in ([Slow, Plain, SlowAlone], [SlowAlone, Slow, Plain]):
        assert fastest(forms, samples, ((3, 1), (1, 5))) is Plain
    assert PackedWide.lone_row_width == 4


def test_each_shape_gets_its_fastest_form():
    def slow_at(size):
        def product(x, held):
            time.sleep(0.002 * (x.shape[1] == size))
            return plain_product(x, held)

        return type("Slow", (Plain,), {"product": staticmethod(product)})

    slow_at_8, slow_at_16 = slow_at(8), slow_at(16)
    samples, mix = [torch.randn(16, 8), torch.randn(8, 16), torch.randn(16, 8)], ((1, 1), (4, 6))
    form = fastest_by_shape([slow_at_8, slow_at_16], samples, mix)
    assert [type(form(sample)) for sample in samples] == [slow_at_16, slow_at_8, slow_at_16]
    assert type(form(torch.randn(4, 4))) is slow_at_16  # the faster one over all
    form = fastest_by_shape([slow_at_8, slow_at_16], samples, mix, otherwise=slow_at_8)
    assert [type(form(sample)) for sample in (*samples[:2], torch.randn(4, 4))] == [slow_at_16, slow_at_8, slow_at_8]
    form = fastest_by_shape([slow_at_8, slow_at_16], samples, mix, otherwise=Plain)  # not one of them
    assert type(form(torch.randn(4, 4))) is slow_at_16
    assert (form.lone_row_width, form.rounds_inputs, form.inner_dtype) == (1, False, None)
    assert fastest_by_shape([Plain, slow_at_8], samples, mix) is Plain


def test_chance_does_not_decide_between_forms_that_share_a_product():
    class PlainWide(Plain):
        lone_row_width = 4

    samples = [torch.randn(16, 8), torch.randn(8, 16)]
    costs = cost_of([Plain, PlainWide], samples, ((1, 4), (4, 6)))
    assert costs[Plain] == costs[PlainWide] and min(costs[Plain]) > 0


def test_where_bits_are_kept_by_default(tiny_model):
    """A table by device, type and form of weights."""
    single = tiny_model("llama")
    assert TextGenerator(single, weights="packed").runner.width == 1
    assert TextGenerator(single, weights="packed", bit_exact=True).runner.width == 4
    half = tiny_model("llama").to(torch.bfloat16)
    assert TextGenerator(half, weights="plain").runner.width == 1
    if obstacle_to(Packed, half.lm_head.weight.detach()) is None:
        assert TextGenerator(half, weights="packed").runner.width == 4
        assert TextGenerator(half, weights="packed", bit_exact=False).runner.width == 1
