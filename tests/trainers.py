"""Trainers that tests share: on the CPU, without bars, checkpoints and (unless asked for) a logger."""

import torch
from lightning.pytorch import Callback, Trainer
from torch.utils.data import DataLoader, IterableDataset

from lskip.module import LayerSkipModule

BATCH = {"input_ids": torch.arange(12)[None]}


def quiet_trainer(folder, *callbacks, **settings) -> Trainer:
    return Trainer(
        callbacks=list(callbacks),
        default_root_dir=folder,
        **{
            "accelerator": "cpu",
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            **settings,
        },
    )


class Vectors(Callback):
    """Records exit weights and drop rates at each micro-batch."""

    def __init__(self):
        self.weights, self.rates = [], []

    def on_before_backward(self, trainer, pl_module, loss):
        self.weights.append(pl_module.exit_weights.values)
        self.rates.append(pl_module.drop_rates.values)


class Stream(IterableDataset):
    """Four batches, a number that Lightning does not know."""

    def __iter__(self):
        return iter([BATCH] * 4)


def fit_vectors(folder, model, callback, data=None, **settings) -> Vectors:
    """Return the vectors of a fit on `data` (by default 8 batches)."""
    seen = Vectors()
    data = DataLoader([BATCH] * 8 if data is None else data, batch_size=None)
    quiet_trainer(folder, callback, seen, **settings).fit(LayerSkipModule(model), data)
    return seen
