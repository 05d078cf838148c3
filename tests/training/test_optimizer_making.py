"""Refusals by torch's optimizers and schedules, in one sentence, before any data; on parameters of every kind."""

from functools import partial

import pytest
import torch
from torch import optim
from torch.optim import lr_scheduler

from lskip.module import LayerSkipModule
from lskip.optimization import WarmupCosine

KIND = "B20 B40 told before anything is read"

OPTIMIZERS = {
    "B20 lr": (partial(optim.AdamW, lr=-1.0), "optimizer.lr: -1.0 is not a number from 0 up"),
    "B20 betas": (partial(optim.AdamW, betas=(0.9, 1.5)), "optimizer.betas: 1.5 is not a number from 0 to below 1"),
    "B20 weight_decay": (partial(optim.AdamW, weight_decay=-1), "optimizer.weight_decay: -1 is not a number from 0 up"),
    "B20 LBFGS": (optim.LBFGS, "optimizer: LBFGS"),
    "eps": (partial(optim.Adam, eps=-1e-8), "optimizer.eps: -1e-08 is not"),
    "momentum": (partial(optim.SGD, lr=0.1, momentum=-1), "optimizer.momentum: -1 is not"),
    "lr inf": (partial(optim.SGD, lr=float("inf")), "optimizer.lr: inf is not a finite number"),
    "weight_decay inf": (partial(optim.SGD, lr=1, weight_decay=float("inf")), "optimizer.weight_decay: inf is not"),
    "nesterov": (partial(optim.SGD, lr=0.1, nesterov=True), "optimizer: Nesterov momentum requires"),
    "fused and foreach": (partial(optim.AdamW, fused=True, foreach=True), "optimizer: .*cannot be"),
    "SparseAdam": (optim.SparseAdam, "optimizer: SparseAdam takes sparse gradients"),
    "Muon": (partial(optim.Muon, lr=0.1), "optimizer: Muon only supports 2D"),
    "a word": (partial(optim.AdamW, lr="fast"), "optimizer: "),
}
SCHEDULES = {
    "F65 ReduceLROnPlateau": (lr_scheduler.ReduceLROnPlateau, "lr_scheduler: ReduceLROnPlateau goes by metrics"),
    "B20 OneCycleLR": (
        partial(lr_scheduler.OneCycleLR, max_lr=0.1),
        "lr_scheduler: You must define either total_steps",
    ),
    "OneCycleLR too short": (
        partial(lr_scheduler.OneCycleLR, max_lr=0.1, total_steps=9),
        "lr_scheduler.total_steps: 9, but the run has 10 steps",
    ),
    "StepLR 0": (partial(lr_scheduler.StepLR, step_size=0), "lr_scheduler: StepLR cannot make a step"),
    "T_max 0": (partial(lr_scheduler.CosineAnnealingLR, T_max=0), "CosineAnnealingLR cannot make a step"),
    "B40 total_steps 0": (partial(WarmupCosine, total_steps=0), "lr_scheduler.total_steps: 0 is not"),
    "B40 total_steps -3": (partial(WarmupCosine, total_steps=-3), "lr_scheduler.total_steps: -3 is not"),
    "final": (partial(WarmupCosine, final=2), "lr_scheduler.final: 2 is not"),
}


@pytest.fixture(scope="module")
def module():
    from tests.conftest import make_model

    return LayerSkipModule(make_model())


@pytest.mark.kind(KIND)
@pytest.mark.parametrize(("make", "said"), OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_optimizers(module, make, said):
    module.optimizer, module.lr_scheduler = make, None
    with pytest.raises(ValueError, match=f"^{said}"):
        module.check_training(None)


@pytest.mark.kind(KIND)
@pytest.mark.parametrize(("make", "said"), SCHEDULES.values(), ids=SCHEDULES)
def test_schedules(module, make, said):
    module.optimizer, module.lr_scheduler = partial(optim.SGD, lr=0.1), make
    with pytest.raises(ValueError, match=said):
        module.check_training(10)


GOOD = [
    (partial(optim.AdamW, lr=0.0), None),
    (partial(optim.AdamW, lr=1e30), WarmupCosine),
    (optim.Adagrad, partial(lr_scheduler.StepLR, step_size=2)),
    (optim.Adafactor, partial(lr_scheduler.OneCycleLR, max_lr=0.1, total_steps=10, cycle_momentum=False)),
    (partial(optim.SGD, lr=torch.tensor(0.1)), partial(lr_scheduler.ExponentialLR, gamma=0.9)),
]


@pytest.mark.parametrize(("make", "schedule"), GOOD)
def test_what_works_is_left_alone(module, make, schedule):
    module.optimizer, module.lr_scheduler = make, schedule
    before = {name: part.clone() for name, part in module.state_dict().items()}
    module.check_training(10)
    assert all(torch.equal(part, before[name]) for name, part in module.state_dict().items())
