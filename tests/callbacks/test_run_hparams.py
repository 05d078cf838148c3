"""RunHparams, read as TensorBoard's own HPARAMS tab reads it."""

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import metadata
from torch.utils.data import DataLoader

from lskip.callbacks import LayerMetrics, RunHparams
from lskip.module import LayerSkipModule

SETTINGS = {"early_exit_loss.curriculum": "Gradual", "layer_dropout.p_max": 0.5, "trainer.max_steps": 4}


def random_ids(seed):
    return torch.randint(0, 300, (2, 16), generator=torch.Generator().manual_seed(seed))


def train(folder, model, val_loader):
    trainer = Trainer(
        callbacks=[LayerMetrics(), RunHparams(SETTINGS)],
        logger=TensorBoardLogger(folder, name="", version=""),
        accelerator="cpu",
        max_steps=4,
        val_check_interval=2,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    batches = DataLoader([{"input_ids": random_ids(seed)} for seed in range(4)], batch_size=None)
    trainer.fit(LayerSkipModule(model), batches, val_loader)
    return EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()


def plugin_data(events, tag):
    return events.SummaryMetadata(tag).plugin_data.content


def test_settings_and_final_numbers_of_every_layer(tmp_path, tiny_model):
    events = train(tmp_path, tiny_model(), DataLoader([{"input_ids": random_ids(9)}], batch_size=None))
    start = metadata.parse_session_start_info_plugin_data(plugin_data(events, metadata.SESSION_START_INFO_TAG))
    found = {name: getattr(value, value.WhichOneof("kind")) for name, value in start.hparams.items()}
    assert found == SETTINGS
    experiment = metadata.parse_experiment_plugin_data(plugin_data(events, metadata.EXPERIMENT_TAG))
    metrics = {info.name.tag for info in experiment.metric_infos}
    kinds = ("ppl", "agreement", "tokens_per_round_4", "tokens_per_round_8")
    expected = {f"val/{kind}/layer_0{layer}" for kind in kinds for layer in (1, 2, 3, 4)}
    assert metrics == {*expected, "val/loss", "val/layers_needed"}
    assert not any(tag.startswith("hparam") for tag in events.Tags()["scalars"])  # the curves have the numbers
    assert all(len(events.Scalars(tag)) == 2 for tag in metrics)
    first = [info.name for info in experiment.hparam_infos if info.differs]
    assert first == ["early_exit_loss.curriculum", "layer_dropout.p_max"]  # of SETTINGS, what a column is for


def test_without_validation_there_are_settings_alone(tmp_path, tiny_model):
    events = train(tmp_path, tiny_model(), None)
    assert plugin_data(events, metadata.SESSION_START_INFO_TAG)
    assert not any(tag.startswith("hparam/") for tag in events.Tags()["scalars"])
