"""FLOPs of training against torch's own counter, and against values by hand."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from lskip.callbacks import EarlyExitLoss, LayerDropout
from lskip.curricula import AllExits, Rotational
from lskip.flops import Work, known_peak
from lskip.low_rank import LowRank
from lskip.models.families import FAMILIES
from lskip.module import LayerSkipModule
from lskip.planning.run_average import MOST_STEPS, average_run, steps_of
from lskip.planning.simulation import Batch
from lskip.schedules import Constant, Linear
from lskip.targets import SelfDistillation
from tests.conftest import make_config, make_model

ROWS, LENGTH, LAYERS = 2, 12, 4
SIZES = {
    "gpt2": {"n_embd": 32, "n_head": 4, "n_layer": 4, "n_positions": 64, "n_inner": 64},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 16},
}


def counted(module: LayerSkipModule) -> tuple[float, float]:
    """Return the FLOPs of a step by this module's account, and by torch's counter."""
    ids = torch.randint(0, 300, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))
    flops, module.work = module.training_flops(), Work()
    # It does not know the product in place that sums the head's gradient.
    in_place = {torch.ops.aten.addmm_: lambda total, a, b, **_: 2 * a[0] * a[1] * b[1]}
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        loss, _ = module.early_exit_loss({"input_ids": ids}, 0)
        loss.backward()
    return sum(flops.of(module.work).values()), counter.get_total_flops()


def small(family: str = "llama", **settings):
    """Return a tiny model whose attention is of plain products, which the counter sees."""
    config = AutoConfig.for_model(**make_config(family, **SIZES.get(family, {}), **settings))
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_of_every_family_is_what_torch_counts(family):
    module = LayerSkipModule(small(family))
    module.exit_weights.values = [0.0, 0.25, 0.25, 0.5]
    ours, theirs = counted(module)
    assert ours == theirs


@pytest.mark.parametrize(
    ("settings", "share"),
    [
        ({"exit_heads": True}, 0.0),
        ({"exit_target": SelfDistillation()}, 0.0),
        ({"anchor_weight": 0.5}, 0.0),
        ({"position_share": 0.25}, 0.0),
        ({"low_rank": LowRank(exit_layer=2, rank=4)}, 0.03),  # the first block's input has no gradient
    ],
    ids=["exit heads", "distillation", "anchor", "sampled", "LoRA"],
)
def test_what_a_setting_costs_is_what_torch_counts(settings, share):
    module = LayerSkipModule(small(), **settings)
    module.exit_weights.values = [0.0, 0.25, 0.25, 0.5]
    ours, theirs = counted(module)
    assert ours == pytest.approx(theirs, rel=share)


@pytest.mark.parametrize("heads", [False, True])
def test_the_exit_classifier_looks_at_the_logits_once_more(heads):
    """By hand, since torch's counter fails in a call without gradients."""
    plain, asked = (
        LayerSkipModule(small(), exit_heads=heads, learned_exit=on).training_flops() for on in (False, True)
    )
    assert asked.early_row - plain.early_row == 2 * (HEAD + heads * WIDTH**2)
    assert asked.last_row == plain.last_row


def test_dropped_sequences_are_not_counted():
    module = LayerSkipModule(small())
    module.drop_rates.values = [0.0, 0.5, 1.0, 0.5]
    ours, theirs = counted(module)
    full = counted(LayerSkipModule(small()))[0]
    assert ours == theirs < full


def test_checkpointing_is_no_work_of_the_model():
    plain, again = (LayerSkipModule(small(), gradient_checkpointing=on) for on in (False, True))
    assert counted(plain)[0] == counted(again)[0] < counted(again)[1]


# A Llama of 4 blocks by hand: matrices of a block, and the head, in weights.
WIDTH, INNER, VOCABULARY, PAIRS = 32, 64, 300, 2
BLOCK = 2 * WIDTH * WIDTH + 2 * WIDTH * PAIRS * 8 + 3 * WIDTH * INNER
HEAD = VOCABULARY * WIDTH


@pytest.mark.parametrize(
    ("p_max", "depth", "mean_rates"), [(0.2, Constant, [0.2] * 4), (0.6, Linear, [0, 0.2, 0.4, 0.6])]
)
def test_a_run_with_dropout_and_a_rotating_curriculum_by_hand(p_max, depth, mean_rates):
    """Red where the mean is not over the run's steps, or an exit counts at steps at which it is off."""
    module = LayerSkipModule(make_model())
    dropout, exits = LayerDropout(p_max, depth(), time=Linear()), EarlyExitLoss(0.2, Rotational(2))
    average = average_run(module, [dropout, exits], Batch(ROWS, LENGTH), 9)
    mean_rates = [rate / 2 for rate in mean_rates]  # S(t) rises from 0 to 1
    assert average.drop_rates == pytest.approx(mean_rates)
    # Block b is on at even steps where b is even: exits 1 and 3 (e(0) = 0: never), 2; the last always.
    assert average.exits_on == pytest.approx([0, 4 / 9, 5 / 9, 1])
    found = module.training_flops().of(average.work)
    tokens, kept = ROWS * LENGTH, sum(1 - rate for rate in mean_rates)
    assert found["blocks"] == pytest.approx(6 * BLOCK * tokens * kept)
    assert found["attention"] == pytest.approx(12 * WIDTH * LENGTH * tokens * kept)
    assert found["exits"] == pytest.approx(6 * HEAD * ROWS * (LENGTH - 1) * 2)
    assert sum(weight > 0 for weight in average.largest_exit_weights) == 2
    assert average.kept_share == 1  # at the first step nothing is dropped


def test_sampled_exits_and_the_largest_step():
    module = LayerSkipModule(make_model(), position_share=0.25)
    exits = EarlyExitLoss(0.2, AllExits())
    average = average_run(module, [LayerDropout(0.5, Constant()), exits], Batch(64, 9), None)
    assert average.work.last_rows == pytest.approx(64 * 8)
    assert average.work.early_rows == pytest.approx(2 * 64 * 8 / 4)
    assert average.kept_share == pytest.approx(0.5 + 3 * 0.5 / 16)


def test_a_long_run_is_looked_at_in_steps_of_no_period():
    steps = list(steps_of(100_000))
    assert len(steps) == MOST_STEPS and steps == sorted(set(steps)) and steps[-1] < 100_000
    for period in (7, 24, 25):
        on = sum(step % period == 0 for step in steps) / len(steps)
        assert on == pytest.approx(1 / period, abs=0.02)


@pytest.mark.parametrize(
    ("name", "precision", "expected"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16-mixed", 989e12),
        ("NVIDIA H100 PCIe", "bf16-true", 756e12),
        ("NVIDIA A100-SXM4-80GB", "16-mixed", 312e12),
        ("NVIDIA L40", "bf16-mixed", None),
        ("NVIDIA H100 80GB HBM3", "32-true", None),
    ],
)
def test_peaks_of_devices(name, precision, expected):
    assert known_peak(name, precision) == expected
