"""Warm-up and cosine, against numbers worked by hand."""

import warnings
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from lskip.module import LayerSkipModule
from lskip.optimization import WarmupCosine
from tests.conftest import make_config


def rates(steps, **settings):
    """Return the learning rate at each optimizer step, as the optimizer sees it, from a full rate of 8."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=8.0)
    schedule = WarmupCosine(optimizer, **settings)
    seen = []
    for _ in range(steps):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return seen


def test_warm_up_then_cosine():
    # 3 steps of warm-up at 1/4, 2/4, 3/4; then 4 steps of a cosine from 1 to 0.5, held afterwards:
    # 0.5 + 0.5 (1 + cos(k pi / 4)) / 2 with cos(pi / 4) = 0.70710678.
    expected = [2, 4, 6, 8, 8 * 0.926776695, 8 * 0.75, 8 * 0.573223305, 4, 4]
    assert rates(9, warmup_steps=3, final=0.5, total_steps=7) == pytest.approx(expected, rel=1e-8)


def test_no_warm_up_starts_at_the_full_rate_and_an_unknown_length_stays_there():
    assert rates(2, warmup_steps=0, final=0.0, total_steps=2) == pytest.approx([8, 4])
    assert rates(5, warmup_steps=2) == pytest.approx([8 / 3, 16 / 3, 8, 8, 8])


def test_a_resumed_schedule_goes_on_and_stretches_with_a_longer_run():
    def schedule(total):
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=8.0)
        return optimizer, WarmupCosine(optimizer, warmup_steps=0, final=0.0, total_steps=total)

    optimizer, first = schedule(4)
    for _ in range(2):
        optimizer.step()
        first.step()
    optimizer, second = schedule(8)
    second.load_state_dict(first.state_dict())
    optimizer.step()
    second.step()  # step 3 of 8: (1 + cos(3 pi / 8)) / 2 = 0.691341716
    assert optimizer.param_groups[0]["lr"] == pytest.approx(8 * 0.691341716, rel=1e-8)


@pytest.mark.parametrize(
    ("settings", "said"),
    [({"warmup_steps": -1}, "warmup_steps: -1"), ({"final": 1.5}, "final: 1.5"), ({"final": -0.1}, "final: -0.1")],
)
def test_numbers_out_of_range_are_refused(settings, said):
    with pytest.raises(ValueError, match=said):
        rates(1, **settings)


@pytest.mark.parametrize(("warmup", "steps", "stages"), [(3, 4, 1), (3, 3, 1), (3, 7, 2), (3, 6, 2), (0, 1, 1)])
def test_a_warmup_that_is_longer_than_the_run_is_told(warmup, steps, stages):
    rate = 8.0
    module = LayerSkipModule(
        make_config(),
        optimizer=partial(torch.optim.SGD, lr=rate),
        lr_scheduler=partial(WarmupCosine, warmup_steps=warmup, stages=stages),
    )
    module.trainer = SimpleNamespace(estimated_stepping_batches=steps, fast_dev_run=False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        schedule = module.configure_optimizers()["lr_scheduler"]["scheduler"]
    highest = max(schedule.factor(step) for step in range(steps))
    told = [str(warning.message) for warning in caught if "warmup_steps" in str(warning.message)]
    assert [f"comes to {highest:.0%} of" in each for each in told] == [True] * (highest < 1)
