"""Decoding each exit at a sampled share of the positions (`position_share` of the module)."""

import pytest
import torch

import lskip.module
from lskip.module import LayerSkipModule


def random_ids(rows, length):
    return torch.randint(0, 300, (rows, length), generator=torch.Generator().manual_seed(1))


def make_module(model, weights, **settings):
    module = LayerSkipModule(model, **settings)
    module.exit_weights.write("test", weights)
    return module


@pytest.fixture
def decoded(monkeypatch):
    """Return a list that collects (labels, row weights) of each call of head_loss."""
    calls = []

    def spy(states, head_weight, head_bias, labels, row_weights, *rest):
        calls.append((labels, row_weights))
        return original(states, head_weight, head_bias, labels, row_weights, *rest)

    original = lskip.module.head_loss
    monkeypatch.setattr(lskip.module, "head_loss", spy)
    return calls


def test_a_share_of_the_positions_at_each_exit_but_the_last(tiny_model, decoded):
    ids = random_ids(rows=4, length=21)  # 80 scored positions
    module = make_module(tiny_model(), [0, 0.2, 0.3, 0.5], position_share=0.25)
    module.early_exit_loss({"input_ids": ids}, 0)
    ((labels, weights),) = decoded
    assert len(labels) == 20 + 20 + 80
    assert weights.tolist() == pytest.approx([0.8] * 20 + [1.2] * 20 + [0.5] * 80)
    assert torch.equal(labels[40:], ids[:, 1:].flatten())
    assert not torch.equal(labels[:20], labels[20:40])  # each exit draws its own


def test_an_exit_decodes_at_least_one_position(tiny_model, decoded):
    module = make_module(tiny_model(), [0, 0.2, 0.3, 0.5], position_share=0.001)
    module.early_exit_loss({"input_ids": random_ids(rows=3, length=12)}, 0)
    assert len(decoded[0][0]) == 1 + 1 + 33


def test_the_sampled_loss_is_an_unbiased_estimate(tiny_model):
    batch = {"input_ids": random_ids(rows=4, length=21)}
    weights = [0, 0.3, 0.3, 0.4]
    with torch.no_grad():
        full = make_module(tiny_model(), weights).early_exit_loss(batch, 0)[0]
        module = make_module(tiny_model(), weights, position_share=0.1)
        results = [module.early_exit_loss(batch, micro_batch) for micro_batch in range(200)]
    sampled = torch.stack([loss for loss, _ in results])
    standard_error = sampled.std() / len(sampled) ** 0.5
    assert standard_error > 0 and abs(sampled.mean() - full) < 4 * standard_error
    assert standard_error < 0.02 * full
    assert len({last.item() for _, last in results}) == 1  # the last exit is never sampled
