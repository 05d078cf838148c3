"""Steps that are not finite: the step and batch in the message, the checkpoint that stays, and skipping."""

import math
from functools import partial

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers.logger import DummyLogger
from torch.utils.data import DataLoader

from lskip.callbacks import EarlyExitLoss, LayerMetrics, RunCheckpoint
from lskip.curricula import AllExits
from lskip.export.to_hf import export
from lskip.module import LayerSkipModule
from lskip.task_module import Classification, TaskModule
from lskip.utils.finite import all_finite

KIND = "K8 what is not finite"
SGD = partial(torch.optim.SGD, lr=0.1)
PLAIN = {"optimizer": SGD, "lr_scheduler": None}


def batches(count: int) -> DataLoader:
    draw = torch.Generator().manual_seed(3)
    ids = [{"input_ids": torch.randint(0, 300, (2, 12), generator=draw)} for _ in range(count)]
    return DataLoader(ids, batch_size=None)


class Spoil(Callback):
    """Makes what `training_step` gives not finite at a micro-batch (counted from 0)."""

    def __init__(self, at: set[int], how: str):
        self.at, self.how, self.step = at, how, None

    def on_fit_start(self, trainer, module):
        step = type(module).training_step

        def spoilt(batch, batch_idx):
            loss = step(module, batch, batch_idx)
            if trainer.fit_loop.epoch_loop.batch_progress.total.processed not in self.at:
                return loss
            weight = module.model.get_input_embeddings().weight
            return {
                "loss is NaN": loss * math.nan,
                "loss is infinite": loss * math.inf,
                # sqrt at 0: the loss is finite, its gradient is not
                "gradient alone": loss + (0 * weight).sum().abs().sqrt(),
            }[self.how]

        module.training_step = spoilt


def train(module, folder, *callbacks, count=8, every=1, **settings) -> Trainer:
    quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary"), False)
    trainer = Trainer(
        accelerator="cpu",
        max_steps=settings.pop("max_steps", 6),
        callbacks=[*callbacks, RunCheckpoint(folder, every)],
        default_root_dir=folder,
        **{**quiet, **settings},
    )
    trainer.fit(module, batches(count), batches(1))
    return trainer


def saved(folder) -> dict:
    return torch.load(folder / "last.ckpt", weights_only=True)


@pytest.mark.kind(KIND)
@pytest.mark.parametrize("how", ["loss is NaN", "loss is infinite", "gradient alone"])
@pytest.mark.parametrize(
    ("settings", "place"),
    [
        ({}, "step 4 .batch 4 "),
        ({"accumulate_grad_batches": 2, "max_steps": 4}, "step 2 .batch 4 "),
        ({"gradient_clip_val": 1.0}, "step 4 .batch 4 "),
        ({"precision": "bf16-mixed"}, "step 4 .batch 4 "),
        ({"log_every_n_steps": 0}, "step 4 .batch 4 "),
    ],
    ids=["B1 plain", "accumulated", "B1 clipped", "bf16", "never logged"],
)
def test_the_run_stops_and_the_checkpoint_before_stays(tiny_model, tmp_path, how, settings, place):
    with pytest.raises(ValueError, match=f"not_finite: in {place}"):
        train(LayerSkipModule(tiny_model(), **PLAIN), tmp_path, Spoil({3}, how), **settings)
    checkpoint = saved(tmp_path)
    assert checkpoint["global_step"] == (1 if "accumulate_grad_batches" in settings else 3)
    assert all_finite([checkpoint["state_dict"], checkpoint["optimizer_states"]])
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]


@pytest.mark.kind(KIND, "F25", "B40")
@pytest.mark.parametrize("every", [1, 200])
def test_a_rate_beyond_measure(tiny_model, tmp_path, every):
    module = LayerSkipModule(tiny_model(), optimizer=partial(torch.optim.AdamW, lr=1e30), lr_scheduler=None)
    with pytest.raises(ValueError, match=r"not_finite: in step 2 .batch 2 "):
        train(module, tmp_path, every=every)
    assert (tmp_path / "last.ckpt").exists() == (every == 1)
    if every == 1:
        assert saved(tmp_path)["global_step"] == 1 and all_finite(saved(tmp_path)["state_dict"])


@pytest.mark.kind(KIND)
@pytest.mark.parametrize("how", ["loss is NaN", "loss is infinite", "gradient alone"])
def test_a_skipped_step_changes_nothing(tiny_model, tmp_path, how):
    """As if the optimizer had not been called: momentum and decay included."""
    settings = {"optimizer": partial(torch.optim.AdamW, lr=0.01, weight_decay=0.5), "lr_scheduler": None}
    module = LayerSkipModule(tiny_model(), not_finite="skip", **settings)
    train(module, tmp_path / "skipping", Spoil({2, 3}, how))
    assert module.finite_steps.skipped == 2

    class LeaveOut(Callback):
        def on_before_optimizer_step(self, trainer, module, optimizer):
            if trainer.global_step in (2, 3):
                for parameter in module.parameters():
                    parameter.grad = None

    train(LayerSkipModule(tiny_model(), **settings), tmp_path / "leaving", LeaveOut())
    first, second = (saved(tmp_path / name)["state_dict"] for name in ("skipping", "leaving"))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.kind(KIND)
def test_skipping_drops_the_whole_accumulated_step_and_counts_it(tiny_model, tmp_path):
    class Kept(DummyLogger):
        values: dict = {}

        def log_metrics(self, metrics, step=None):
            self.values |= metrics

    module, logged = LayerSkipModule(tiny_model(), not_finite="skip", **PLAIN), Kept()
    more = {"accumulate_grad_batches": 2, "max_steps": 4, "log_every_n_steps": 1, "logger": logged}
    train(module, tmp_path, Spoil({2}, "loss is NaN"), **more)
    assert module.finite_steps.skipped == 1 and logged.values["train/skipped_steps"] == 1
    assert saved(tmp_path)["global_step"] == 4 and all_finite(saved(tmp_path)["state_dict"])


@pytest.mark.kind(KIND)
def test_a_run_that_only_skips_ends(tiny_model, tmp_path):
    module = LayerSkipModule(tiny_model(), not_finite="skip", **PLAIN)
    with pytest.raises(ValueError, match=r"not_finite: in step 20 .*as in the 19 steps before it"):
        train(module, tmp_path, Spoil(set(range(99)), "loss is NaN"), count=99, max_steps=99, every=200)


@pytest.mark.kind(KIND)
def test_an_optimizers_state_that_is_not_finite_is_not_saved(tiny_model, tmp_path):
    class BreakState(Callback):
        def on_train_batch_end(self, trainer, module, *batch):
            if trainer.global_step == 2:
                next(iter(trainer.optimizers[0].state.values()))["momentum_buffer"].fill_(math.inf)

    module = LayerSkipModule(tiny_model(), optimizer=partial(torch.optim.SGD, lr=1e-9, momentum=0.9), lr_scheduler=None)
    with pytest.raises(ValueError, match="after step 2 the optimizer's state is NaN or infinite"):
        train(module, tmp_path, BreakState())
    assert saved(tmp_path)["global_step"] == 1


def broken(model, value=math.nan):
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = value
    return model


@pytest.mark.kind(KIND)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_model_that_is_not_finite_is_refused(tiny_model, tmp_path, value):
    said = "model: its weights are not finite .*layers.1.mlp.up_proj.weight"
    with pytest.raises(ValueError, match=said):
        LayerSkipModule(broken(tiny_model(), value))
    with pytest.raises(ValueError, match=said):
        TaskModule(broken(tiny_model(), value), Classification(2))


@pytest.mark.kind(KIND, "F25")
def test_an_export_of_it_is_refused(tiny_model, tmp_path):
    broken(tiny_model()).save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="its weights are not finite"):
        export(str(tmp_path / "model"), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.kind(KIND)
@pytest.mark.parametrize("layer", [1, 4], ids=["one layer is NaN", "the last layer is NaN"])
def test_no_number_comes_of_nan(tiny_model, tmp_path, capsys, layer):
    """argmax of NaN is token 0 in every layer: they would all agree."""
    metrics, module = LayerMetrics(), LayerSkipModule(tiny_model())
    module.decoder.blocks[layer - 1].register_forward_hook(lambda block, args, out: spoilt_rows(out))
    quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary"), False)
    trainer = Trainer(accelerator="cpu", callbacks=[metrics], default_root_dir=tmp_path, **quiet)
    (logged,) = trainer.validate(module, batches(2), verbose=False)
    assert math.isnan(logged["val/layers_needed"]) and math.isnan(logged["val/agreement/layer_01"])
    for shown in range(layer, 5):
        assert math.isnan(logged[f"val/ppl/layer_0{shown}"]) and math.isnan(logged[f"val/agreement/layer_0{shown}"])
    assert layer == 1 or math.isfinite(logged["val/ppl/layer_01"])
    assert "layers_needed: nan of 4" in capsys.readouterr().out


def spoilt_rows(out):
    states = out[0] if isinstance(out, tuple) else out
    states[:, 5] = math.nan
    return out


@pytest.mark.kind(KIND)
def test_an_early_exit_alone_is_enough_to_stop(tiny_model, tmp_path):
    """The last layer's loss may be fine while another exit's is not."""
    module = LayerSkipModule(tiny_model(), exit_heads=True, **PLAIN)

    class Break(Callback):
        def on_train_batch_start(self, trainer, module, batch, index):
            if trainer.global_step == 2:
                module.exits.heads.maps[1].weight.data.fill_(math.inf)

    with pytest.raises(ValueError, match="not_finite: in step 3 "):
        train(module, tmp_path, EarlyExitLoss(1.0, AllExits()), Break())
    assert saved(tmp_path)["global_step"] == 2
