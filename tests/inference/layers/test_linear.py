"""Products of weights in every layout."""

import pytest
import torch

from lskip.inference.layers.bags import WIDEST, Bagged
from lskip.inference.layers.layout_choice import obstacle_to
from lskip.inference.layers.linear import Halved, Packed, Plain, Widened, pack, power_to_halve
from tests.conftest import needs_halved


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", [Plain, Bagged, Packed, Halved, Widened])
@pytest.mark.parametrize("rows", [1, 2, 5, 40])
def test_products(layout, dtype, rows):
    if obstacle_to(layout, torch.ones(8, 8, dtype=dtype)) is not None:
        pytest.skip("this CPU does not have the layout in this dtype")
    weight, bias, x, residual = (torch.randn(*shape).to(dtype) for shape in ((48, 20), (48,), (rows, 20), (rows, 48)))
    if layout is Halved:
        weight = weight.bfloat16().to(dtype)
    x = x.to(layout.inner_dtype or dtype)
    exact = x.double() @ weight.double().T + bias.double()
    tolerance = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 5e-2}
    matrix, before = layout(weight, bias), residual.clone()
    assert torch.allclose(matrix(x).double(), exact, **tolerance)
    added = matrix.add_to(residual, x)
    assert torch.allclose(added.double(), exact + residual.double(), **tolerance)
    assert torch.equal(residual, before)


@needs_halved
@pytest.mark.parametrize("scale", [1.0, 2.0**-60, 2.0**60])
def test_halving_changes_no_number(scale):
    """Rows of the identity bring back the matrix itself: to the bit, down to 2^-32 of its largest number."""
    torch.manual_seed(0)  # of all draws one in thirty has a number that is too small
    weight = (torch.randn(40, 24) * torch.logspace(0, -6, 24)).bfloat16().float() * scale
    weight[3, 5], weight[4] = weight.abs().max() * 2.0**-31, 0.0
    matrix = Halved(weight)
    assert torch.equal(matrix(torch.eye(24)), weight.T)
    assert matrix.nbytes == 2 * weight.numel()


@pytest.mark.parametrize(("out", "width"), [(8, 8), (96, 96), (128, 64), (960, 120), (8 * 17, 8)])
def test_bags_are_as_wide_as_they_may_be_and_begin_where_the_last_one_ends(out, width):
    assert width <= WIDEST
    weight, x = torch.randn(out, 12), torch.randn(1, 12)
    matrix = Bagged(weight)
    assert matrix.weight.shape == (out // width, 12, width) and matrix.weight.is_contiguous()
    assert matrix.nbytes == weight.nbytes and Bagged(weight, weight[:, 0]).nbytes == weight.nbytes + 4 * out
    for shape in ((1, 12), (3, 12)):  # a lone row by its bags, several by products
        assert torch.allclose(matrix(x.expand(shape)), (x @ weight.T).expand(shape[0], -1), atol=1e-4)
    with pytest.raises(ValueError, match="12 rows, not a multiple of 8"):
        Bagged(torch.randn(12, 16))
    with pytest.raises(ValueError, match="not for"):
        Bagged(weight.bfloat16())


def test_what_none_of_the_layouts_can_hold_is_plain():
    """In the type that the first of them is given its inputs in, as all matrices of a model are."""
    weight, bias, x = torch.randn(9, 16).bfloat16(), torch.randn(9).bfloat16(), torch.randn(3, 16)
    weight[2, 3] = float("inf")
    matrix = pack([Halved, Bagged], weight, bias)
    assert type(matrix) is Plain
    expected = x @ weight.float().T + bias.float()
    torch.testing.assert_close(matrix(x), expected, atol=1e-5, rtol=1e-5, equal_nan=True)
    assert pack([Bagged], weight).weight.dtype == torch.bfloat16


def test_numbers_that_float16_cannot_hold():
    numbers = torch.randn(16, 16).bfloat16().float()
    assert power_to_halve(torch.zeros(16, 16)) is not None and power_to_halve(numbers) is not None
    for bad in (1 + 2.0**-11, numbers.abs().max() * 2.0**-45, float("inf"), float("nan")):  # too long, too small, none
        spoiled = numbers.clone()
        spoiled[2, 3] = bad
        assert power_to_halve(spoiled) is None
        assert type(pack([Halved, Packed], spoiled)) is Packed
    with pytest.raises(ValueError, match="fit into 16 bits"):
        Halved(spoiled)
