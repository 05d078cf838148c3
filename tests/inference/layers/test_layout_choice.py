"""The layouts that a model's weights get on a machine, and what becomes of its text."""

import random
import time

import pytest
import torch

from lskip.inference import TextGenerator
from lskip.inference.layers import layout_choice
from lskip.inference.layers.bags import Bagged
from lskip.inference.layers.layout_choice import choose_layouts
from lskip.inference.layers.linear import Halved, Packed, Plain, Widened
from lskip.models.exit_adapter import AdapterShape, ExitAdapter
from tests.conftest import HALVED_WORKS, needs_halved


def layouts_of(generator):
    """The names of all matrices' layouts."""
    runners = [generator.runner, generator.draft_runner]
    runners += [] if generator.adapter_runner is None else [generator.adapter_runner.runner]
    matrices = [each for runner in filter(None, runners) for block in runner.blocks for each in block.matrices]
    heads = [runner.head for runner in filter(None, runners)]
    joins = [] if generator.adapter_runner is None else [generator.adapter_runner.join]
    return [type(each).__name__ for each in (*matrices, *heads, *joins)]


@needs_halved
def test_a_checkpoint_of_bfloat16_numbers_decodes_halved_to_the_same_text(tiny_model):
    model = tiny_model("llama").bfloat16().float()
    plain, halved = TextGenerator(model, weights="plain"), TextGenerator(model, weights="halved")
    blocks = sum(p.numel() for p in model.model.layers.parameters() if p.ndim > 1)
    assert halved.runner.layout == "Halved" and halved.memory()["blocks"] == 2 * blocks
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
    assert "Halved" not in TextGenerator(model).runner.layout
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
    assert generator.runner.layout in ("Plain", "Bagged")
    assert generator.generate([5, 6, 7], max_new_tokens=10).token_ids == truth
    with pytest.raises(ValueError, match="weights: 'packed' does not work here"):
        TextGenerator(model, weights="packed")


@pytest.mark.parametrize(("bit_exact", "layout"), [(None, Halved), (None, Widened), (True, Widened)])
def test_without_bfloat16_products_they_are_float32(tiny_model, monkeypatch, bit_exact, layout):
    """Older CPUs: the text is that of the same weights in a float32 model."""
    if layout is Halved and not HALVED_WORKS:
        pytest.skip("this build has no FBGEMM")
    model = tiny_model("llama").to(torch.bfloat16)
    product = torch.ops.mkldnn._reorder_linear_weight
    monkeypatch.setattr(
        torch.ops.mkldnn,
        "_reorder_linear_weight",
        lambda weight, rows: refuse() if weight.dtype == torch.bfloat16 else product(weight, rows),
    )
    if layout is Widened:
        monkeypatch.setattr(torch.ops.quantized, "linear_prepack_fp16", refuse)
    generator = TextGenerator(model, bit_exact=bit_exact)
    assert generator.runner.layout in ((layout.__name__,) if bit_exact is None else (layout.__name__, "Sliced"))
    if generator.runner.layout == layout.__name__:
        alone = TextGenerator(model.float(), weights="plain").generate([5, 6, 7], max_new_tokens=30)
        assert generator.generate([5, 6, 7], max_new_tokens=30).token_ids == alone.token_ids
        drafted = generator.generate([5, 6, 7], max_new_tokens=30, exit_layer=2, num_speculations=3)
        assert drafted.token_ids == alone.token_ids
    assert generator.memory()["blocks"] == (2 if layout is Halved else 4) * sum(
        p.numel() for p in model.model.layers.parameters() if p.ndim > 1
    )


def numbers(dtype, whole=False):
    """A matrix whose numbers need all bits of float32, or (`whole`) no more than bfloat16's."""
    sample = torch.randn(16, 8, generator=torch.Generator().manual_seed(0))
    return (sample.bfloat16() if whole else sample).to(dtype)


def works_everywhere(monkeypatch, *missing, avx2=True):
    """A machine that has all operations but those of some layouts."""
    monkeypatch.setattr(layout_choice, "obstacle_to", lambda layout, _: "missing" if layout in missing else None)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2" if avx2 else "AVX512")


@pytest.mark.parametrize(
    ("dtype", "lone_rows", "missing", "avx2", "layouts"),
    [
        (torch.float32, True, [], True, [Halved, Bagged, Packed]),
        (torch.float32, False, [], True, [Halved, Packed]),
        (torch.float32, True, [], False, [Halved, Packed]),  # AVX-512: bags are slow for several rows
        (torch.float32, True, [Halved], True, [Bagged, Packed]),  # no FBGEMM
        (torch.float32, False, [Halved, Packed], True, [Plain]),
        (torch.bfloat16, True, [], True, [Packed]),
        (torch.bfloat16, False, [Packed], True, [Halved, Widened]),
        (torch.bfloat16, True, [Packed, Halved], True, [Widened]),
        (torch.bfloat16, True, [Packed, Halved, Widened], True, [Plain]),
        (torch.float16, True, [Packed], True, [Halved, Widened]),
    ],
)
def test_the_rule(monkeypatch, dtype, lone_rows, missing, avx2, layouts):
    works_everywhere(monkeypatch, *missing, avx2=avx2)
    assert choose_layouts("auto", numbers(dtype), lone_rows) == layouts


def test_what_a_matrix_gets_depends_on_its_numbers(tiny_model, monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    if choose_layouts("auto", numbers(torch.float32)) != [Halved, Bagged, Packed]:
        pytest.skip("this build has not all of them")
    model = tiny_model("llama", vocab_size=320)  # a multiple of 8, as Bagged wants it
    assert (
        TextGenerator(model).runner.layout == "Bagged" and TextGenerator(model, batch_size=8).runner.layout == "Packed"
    )
    # Where something with weights of its own drafts, the model's see several rows, those to verify.
    for drafting in ({"draft_weights": "int8"}, {"exit_adapter": ExitAdapter(model, AdapterShape(2))}):
        assert TextGenerator(model, **drafting).runner.layout == "Packed"
    model.bfloat16().float()
    assert TextGenerator(model).runner.layout == TextGenerator(model, batch_size=8).runner.layout == "Halved"
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = 1 + 2.0**-20
    assert TextGenerator(model).runner.layout == "Bagged+Halved"
    assert TextGenerator(model, batch_size=8).runner.layout == "Halved+Packed"


def test_nothing_depends_on_a_clock(tiny_model, monkeypatch):
    """Loaded with clocks that say anything, matrices get the same layouts, drafts' and adapters' too."""
    model = tiny_model("llama", vocab_size=320)
    asked = [{}, {"batch_size": 8}, {"draft_weights": "int8"}, {"draft_weights": "int4", "batch_size": 2}]
    asked += [{"exit_adapter": ExitAdapter(model, AdapterShape(2))}, {"bit_exact": True}]
    expected = [layouts_of(TextGenerator(model, **each)) for each in asked]
    for name in ("perf_counter", "perf_counter_ns", "monotonic", "monotonic_ns", "time", "time_ns", "process_time"):
        monkeypatch.setattr(time, name, lambda: random.uniform(0, 1000))
    for _ in range(3):
        assert [layouts_of(TextGenerator(model, **each)) for each in asked] == expected


def test_bad_weights(tiny_model):
    assert choose_layouts("plain", numbers(torch.float32)) == [Plain]
    assert choose_layouts("auto", torch.empty(16, 8, device="meta")) == [Plain]
    for name in ("int3", "transposed"):
        with pytest.raises(ValueError, match=f"weights: '{name}' is not one of auto, plain, packed, halved, int8"):
            TextGenerator(tiny_model("llama"), weights=name)
