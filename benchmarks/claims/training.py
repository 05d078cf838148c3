"""One training run of the claims benchmark, which ends with a file result.json."""

from __future__ import annotations

import math
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from lightning.pytorch import Callback, Trainer, seed_everything

from benchmarks.claims.arms import TARGETS, Arm, Sizes
from lskip.callbacks import LayerMetrics, RunCheckpoint
from lskip.data import TextData
from lskip.module import LayerSkipModule
from lskip.optimization import WarmupCosine
from lskip.training.lightning_utils import quiet_lightning
from lskip.utils.output_files import write_json


def make_data(sizes: Sizes, seed: int, cache_dir: str | None) -> TextData:
    """The seed decides the training order alone."""
    return TextData(
        source=sizes.source,
        vocab_size=sizes.vocabulary,
        block_size=sizes.block_size,
        batch_size=sizes.batch_size,
        max_val_blocks=sizes.max_val_blocks,
        seed=seed,
        documents="joined",  # as its figures were measured
        cache_dir=cache_dir,
    )


class Readings(Callback):
    """Loss, agreement and tokens per round of every layer at each validation; the model at some of them.

    They are kept over interruptions.

    Args:
        metrics: whose report is kept; must come before this one.
        folder: where the model goes, as at_<step>.
        snapshots: steps at which it is kept.
    """

    def __init__(self, metrics: LayerMetrics, folder: Path, snapshots: tuple[int, ...]):
        self.metrics, self.folder, self.snapshots = metrics, folder, snapshots
        self.rows: list[dict] = []
        self.seconds = 0.0

    def on_train_start(self, trainer, pl_module) -> None:
        self._since = time.perf_counter()

    def on_validation_end(self, trainer, pl_module) -> None:
        report, step = self.metrics.report, trainer.global_step
        loss = [math.log(perplexity) for perplexity in report.perplexity]
        self.rows = [row for row in self.rows if row["step"] < step]  # a resumed run may validate again
        row = {"step": step, "loss": loss, "agreement": report.agreement}
        self.rows.append({**row, "tokens_per_round": {str(d): all_ for d, all_ in report.tokens_per_round.items()}})
        if step in self.snapshots:
            pl_module.model.save_pretrained(self.folder / f"at_{step}")
            pl_module.tokenizer.save_pretrained(self.folder / f"at_{step}")

    def state_dict(self) -> dict:
        now = time.perf_counter()
        self.seconds, self._since = self.seconds + now - self._since, now
        return {"rows": self.rows, "seconds": self.seconds}

    def load_state_dict(self, state: dict) -> None:
        self.rows, self.seconds = state["rows"], state["seconds"]


def train(
    folder: Path,
    arm: Arm,
    sizes: Sizes,
    seed: int,
    cache_dir: str | None,
    steps: int,
    source: Path | None = None,
    readings: int = 1,
    snapshots: tuple[int, ...] = (),
) -> None:
    """Train and write result.json, unless it exists; an interrupted run resumes from last.ckpt.

    Args:
        source: a folder to retrofit; None: from scratch.
        readings: validations in the run, the last at its end.
    """
    if (folder / "result.json").is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    quiet_lightning()
    seed_everything(seed, verbose=False)
    # Never at the step of a reading, which comes after the checkpoint and would be missing from it. (The two meet at
    # interval * (interval + 1), which is beyond the run while readings are no more than the steps between two.)
    metrics, checkpoint = LayerMetrics(), RunCheckpoint(folder, every_n_train_steps=steps // readings + 1)
    kept = Readings(metrics, folder, snapshots)
    trainer = Trainer(
        max_steps=steps,
        callbacks=[*arm.callbacks(), metrics, kept, checkpoint],
        accelerator="cpu",
        gradient_clip_val=1.0,
        val_check_interval=steps // readings,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    module, resumed = make_module(arm, sizes, seed, source), checkpoint.path.is_file()
    data = make_data(sizes, seed, cache_dir)
    trainer.fit(module, datamodule=data, ckpt_path=str(checkpoint.path) if resumed else None)
    if trainer.global_step < steps:
        raise KeyboardInterrupt
    result = {"arm": asdict(arm), "seed": seed, "steps": steps, "seconds": kept.seconds, "readings": kept.rows}
    write_json(folder / "result.json", result)
    checkpoint.path.unlink()


def make_module(arm: Arm, sizes: Sizes, seed: int, source: Path | None) -> LayerSkipModule:
    rate = sizes.learning_rate if source is None else sizes.retrofit_learning_rate
    return LayerSkipModule(
        sizes.model_config() if source is None else str(source),
        optimizer=partial(torch.optim.AdamW, lr=rate, betas=(0.9, 0.95), weight_decay=0.1),
        lr_scheduler=partial(WarmupCosine, warmup_steps=sizes.warmup_steps),
        exit_target=TARGETS[arm.target](),
        seed=seed,
    )
