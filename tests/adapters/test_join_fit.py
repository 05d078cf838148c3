"""The join that an adapter's training begins with: a ridge regression, and better than none."""

import numpy as np
import pytest
import torch

from lskip.adapters.answers import AnswerRow
from lskip.adapters.join_fit import ANSWERS, RIDGE, fit_join
from lskip.adapters.module import AdapterModule
from lskip.models.exit_adapter import AdapterShape, ExitAdapter

LENGTHS = [(9, 4), (14, 2), (20, 11), (7, 6)]  # tokens, of which the prompt's


@pytest.fixture
def rows():
    random = torch.Generator().manual_seed(3)
    ids = [torch.randint(300, (length,), generator=random).tolist() for length, _ in LENGTHS]
    return [AnswerRow(tuple(row), prompt, False) for row, (_, prompt) in zip(ids, LENGTHS, strict=True)]


@torch.no_grad()
def hidden(model, row) -> list[torch.Tensor]:
    """Embedding and block outputs [S, D], the last one before the norm, then behind it."""
    kept = []
    hook = model.model.norm.register_forward_pre_hook(lambda module, inputs: kept.append(inputs[0]))
    states = model.model(torch.tensor([row.token_ids]), output_hidden_states=True).hidden_states
    hook.remove()
    return [state[0] for state in (*states[:-1], kept[0], states[-1])]


def unit(states: torch.Tensor) -> torch.Tensor:
    return states / states.square().mean(-1, keepdim=True).sqrt()


@pytest.mark.parametrize(("exit_layer", "num_blocks", "joins"), [(1, 2, True), (2, 1, True), (1, 1, False)])
def test_it_is_the_ridge_regression_of_what_the_copied_blocks_take(tiny_model, rows, exit_layer, num_blocks, joins):
    model = tiny_model()
    adapter = ExitAdapter(model, AdapterShape(exit_layer, num_blocks, joins))
    fit_join(adapter, model, rows)
    given, wanted = [], []
    for row in rows:
        states = hidden(model, row)
        for position in range(row.prompt_length - 1, len(row.token_ids) - 1):
            before = states[-1][position - 1] if position else torch.zeros(32)
            parts = [unit(states[exit_layer][position])]
            if joins:
                parts.append(unit(before) if position else before)
            given.append(torch.cat([*parts, torch.ones(1)]).numpy())
            wanted.append(states[4 - num_blocks][position].numpy())
    given, wanted = np.array(given, float), np.array(wanted, float)
    # as least squares: a row more for each coefficient, which asks it to be 0
    penalty = np.sqrt(RIDGE * len(given)) * np.eye(given.shape[1])
    solved = np.linalg.lstsq(np.vstack([given, penalty]), np.vstack([wanted, 0 * penalty[:, :32]]), rcond=None)[0]
    np.testing.assert_allclose(adapter.join.weight.detach().numpy().T, solved[:-1], atol=1e-4)
    np.testing.assert_allclose(adapter.join.bias.detach().numpy(), solved[-1], atol=1e-4)


def test_training_begins_ahead_of_an_unfitted_one(tiny_model, rows):
    model = tiny_model()
    with torch.no_grad():  # as in trained models, deep states are large
        for block in model.model.layers[:3]:
            block.mlp.down_proj.weight.mul_(40)
    losses = {}
    for fitted in (False, True):
        adapter = ExitAdapter(model, AdapterShape(1, 1)).eval()
        if fitted:
            fit_join(adapter, model, rows)
        states = [hidden(model, row) for row in rows]
        losses[fitted] = 0.0
        for row, state in zip(rows, states, strict=True):
            positions = torch.arange(len(row.token_ids))
            scored = (positions >= row.prompt_length - 1) & (positions < len(positions) - 1)
            batch = {"exit_states": state[1][None], "last_states": state[-1][None], "scored": scored[None]}
            losses[fitted] += AdapterModule(adapter, unroll=1).loss(batch).item()
    assert losses[True] < losses[False] - 0.5


def test_of_many_answers_it_takes_some(tiny_model, rows, monkeypatch):
    seen = []
    from lskip.adapters import join_fit

    original = join_fit._regression
    monkeypatch.setattr(join_fit, "_regression", lambda *given: (seen.extend(given[2]), original(*given))[1])
    model = tiny_model()
    fit_join(ExitAdapter(model, AdapterShape(1)), model, rows * 100)
    assert ANSWERS <= len(seen) < 2 * ANSWERS
