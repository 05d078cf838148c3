"""Curves of training in TensorBoard, against an optimizer watched from outside."""

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import DataLoader

from lskip.callbacks import LayerMetrics, RunHparams
from lskip.cli.runs.run_logger import RunLogger
from lskip.module import LayerSkipModule

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
