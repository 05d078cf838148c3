"""Products of weights in every form."""

import pytest
import torch
from conftest import needs_halved

from lskip.inference import weights
from lskip.inference.form_choice import obstacle_to
from lskip.inference.weights import (
    Convolved,
    Halved,
    Packed,
    Plain,
    Split,
    SplitTransposed,
    Transposed,
    Widened,
    hold,
    power_to_halve,
    scripted,
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", [Plain, Transposed, Split, SplitTransposed, Packed, Halved, Widened])
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
    assert SplitTransposed(weight).weight.data_ptr() != weight.data_ptr()
    with pytest.raises(ValueError, match="10 rows, not a multiple of 4"):
        Split(torch.randn(10, 6))


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


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("shape", [(48, 20), (31, 7), (1, 3), (5, 1)])
@pytest.mark.parametrize("rows", [1, 2, 4, 5, 8, 33, 64, 130, 300])
def test_a_convolution_is_the_product(tiny_convolutions, rows, shape, biased):
    """Whatever images the rows come in."""
    weight, bias = torch.randn(shape), torch.randn(shape[0]) if biased else None
    x, residual = torch.randn(rows, shape[1]), torch.randn(rows, shape[0])
    wide = torch.randn(rows, 2 * shape[1])
    held, before = Convolved(weight, bias), residual.clone()
    for each in (x, wide[:, : shape[1]]):
        exact = each.double() @ weight.double().T + (0 if bias is None else bias.double())
        for product in (held(each), scripted(held.product)(each, held.held)):
            assert product.shape == (rows, shape[0]) and product.is_contiguous()
            assert torch.allclose(product.double(), exact, atol=1e-4)
        assert torch.allclose(held.add_to(residual, each).double(), residual + exact, atol=1e-4)
    assert torch.equal(residual, before)
    assert held.nbytes == 4 * (weight.numel() + (shape[0] if biased else 0))


def test_no_number_of_rows_has_a_matrix_arranged_anew(monkeypatch):
    """oneDNN is given images that want the layout that the matrix has; others take a hundred times as long."""
    weight, seen = torch.randn(960, 576), set()
    if (reason := obstacle_to(Convolved, weight)) is not None:
        pytest.skip(reason)
    held, convolution = Convolved(weight), torch.ops.mkldnn._convolution_pointwise
    monkeypatch.setattr(
        torch.ops.mkldnn, "_convolution_pointwise", lambda x, *rest: seen.add(x.shape) or convolution(x, *rest)
    )
    for rows in range(1, 257):
        held(torch.zeros(rows, 576))
    assert len(seen) > 5
    for shape in seen:
        wanted = torch.ops.mkldnn._reorder_convolution_weight(
            weight[:, :, None, None], [0, 0], [1, 1], [1, 1], 1, list(shape)
        )
        layouts = [torch.ops.mkldnn._get_mkldnn_serialized_md(matrix) for matrix in (wanted, held.weight)]
        assert torch.equal(*layouts), shape


def test_matrices_that_are_not_convolved(monkeypatch):
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        with pytest.raises(ValueError, match=f"not for {dtype}"):
            Convolved(torch.randn(16, 8).to(dtype))
        assert f"not for {dtype}" in obstacle_to(Convolved, torch.randn(16, 8).to(dtype))
    assert "on meta" in obstacle_to(Convolved, torch.empty(16, 8, device="meta"))
    monkeypatch.setattr(weights, "sizes_of_one_layout", lambda shape, threads: [4, 8, 12, 128])
    assert "depend on the number of rows" in obstacle_to(Convolved, torch.randn(16, 8))
    assert type(hold(Convolved, torch.randn(16, 8))) is Widened
