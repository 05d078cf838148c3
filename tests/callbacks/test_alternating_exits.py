"""BERxiT's recipe: the last exit and all exits by turns, and the exit classifier only with all of them."""

import pytest
import torch
from torch.utils.data import DataLoader

from lskip.callbacks import AlternatingExits
from lskip.module import LayerSkipModule
from tests.callbacks.test_two_stages import Snapshots, changed
from tests.trainers import quiet_trainer


def test_last_exit_and_all_exits_by_turns():
    weights = [AlternatingExits().exit_weights(step, 4) for step in range(4)]
    assert weights == [[0, 0, 0, 1], [0.25] * 4] * 2


@pytest.mark.parametrize("accumulated", [1, 2])
def test_a_step_is_an_optimizer_step(tiny_config, accumulated):
    module, seen = LayerSkipModule(tiny_config(), learned_exit=True), Snapshots()
    trainer = quiet_trainer(None, AlternatingExits(), seen, max_steps=4, accumulate_grad_batches=accumulated)
    batches = [{"input_ids": torch.randint(0, 300, (2, 10))} for _ in range(12)]
    trainer.fit(module, DataLoader(batches, batch_size=None))
    last, every = [0.0, 0.0, 0.0, 1.0], [0.25] * 4
    assert seen.weights == ([last] * accumulated + [every] * accumulated) * 2
    classifier = {"exits.certainty.linear.weight", "exits.certainty.linear.bias"}
    assert not classifier & changed(seen.taken[0], seen.taken[accumulated])
    assert classifier <= changed(seen.taken[accumulated], seen.taken[2 * accumulated])
