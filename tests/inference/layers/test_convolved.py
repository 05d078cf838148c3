"""Matrices held for a convolution: the product, and that oneDNN never has to arrange them anew."""

import pytest
import torch

from lskip.inference.layers import convolved
from lskip.inference.layers.convolved import Convolved
from lskip.inference.layers.linear import Widened, hold, scripted
from lskip.inference.layers.linear_choice import obstacle_to


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
    monkeypatch.setattr(convolved, "sizes_of_one_layout", lambda shape, threads: [4, 8, 12, 128])
    assert "depend on the number of rows" in obstacle_to(Convolved, torch.randn(16, 8))
    assert type(hold(Convolved, torch.randn(16, 8))) is Widened
