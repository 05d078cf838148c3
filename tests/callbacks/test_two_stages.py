"""DeeBERT's two stages: what each of them trains, to the bit."""

import pytest
import torch
from lightning.pytorch import Callback
from torch.utils.data import DataLoader

from lskip.callbacks import EarlyExitLoss, TwoStages
from lskip.module import LayerSkipModule
from lskip.optimization import WarmupCosine
from tests.trainers import quiet_trainer


def copies(module):
    return {name: part.detach().clone() for name, part in module.state_dict().items()}


class Snapshots(Callback):
    """The weights before each step and at the end."""

    def on_train_start(self, trainer, pl_module):
        self.taken, self.weights = [copies(pl_module)], []

    def on_train_batch_end(self, trainer, pl_module, *rest):
        self.taken.append(copies(pl_module))
        self.weights.append(list(pl_module.exit_weights.values))


def fit(module, *callbacks, max_steps=6, **settings):
    seen = Snapshots()
    batches = [{"input_ids": torch.randint(0, 300, (2, 10))} for _ in range(12)]
    trainer = quiet_trainer(None, *callbacks, seen, max_steps=max_steps, **settings)
    trainer.fit(module, DataLoader(batches, batch_size=None))
    return seen


def changed(before, after):
    return {name for name, part in before.items() if not torch.equal(part, after[name])}


@pytest.mark.parametrize("accumulated", [1, 2])
def test_the_frozen_model_keeps_every_bit(tiny_config, accumulated):
    """AdamW would move it without a gradient too, by its momentum and its weight decay."""
    module = LayerSkipModule(tiny_config(), exit_heads=True)
    names = set(module.state_dict())
    model = {name for name in names if name.startswith("model.")}
    seen = fit(module, TwoStages(0.5), accumulate_grad_batches=accumulated)
    half = len(seen.weights) // 2
    assert changed(seen.taken[0], seen.taken[half]) == model
    assert changed(seen.taken[half], seen.taken[-1]) == names - model
    assert seen.weights == [[0, 0, 0, 1]] * half + [[pytest.approx(1 / 3)] * 3 + [0]] * half
    assert all(parameter.requires_grad for parameter in module.parameters())  # another training may follow


def test_a_trained_model_goes_straight_to_the_second_stage(tiny_config):
    module = LayerSkipModule(tiny_config(), exit_heads=True)
    seen = fit(module, TwoStages(0), max_steps=2)
    assert {name.partition(".")[0] for name in changed(seen.taken[0], seen.taken[-1])} == {"exits"}


def test_each_stage_has_a_schedule_of_its_own():
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    two = WarmupCosine(optimizer, warmup_steps=3, total_steps=20, stages=2)
    one = WarmupCosine(optimizer, warmup_steps=3, total_steps=10)
    assert [two.factor(step) for step in range(20)] == 2 * [one.factor(step) for step in range(10)]


MISTAKES = [
    ({}, [TwoStages(0.5)], {}, "TwoStages: the exits have nothing of their own to train; set exit_heads: true"),
    ({"num_hidden_layers": 1}, [TwoStages(0.5)], {"exit_heads": True}, "TwoStages: the model has one layer"),
    ({}, [TwoStages(0.5), EarlyExitLoss()], {"exit_heads": True}, "TwoStages and EarlyExitLoss both write"),
]


@pytest.mark.parametrize(("config", "callbacks", "settings", "message"), MISTAKES)
def test_what_does_not_go(tiny_config, config, callbacks, settings, message):
    with pytest.raises(ValueError, match=message):
        fit(LayerSkipModule(tiny_config(**config), **settings), *callbacks)


@pytest.mark.parametrize("share", [1, -0.1, "half", float("nan")])
def test_a_share_out_of_range(share):
    with pytest.raises(ValueError, match=r"first_stage: .* is not a number from 0 to below 1"):
        TwoStages(share)
