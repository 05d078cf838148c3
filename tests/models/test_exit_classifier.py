"""The exit classifier against its equations, worked with plain numbers."""

import math

import pytest
import torch

from lskip.models.exit_heads import ExitClassifier, closeness


def made(weight, bias):
    classifier = ExitClassifier(len(weight))
    classifier.linear.weight.data[:] = torch.tensor([weight])
    classifier.linear.bias.data[:] = bias
    return classifier


def test_it_is_the_sigmoid_of_a_linear_map_of_the_normed_state():
    state = [3.0, -4.0]
    rms = math.sqrt((9 + 16) / 2)
    expected = 1 / (1 + math.exp(-(0.5 * 3 / rms + 0.25 * -4 / rms + 0.1)))
    classifier = made([0.5, 0.25], 0.1)
    assert classifier(torch.tensor(state)).item() == pytest.approx(expected)
    # The size of a state says nothing: deeper states are larger.
    assert classifier(100 * torch.tensor(state)).item() == pytest.approx(expected)
    assert classifier(torch.tensor(state, dtype=torch.bfloat16)).dtype == torch.float32


def test_the_loss_is_the_squared_error_and_leaves_the_states_alone():
    states = torch.randn(5, 2, requires_grad=True)
    right = torch.tensor([True, False, True, True, False])
    classifier = made([0.5, 0.25], 0.1)
    loss = classifier.loss(states, right)
    expected = sum((u - float(r)) ** 2 for u, r in zip(classifier(states).tolist(), right.tolist(), strict=True)) / 5
    assert loss.item() == pytest.approx(expected)
    loss.backward()
    assert states.grad is None and classifier.linear.weight.grad.abs().sum() > 0


def test_closeness_of_numbers():
    found = closeness(torch.tensor([1.0, 2.0, -1.0]), torch.tensor([1.0, 2.5, 1.0])).tolist()
    assert found == pytest.approx([1.0, 1 - math.tanh(0.5), 1 - math.tanh(2.0)])


def test_it_learns_which_states_are_right():
    torch.manual_seed(0)
    states = torch.randn(256, 8)
    right = states[:, 3] > 0
    classifier = ExitClassifier(8)
    optimizer = torch.optim.Adam(classifier.parameters(), lr=0.1)
    for _ in range(100):
        optimizer.zero_grad()
        classifier.loss(states, right).backward()
        optimizer.step()
    assert ((classifier(states) >= 0.5) == right).float().mean() > 0.97
