"""Curves of training in TensorBoard, against an optimizer watched from outside."""

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import DataLoader

from lskip.callbacks import EarlyExitLoss, LayerDropout, LayerMetrics, RunHparams
from lskip.cli.runs.run_logger import RunLogger
from lskip.data.loading import ResumableLoader
from lskip.flops import Work
from lskip.layer_dropout import draw_dropped
from lskip.module import LayerSkipModule
from lskip.schedules import Constant
from lskip.training import training_log

KIND = "M a new user's first hour"


class Watch(Callback):
    """The rate that each step was made with, and the gradient's norm before clipping."""

    def __init__(self):
        self.rates, self.norms = [], []

    def on_before_optimizer_step(self, trainer, module, optimizer):
        self.rates.append(optimizer.param_groups[0]["lr"])
        squares = [(parameter.grad.double() ** 2).sum() for parameter in module.parameters()]
        self.norms.append(torch.stack(squares).sum().sqrt().item())


@pytest.mark.kind(KIND)
@pytest.mark.parametrize(
    "settings",
    [{}, {"gradient_clip_val": 0.01}, {"accumulate_grad_batches": 2}, {"precision": "bf16-mixed"}],
    ids=["M5 plain", "clipped", "accumulated", "bf16"],
)
def test_rate_and_gradient_of_the_logged_steps(tiny_model, tmp_path, settings):
    watch, draw = Watch(), torch.Generator().manual_seed(0)
    ids = [{"input_ids": torch.randint(0, 300, (2, 12), generator=draw)} for _ in range(16)]
    trainer = Trainer(
        callbacks=[watch, LayerMetrics(), RunHparams({"data": "x"})],
        logger=RunLogger(tmp_path, name="", version=""),
        log_every_n_steps=2,
        max_steps=6,
        val_check_interval=4,
        accelerator="cpu",
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **settings,
    )
    trainer.fit(LayerSkipModule(tiny_model()), DataLoader(ids, batch_size=None), DataLoader(ids[:1], batch_size=None))
    events = EventAccumulator(str(tmp_path)).Reload()
    rates, norms = (events.Scalars(f"train/{name}") for name in ("lr", "gradient_norm"))
    assert [event.step for event in rates] == [event.step for event in norms] == [2, 4, 6]
    assert [event.value for event in rates] == pytest.approx(watch.rates[1::2])
    assert [event.value for event in norms] == pytest.approx(watch.norms[1::2], rel=1e-4)
    # Nothing else stands before what was trained and validated.
    assert {tag.partition("/")[0] for tag in events.Tags()["scalars"]} == {"train", "val"}


class SlowValidation(Callback):
    """A validation that takes seconds by the clock of the log, which stands still otherwise but for a second a step."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(training_log.time, "perf_counter", lambda: self.now)

    def on_train_batch_start(self, *_):
        self.now += 1

    def on_validation_batch_end(self, *_):
        self.now += 100


def speeds(
    tmp_path, clock: SlowValidation, module: LayerSkipModule, batches: list[dict], *callbacks: Callback, kind=DataLoader
) -> EventAccumulator:
    """Return the curves of a training of four steps, logged every second one and validated after the third."""
    trainer = Trainer(
        callbacks=[clock, *callbacks],
        logger=RunLogger(tmp_path, name="", version=""),
        **{"log_every_n_steps": 2, "max_steps": 4, "val_check_interval": 3, "accelerator": "cpu"},
        **{"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False},
    )
    trainer.fit(module, kind(batches, batch_size=None), DataLoader([batches[0]], batch_size=None))
    return EventAccumulator(str(tmp_path)).Reload()


def of_two_steps(events: EventAccumulator, name: str) -> list[float]:
    return [event.value for event in events.Scalars(f"train/{name}")]


def test_speed_counts_no_padding_and_no_validation(tiny_model, tmp_path, monkeypatch):
    """Red where the rows' padding, or the 100 seconds of validation, are part of it."""
    ids, labels = torch.ones(2, 12, dtype=torch.long), torch.full((2, 12), -100)
    labels[0, 3:9] = labels[1, 2:5] = 1  # 9 and 5 tokens up to the last scored one
    batches = [{"input_ids": ids, "labels": labels}] * 8
    events = speeds(tmp_path, SlowValidation(monkeypatch), LayerSkipModule(tiny_model()), batches)
    assert of_two_steps(events, "tokens_per_second") == pytest.approx([14, 14])
    assert "train/mfu" not in events.Tags()["scalars"]  # on a CPU whose peak nobody gave


class SlowBatches(list):
    """Batches that each take three seconds to load, by the clock of a log."""

    clock: "SlowValidation"

    def __getitem__(self, index):
        self.clock.now += 3
        return super().__getitem__(index)


def test_the_share_of_time_that_goes_by_waiting_for_batches(tiny_model, tmp_path, monkeypatch):
    """Red where validation counts, or the time with a batch in hand does."""
    batches = SlowBatches([{"input_ids": torch.ones(2, 12, dtype=torch.long)}] * 8)
    batches.clock = SlowValidation(monkeypatch)
    events = speeds(tmp_path, batches.clock, LayerSkipModule(tiny_model()), batches, kind=ResumableLoader)
    assert of_two_steps(events, "waiting_for_data")[1] == pytest.approx(3 / 4)


def test_utilization_is_of_the_blocks_that_ran_and_the_exits_that_were_on(tiny_model, tmp_path, monkeypatch):
    module = LayerSkipModule(tiny_model(), seed=3, peak_flops=1e-6, exit_heads=True)
    batches = [{"input_ids": torch.ones(2, 12, dtype=torch.long)}] * 8
    dropout, exits = LayerDropout(0.5, Constant()), EarlyExitLoss(0.2)
    events = speeds(tmp_path, SlowValidation(monkeypatch), module, batches, dropout, exits)
    flops, expected = module.training_flops(), []
    for first in (0, 2):
        work = Work()
        for step in (first, first + 1):
            work.embed(2, 12)
            for block in range(4):
                work.run(block, 2 - int(draw_dropped(3, step, block, 2, 0.5).sum()), 12)
            weights = exits.exit_weights(step, 4, 4)
            for block, weight in enumerate(weights):
                if weight > 0:
                    work.decode(2 * 11, last=block == 3)
        expected.append(sum(flops.of(work).values()) / (2 * 1e6))
    assert of_two_steps(events, "mfu") == pytest.approx(expected, rel=1e-5)


def test_a_peak_that_is_none_is_refused():
    with pytest.raises(ValueError, match="peak_flops: 0 is not a number above 0"):
        LayerSkipModule("smollm2", peak_flops=0)
