"""A turned basis: nothing but rounding may tell it from the model's own."""

import pytest
import torch

from lskip.inference.layers.linear import Plain
from lskip.inference.layers.quantized import DynamicInt8
from lskip.inference.layers.rotation import Rotation
from lskip.inference.runners.fused_runner import FusedRunner
from lskip.models.decoder import Decoder
from tests.conftest import FBGEMM_DRAFTS


class Turned(Plain):
    """Exact weights behind turned states."""

    rounds_inputs = True


@pytest.mark.parametrize("size", [1, 7, 32, 576])
def test_a_rotation_is_a_kronecker_product_and_turns_back(size):
    rotation, x = Rotation(size), torch.randn(2, 3, size)
    whole = torch.kron(rotation.left, rotation.right)
    assert torch.allclose(whole @ whole.T, torch.eye(size), atol=1e-5)
    assert torch.allclose(rotation.turn(x), x @ whole, atol=1e-5)
    assert torch.allclose(rotation.turn_back(rotation.turn(x)), x, atol=1e-5)
    assert torch.equal(Rotation(size).right, rotation.right)  # drafts repeat


def test_a_large_number_is_spread_over_all():
    x = torch.zeros(576)
    x[17] = 24.0
    assert Rotation(576).turn(x).abs().max() < 8


def uneven_model(tiny_model, family, **overrides):
    """Norm weights and biases that are not all 1 and 0: a rotation that forgot them would go unnoticed."""
    model = tiny_model(family, **overrides)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.add_(torch.randn_like(parameter) / 3)
    return model


@pytest.mark.parametrize(
    ("family", "overrides"),
    [("llama", {}), ("llama", {"attention_bias": True, "mlp_bias": True}), ("qwen2", {}), ("qwen3", {"head_dim": 8})],
)
def test_turned_blocks_compute_the_model(tiny_model, family, overrides):
    """States in between are the model's own as well: exits with a head of their own, and adapters, read them."""
    model = uneven_model(tiny_model, family, **overrides)
    ids = torch.randint(0, 300, (2, 9))
    expected = model(ids, output_hidden_states=True)
    step = FusedRunner(Decoder(model), Turned)
    with torch.inference_mode():
        cache = step.new_cache(2, 16)
        x = step.run(step.embed(ids[:, :6]), cache, [0, 0], 0, 2)
        assert torch.allclose(x, expected.hidden_states[2][:, :6], atol=1e-4)
        step.fill(x, cache, [0, 0], 2, 3)
        step.run(x, cache, [0, 0], 2, 4)
        later = step.run(step.embed(ids[:, 6:]), cache, [6, 6], 0, 4)
        assert torch.allclose(step.decode(later), expected.logits[:, 6:], atol=1e-3)


@pytest.mark.skipif(not FBGEMM_DRAFTS, reason="this build has no FBGEMM")
def test_a_large_number_does_not_set_the_scale_of_all():
    """As in trained models: one of the states' numbers is many times the others."""
    torch.manual_seed(0)
    weight, x, rotation = torch.randn(96, 576), torch.randn(1, 576), Rotation(576)
    x[0, 17] = 60
    expected = x @ weight.T

    def error(product):
        return float((product - expected).norm() / expected.norm())

    turned = error(DynamicInt8(rotation.turn(weight))(rotation.turn(x)))
    assert turned < 0.7 * error(DynamicInt8(weight)(x))  # what is left is the weights' own rounding
