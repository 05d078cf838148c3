"""Products of weights in every form."""

import pytest
import torch

from lskip.inference.layers.bagged import WIDEST, Bagged
from lskip.inference.layers.linear import (
    Halved,
    Packed,
    Plain,
    Split,
    Transposed,
    Widened,
    hold,
    power_to_halve,
)
from lskip.inference.layers.linear_choice import obstacle_to
from tests.conftest import needs_halved


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", [Plain, Transposed, Split, Bagged, Packed, Halved, Widened])
@pytest.mark.parametrize("rows", [1, 2, 5, 40])
def test_products(form, dtype, rows):
    if obstacle_to(form, torch.ones(8, 8, dtype=dtype)) is not None:
        pytest.skip("this CPU does not have the form in this dtype")
    weight, bias, x, residual = (torch.randn(*shape).to(dtype) for shape in ((48, 20), (48,), (rows, 20), (rows, 48)))
    if form is Halved:
        weight = weight.bfloat16().to(dtype)
    x = x.to(form.inner_dtype or dtype)
    exact = x.double() @ weight.double().T + bias.double()
    tolerance = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 5e-2}
    held, before = form(weight, bias), residual.clone()
    assert torch.allclose(held(x).double(), exact, **tolerance)
    added = held.add_to(residual, x)
    assert torch.allclose(added.double(), exact + residual.double(), **tolerance)
    assert torch.equal(residual, before)


@needs_halved
@pytest.mark.parametrize("scale", [1.0, 2.0**-60, 2.0**60])
def test_halving_changes_no_number(scale):
    """Rows of the identity bring back the matrix itself: to the bit, down to 2^-32 of its largest number."""
    torch.manual_seed(0)  # of all draws one in thirty has a number that is too small
    weight = (torch.randn(40, 24) * torch.logspace(0, -6, 24)).bfloat16().float() * scale
    weight[3, 5], weight[4] = weight.abs().max() * 2.0**-31, 0.0
    held = Halved(weight)
    assert torch.equal(held(torch.eye(24)), weight.T)
    assert held.nbytes == 2 * weight.numel()


def test_split_copies_nothing_and_wants_four_equal_parts():
    weight = torch.randn(8, 6)
    assert Split(weight).weight.data_ptr() == weight.data_ptr() and Split(weight).nbytes == weight.nbytes
    with pytest.raises(ValueError, match="10 rows, not a multiple of 4"):
        Split(torch.randn(10, 6))


@pytest.mark.parametrize(("out", "width"), [(8, 8), (96, 96), (128, 64), (960, 120), (8 * 17, 8)])
def test_bags_are_as_wide_as_they_may_be_and_begin_where_the_last_one_ends(out, width):
    assert width <= WIDEST
    weight, x = torch.randn(out, 12), torch.randn(1, 12)
    held = Bagged(weight)
    assert held.weight.shape == (out // width, 12, width) and held.weight.is_contiguous()
    assert held.nbytes == weight.nbytes and Bagged(weight, weight[:, 0]).nbytes == weight.nbytes + 4 * out
    for shape in ((1, 12), (3, 12)):  # a lone row by its bags, several by products
        assert torch.allclose(held(x.expand(shape)), (x @ weight.T).expand(shape[0], -1), atol=1e-4)
    with pytest.raises(ValueError, match="12 rows, not a multiple of 8"):
        Bagged(torch.randn(12, 16))
    with pytest.raises(ValueError, match="not for"):
        Bagged(weight.bfloat16())


def test_what_neither_its_form_nor_packing_can_hold_is_plain(monkeypatch):
    def refuse(*_):
        raise RuntimeError("no oneDNN")

    monkeypatch.setattr(torch.ops.mkldnn, "_reorder_linear_weight", refuse)
    weight, bias, x = torch.randn(9, 16).bfloat16(), torch.randn(9).bfloat16(), torch.randn(3, 16)
    held = hold(Split, weight, bias)
    assert torch.allclose(held(x), x @ weight.float().T + bias.float(), atol=1e-5)


def test_numbers_that_float16_cannot_hold():
    numbers = torch.randn(16, 16).bfloat16().float()
    assert power_to_halve(torch.zeros(16, 16)) is not None and power_to_halve(numbers) is not None
    for bad in (1 + 2.0**-11, numbers.abs().max() * 2.0**-45, float("inf"), float("nan")):  # too long, too small, none
        spoiled = numbers.clone()
        spoiled[2, 3] = bad
        assert power_to_halve(spoiled) is None
        assert type(hold(Halved, spoiled)) is Widened
    with pytest.raises(ValueError, match="fit into 16 bits"):
        Halved(spoiled)
