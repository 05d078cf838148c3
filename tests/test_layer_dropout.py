"""Layer dropout: kept rows against each row by itself, and statistics of the draws."""

from functools import partial

import numpy as np
import pytest
import torch

from lskip.layer_dropout import draw_dropped, run_kept_rows
from lskip.models.decoder import Decoder

# Block 0 on rows that each have positions, and so rotary embeddings and a mask, of their own.
POSITIONS = torch.arange(9)[None] + torch.tensor([[0], [3], [20], [41]])


def seen_inputs(decoder, block=0):
    """Return a list that collects (states, keyword arguments) of each call of the block."""
    seen = []
    decoder.model.model.layers[block].register_forward_pre_hook(
        lambda module, args, kwargs: seen.append((args[0], kwargs)), with_kwargs=True
    )
    return seen


@pytest.fixture
def decoder(tiny_model):
    return Decoder(tiny_model("mistral", sliding_window=4))  # a window shorter than the text: there is a mask


@pytest.mark.parametrize("dropped", [[0, 1, 0, 0], [1, 0, 1, 1], [0, 0, 0, 0], [1, 1, 1, 1]])
@torch.no_grad()
def test_each_row_is_what_it_would_be_alone(decoder, dropped):
    dropped = torch.tensor(dropped).bool()
    x = torch.randn(4, 9, 32, generator=torch.Generator().manual_seed(0))
    inputs = decoder.block_inputs(x, POSITIONS)
    before = x.clone()
    result = run_kept_rows(partial(decoder.block, 0), x, inputs, dropped)
    assert torch.equal(x, before)
    for row in range(4):
        one = slice(row, row + 1)
        alone = decoder.block(0, x[one], decoder.block_inputs(x[one], POSITIONS[one]))
        torch.testing.assert_close(result[one], x[one] if dropped[row] else alone, rtol=1e-5, atol=1e-5)
        assert not torch.allclose(alone, x[one], atol=1e-2)


@pytest.mark.parametrize("dropped", [[0, 1, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1]])
def test_what_a_block_adds_to_kept_rows_is_scaled(decoder, dropped):
    dropped = torch.tensor(dropped).bool()
    block = partial(decoder.block, 0)
    x = torch.randn(4, 9, 32, generator=torch.Generator().manual_seed(0), requires_grad=True)
    inputs = decoder.block_inputs(x, POSITIONS)
    expected = x + 2.5 * ~dropped[:, None, None] * (block(x, inputs) - x)
    result = run_kept_rows(block, x, inputs, dropped, 2.5)
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)
    ours, theirs = (torch.autograd.grad(part.square().sum(), x)[0] for part in (result, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_the_block_gets_the_kept_rows_and_what_belongs_to_them(decoder):
    seen = seen_inputs(decoder)
    x = torch.randn(4, 9, 32)
    inputs = decoder.block_inputs(x, POSITIONS)
    run_kept_rows(partial(decoder.block, 0), x, inputs, np.array([False, True, True, False]))
    states, kwargs = seen.pop()
    assert torch.equal(states, x[[0, 3]])
    assert torch.equal(kwargs["position_ids"], POSITIONS[[0, 3]])
    assert torch.equal(kwargs["attention_mask"], inputs.masks[4][[0, 3]])
    for part, whole in zip(kwargs["position_embeddings"], inputs.rotary[None], strict=True):
        assert torch.equal(part, whole[[0, 3]])


@torch.no_grad()
def test_what_broadcasts_over_the_batch_is_not_cut(decoder):
    seen = seen_inputs(decoder)
    x = torch.randn(4, 9, 32)
    run_kept_rows(partial(decoder.block, 0), x, decoder.block_inputs(x), np.array([False, True, True, False]))
    states, kwargs = seen.pop()
    assert len(states) == 2
    assert kwargs["position_ids"].shape == (1, 9) and kwargs["attention_mask"].shape == (1, 1, 9, 9)
    assert [part.shape for part in kwargs["position_embeddings"]] == [(1, 9, 8)] * 2


@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_block_without_rows_is_not_called(decoder, batch_size):
    seen = seen_inputs(decoder)
    x = torch.randn(batch_size, 9, 32, requires_grad=True)
    result = run_kept_rows(
        partial(decoder.block, 0), x, decoder.block_inputs(x), torch.ones(batch_size, dtype=torch.bool)
    )
    assert torch.equal(result, x) and not seen
    (result**2).sum().backward()
    assert torch.equal(x.grad, 2 * x)


def test_gradients_reach_kept_and_dropped_rows(decoder):
    dropped = torch.tensor([False, True, False, True])
    x = torch.randn(4, 9, 32, requires_grad=True)
    inputs = decoder.block_inputs(x)
    target = torch.randn(4, 9, 32)

    def gradients(result):
        decoder.model.zero_grad()
        grad_x = torch.autograd.grad((result * target).sum(), [x, *decoder.model.model.layers[0].parameters()])
        return grad_x

    f = decoder.block(0, x, inputs) - x
    expected = gradients(x + f * ~dropped[:, None, None])
    for ours, theirs in zip(
        gradients(run_kept_rows(partial(decoder.block, 0), x, inputs, dropped)), expected, strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


# The draw


def draw(*key):
    dropped = draw_dropped(*key)
    assert isinstance(dropped, np.ndarray) and dropped.dtype == bool  # known without waiting for any device
    return torch.from_numpy(dropped)


def test_the_draw_is_a_pure_function_that_moves_no_random_stream():
    torch.manual_seed(5)
    np.random.seed(5)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()
    first = draw(3, 17, 2, 64, 0.5)
    assert torch.equal(torch.get_rng_state(), before[0]) and np.random.get_state()[1].tolist() == before[1]
    torch.manual_seed(6)
    assert torch.equal(draw(3, 17, 2, 64, 0.5), first)
    assert first.shape == (64,)


def test_the_draw_of_a_sequence_does_not_depend_on_what_else_is_asked():
    """Other ranks, other batch sizes, other rates: one stream of uniform numbers decides."""
    assert torch.equal(draw(3, 17, 2, 64, 0.5)[:10], draw(3, 17, 2, 10, 0.5))
    assert (draw(3, 17, 2, 64, 0.2) <= draw(3, 17, 2, 64, 0.5)).all()


@pytest.mark.parametrize("rate", [0.05, 0.3, 0.5, 0.9])
def test_the_mean_is_the_rate(rate):
    draws = torch.cat([draw(0, step, block, 16, rate) for step in range(200) for block in range(8)]).float()
    sigma = (rate * (1 - rate) / len(draws)) ** 0.5
    assert abs(draws.mean().item() - rate) < 4 * sigma


def test_rates_of_zero_and_one_are_exact():
    assert not any(draw(0, step, 0, 64, 0.0).any() for step in range(100))
    assert all(draw(0, step, 0, 64, 1.0).all() for step in range(100))


@pytest.mark.parametrize("changed", ["seed", "micro_batch", "block", "row"])
def test_neighbouring_draws_are_independent(changed):
    """At rate 0.5 the correlation of n pairs has a standard error of 1 / sqrt(n)."""

    def draws(seed=0, micro_batch=0, block=0):
        return draw(seed, micro_batch, block, 20_000, 0.5).double() - 0.5

    first = draws()
    second = first.roll(1) if changed == "row" else draws(**{changed: 1})
    assert abs((first * second).mean().item() / 0.25) < 4 / 20_000**0.5


def test_arguments_are_not_interchangeable():
    """(seed 1, step 2, block 3) and its permutations are six different draws."""
    orders = [(1, 2, 3), (1, 3, 2), (2, 1, 3), (2, 3, 1), (3, 1, 2), (3, 2, 1)]
    assert len({tuple(draw(*order, 64, 0.5).tolist()) for order in orders}) == 6


def test_each_rank_may_draw_a_pattern_of_its_own():
    """The same for the same rank; of two ranks, and of none, at rate 0.5 independent."""
    of = [draw(3, 17, 2, 20_000, 0.5, rank).double() - 0.5 for rank in (None, 0, 1)]
    assert torch.equal(draw(3, 17, 2, 20_000, 0.5, 1).double() - 0.5, of[2])
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert abs((of[one] * of[other]).mean().item() / 0.25) < 4 / 20_000**0.5
