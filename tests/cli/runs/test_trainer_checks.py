"""Numbers of the Trainer that mean no training, by the field's full name; and numbers that nothing measures."""

import math
from datetime import timedelta

import pytest
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import BatchSizeFinder, EarlyStopping, LearningRateFinder, ModelCheckpoint

from lskip.callbacks import LayerMetrics
from lskip.cli.runs.trainer_checks import check_callbacks, check_monitors, check_trainer, settings_named
from lskip.module import LayerSkipModule

KIND = "B20 B40 told before anything is read"

REFUSED = {
    "B40 max_steps": {"max_steps": 0},
    "max_steps -2": {"max_steps": -2},
    "B40 max_epochs": {"max_epochs": 0},
    "B40 limit_train_batches": {"limit_train_batches": 0},
    "limit_train_batches 0.0": {"limit_train_batches": 0.0},
    "limit_train_batches -1": {"limit_train_batches": -1},
    "limit_train_batches 1.5": {"limit_train_batches": 1.5},
    "limit_val_batches": {"limit_val_batches": -0.5},
    "B40 gradient_clip_val": {"gradient_clip_val": -1},
    "gradient_clip_val nan": {"gradient_clip_val": math.nan},
    "gradient_clip_val -inf": {"gradient_clip_val": -math.inf},
    "gradient_clip_algorithm": {"gradient_clip_algorithm": "median"},
    "B40 log_every_n_steps": {"log_every_n_steps": -1},
    "B20 accumulate_grad_batches": {"accumulate_grad_batches": 0},
    "accumulate_grad_batches -3": {"accumulate_grad_batches": -3},
    "val_check_interval 0": {"val_check_interval": 0},
    "val_check_interval 1.5": {"val_check_interval": 1.5},
    "check_val_every_n_epoch": {"check_val_every_n_epoch": 0},
    "num_sanity_val_steps": {"num_sanity_val_steps": -2},
    "num_nodes": {"num_nodes": 0},
    "devices 0": {"devices": "0"},
    "devices -3": {"devices": -3},
    "devices, a word": {"devices": "some"},
    "devices, none": {"devices": []},
    "max_time": {"max_time": "00:00:00:00"},
    "max_time, a mapping": {"max_time": {"hours": 0}},
    "max_time, a unit": {"max_time": {"hors": 1}},
    "max_time, none": {"max_time": ""},
    "max_time, a word": {"max_time": "os.system"},
    "max_time, beyond": {"max_time": "9999999999:00:00:00"},
    "fast_dev_run": {"fast_dev_run": -1},
    "overfit_batches": {"overfit_batches": -1},
}


@pytest.mark.kind(KIND)
@pytest.mark.parametrize("settings", REFUSED.values(), ids=REFUSED)
def test_what_no_training_can_be_meant_by(settings):
    ((name, value),) = settings.items()
    with pytest.raises(ValueError) as refusal:
        check_trainer(settings)
    assert str(refusal.value).startswith(f"trainer.{name}: {value!r} is not ")


@pytest.mark.parametrize(
    ("settings", "begins"),
    [
        ({"accelerator": "gpu", "strategy": "auto"}, "trainer.accelerator: 'gpu': "),
        ({"accelerator": "cpu", "strategy": "ddpp"}, "trainer.strategy: 'ddpp': "),
        ({"accelerator": "cpu", "profiler": "fancy"}, "trainer.profiler: 'fancy': "),
        ({"accelerator": "cpu", "fast_dev_run": 2, "barebones": True}, "trainer: "),
    ],
)
def test_what_lightning_refuses_is_named(settings, begins, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    with pytest.raises(ValueError) as refusal, settings_named(settings):
        Trainer(**settings, logger=False)
    assert str(refusal.value).startswith(begins)


@pytest.mark.parametrize("finder", [BatchSizeFinder, LearningRateFinder])
def test_callbacks_that_cannot_work_are_refused(finder):
    trainer = Trainer(accelerator="cpu", callbacks=[finder()], logger=False, enable_checkpointing=False)
    with pytest.raises(ValueError, match=rf"^trainer\.callbacks: {finder.__name__} "):
        check_callbacks(trainer, None)


def test_a_fault_keeps_its_kind():
    with pytest.raises(KeyError), settings_named({"accelerator": "cpu"}):
        raise KeyError("planted")


def test_what_can_be_passes():
    check_trainer(
        {
            **{"max_steps": -1, "max_epochs": None, "limit_train_batches": 1.0, "limit_val_batches": 0},
            **{"gradient_clip_val": 0.0, "log_every_n_steps": 0, "val_check_interval": "00:01:00:00"},
            **{"num_sanity_val_steps": -1, "devices": "auto", "max_time": "00:00:00:01", "fast_dev_run": False},
        }
    )
    for devices in (1, "2", -1, [0, 2], "0,1"):
        check_trainer({"devices": devices, "fast_dev_run": 3, "val_check_interval": 0.25})
    for time in ("00:01:00:00", {"hours": 1}, timedelta(minutes=1)):
        check_trainer({"max_time": time, "gradient_clip_val": math.inf})


class Own(Callback):
    """Logs what only its author knows."""


WATCHED = {
    "F31 nothing is validated": (EarlyStopping("val/loss"), {"limit_val_batches": 0}, "limit_val_batches is 0"),
    "misspelled": (EarlyStopping("val_loss"), {}, "there are only train/loss, "),
    "F65 ModelCheckpoint": (ModelCheckpoint(monitor="valid/loss"), {}, "there are only train/loss, "),
    "of the test split": (ModelCheckpoint(monitor="test/loss"), {}, "there are only train/loss, "),
    "a layer too many": (EarlyStopping("val/ppl/layer_09"), {}, "val/ppl/layer_01 … val/tokens_per_round_8/layer_04"),
}


@pytest.fixture
def checked(tiny_model, tmp_path):
    def call(*callbacks, **settings) -> None:
        quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary"), False)
        trainer = Trainer(accelerator="cpu", callbacks=[*callbacks, LayerMetrics()], **quiet, **settings)
        check_monitors(trainer, LayerSkipModule(tiny_model()))

    return call


@pytest.mark.kind("K18 messages that point elsewhere")
@pytest.mark.parametrize(("callback", "settings", "said"), WATCHED.values(), ids=WATCHED)
def test_what_nothing_measures_is_not_watched(checked, callback, settings, said):
    with pytest.raises(ValueError, match=f"trainer.callbacks: {type(callback).__name__} watches .*{said}"):
        checked(callback, **settings)


def test_what_is_measured_is(checked):
    checked(
        EarlyStopping("val/loss"),
        ModelCheckpoint(monitor="val/tokens_per_round_4/layer_02"),
        EarlyStopping("train/loss"),
    )
    checked(EarlyStopping("mine"), Own())
