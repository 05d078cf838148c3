"""The rotated basis: nothing but rounding may tell it from the model's own."""

import pytest
import torch

from lskip.inference.layers.lm_head import ScreenInt8
from lskip.inference.layers.rotation import Rotation
from tests.conftest import needs_halved


@pytest.mark.parametrize("size", [1, 7, 32, 576])
def test_a_rotation_is_an_orthogonal_kronecker_product(size):
    rotation, x = Rotation(size), torch.randn(2, 3, size)
    whole = torch.kron(rotation.left, rotation.right)
    assert torch.allclose(whole @ whole.T, torch.eye(size), atol=1e-5)
    assert torch.allclose(rotation.rotate(x), x @ whole, atol=1e-5)
    assert torch.equal(Rotation(size).right, rotation.right)  # drafts repeat


def test_a_large_number_is_spread_over_all():
    x = torch.zeros(576)
    x[17] = 24.0
    assert Rotation(576).rotate(x).abs().max() < 8


@needs_halved
def test_a_large_number_does_not_set_the_scale_of_all():
    """As in trained models: one of the states' numbers is many times the others."""
    torch.manual_seed(0)
    weight, x, rotation = torch.randn(96, 576), torch.randn(1, 576), Rotation(576)
    x[0, 17] = 60
    expected = x @ weight.T

    def error(product):
        return float((product - expected).norm() / expected.norm())

    rotated = error(ScreenInt8(rotation.rotate(weight))(rotation.rotate(x)))
    assert rotated < 0.7 * error(ScreenInt8(weight)(x))  # what is left is the weights' own rounding
