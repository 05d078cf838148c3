"""`lskip adapt`: an exit adapter for a model that stays as it is, trained on answers of its own."""

from __future__ import annotations

import os
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lskip.adapter_answers import AnswerRow, frequent_words, read_answers
from lskip.adapter_start import fit_join
from lskip.adapter_states import AnswerData, answer_states
from lskip.adapter_training import AdapterModule, AveragedWeights, TimeBudget, report
from lskip.callbacks.run_checkpoint import RunCheckpoint
from lskip.checks import check_real, check_whole
from lskip.decoder import Decoder
from lskip.exit_adapter import (
    SHAPE_FILE,
    WEIGHTS_FILE,
    AdapterShape,
    ExitAdapter,
    check_shape,
    find_adapter,
    load_adapter,
)
from lskip.inference.loading import resolve_device
from lskip.output_files import make_writable, write_json
from lskip.pretrained import load_model
from lskip.trainer_manners import interruptible, quiet_lightning

METRICS_FILE = "metrics.json"
CHECKPOINT = Path("training") / "last.ckpt"  # not where a run of `fit` has its own: an adapter is no model
DEFAULT_STEPS = 2000
SAVED_DTYPE = torch.bfloat16


@dataclass(frozen=True)
class AdapterTraining:
    """How an adapter is trained.

    Attributes:
        max_steps: optimizer steps, at most; null: 2000, or with max_minutes as many as go into them.
        max_minutes: ends training after so many minutes, validations included, and the learning rate's decay with
            it; two such runs are not the same to the bit. null: max_steps alone decides.
        batch_size: answers a step.
        lr: full learning rate of AdamW.
        warmup_steps: optimizer steps until the full rate.
        unroll: draft steps that it is trained on, each on what it made of the one before.
        decay: weight of a draft step in the loss, against the one before.
        unroll_every: draft steps after the first are trained on the drafts that begin at one position of so many.
        ema: what is kept is an average of the weights with this decay a step; null: the last weights.
        precision: of training; bf16-mixed computes the model's states in bfloat16 too, faster where the CPU can.
        val_every: optimizer steps between two validations.
        val_answers: held-out answers that a validation looks at; in the end it is all of them.
        checkpoint_every: optimizer steps between two checkpoints.
        seed: of the order of the answers.

    Raises:
        ValueError: a number out of its range.
    """

    max_steps: int | None = None
    max_minutes: float | None = None
    batch_size: int = 16
    lr: float = 1e-3
    warmup_steps: int = 50
    unroll: int = 3
    decay: float = 0.8
    unroll_every: int = 3
    ema: float | None = 0.995
    precision: Literal["32-true", "bf16-mixed"] = "32-true"
    val_every: int = 250
    val_answers: int = 64
    checkpoint_every: int = 100
    seed: int = 0

    def __post_init__(self):
        for name in ("batch_size", "unroll", "unroll_every", "val_every", "val_answers", "checkpoint_every"):
            check_whole(name, getattr(self, name), 1)
        for name in ("warmup_steps", "seed"):
            check_whole(name, getattr(self, name), 0)
        for name in ("lr", "decay"):
            check_real(name, getattr(self, name), "above 0", lambda value: value > 0)
        if self.max_steps is not None:
            check_whole("max_steps", self.max_steps, 1)
        if self.max_minutes is not None:
            check_real("max_minutes", self.max_minutes, "above 0", lambda value: value > 0)
        if self.ema is not None:
            check_real("ema", self.ema, "between 0 and 1", lambda value: 0 < value < 1)

    @property
    def steps(self) -> int:
        """-1: as many as there is time for."""
        return self.max_steps or (DEFAULT_STEPS if self.max_minutes is None else -1)


def adapt(
    answers: list[str],
    output: str,
    training: AdapterTraining,
    model: str = "smollm2",
    exit_layer: int = 3,
    num_blocks: int = 1,
    joins_last_state: bool = True,
    vocabulary: int | None = 8192,
    block_size: int = 256,
    chat: bool | None = None,
    device: str = "auto",
    cache_dir: str | None = None,
    start: str | None = None,
    resume: bool = False,
) -> None:
    """Train an exit adapter: with it the exit of a model that stays as it is drafts what its last layer says.

    The model's states on each answer are computed once and kept on disk, so that a training step runs the adapter
    alone. 3 % of the prompts are held out; of their answers those are measured on that the model writes greedily.
    `output` gets adapter.json and adapter.safetensors (after every validation, too) and in the end metrics.json; logs
    and the checkpoint to go on from lie in folders of it.

    Args:
        answers: list of .jsonl files that `lskip predict` wrote with this model.
        output: folder for the adapter; it must not exist yet, or be empty.
        training: how it is trained.
        model: a run folder, a checkpoint, a folder, a hub name, a .gguf file, smollm2.
        exit_layer: blocks of the model that run before the adapter.
        num_blocks: blocks of the adapter, at first copies of the model's last ones.
        joins_last_state: it also gets the last layer's state of the token before, on drafted tokens its own.
        vocabulary: it predicts so many tokens, the most frequent ones of the answers; null: all.
        block_size: tokens of a prompt with its answer; longer ones are cut.
        chat: whether `lskip predict` put plain prompts into the chat template, as it was told there; null: where the
            model has one.
        device: cpu, cuda …; auto takes a GPU where there is one.
        cache_dir: where the states are kept, for SmolLM2 2.3 KB a token, of each further exit_layer 1.2; null:
            ~/.cache/lskip.
        start: folder of an adapter of the same shape whose weights it begins with (smollm2: the one that comes with
            lskip), to train it further on other answers, or otherwise; its words are kept. null: it begins as a copy
            of the model's top, with a join that is fitted to it.
        resume: go on with the training that `output` holds, with the same arguments.

    Raises:
        ValueError: an argument out of its range, `output` holds something, answers that do not suffice.
        FileNotFoundError: no such model or answers, or nothing to resume.
    """
    shape = AdapterShape(exit_layer, num_blocks, joins_last_state)
    check_whole("block_size", block_size, 2)
    if vocabulary is not None:
        check_whole("vocabulary", vocabulary, 16)
    place, folder = resolve_device(device), Path(output)
    _check_files(folder, answers, start, resume)
    frozen, tokenizer = _load(model, shape, block_size)
    rows = _read(answers, frozen, tokenizer, block_size, chat, training.batch_size)
    adapter = _adapter(frozen, tokenizer, rows, shape, vocabulary, start)
    cache = Path(cache_dir or "~/.cache/lskip").expanduser() / "adapter_states"
    _move(frozen, place, torch.float32 if training.precision == "32-true" else torch.bfloat16)
    states = answer_states(frozen, rows, exit_layer, cache)
    if start is None and not resume:
        fit_join(adapter, frozen, [row for row in rows if not row.held_out])
    data = AnswerData(*states, training.batch_size, training.val_answers, training.seed)
    del frozen  # from here on only the adapter runs
    chosen = (getattr(training, name) for name in ("unroll", "decay", "unroll_every", "lr", "warmup_steps"))
    module = AdapterModule(adapter, *chosen)
    timer = TimeBudget(training.max_minutes)
    trainer = _trainer(folder, training, timer, place, resume)
    with interruptible(trainer, folder / CHECKPOINT, "--resume true"):
        trainer.fit(module, datamodule=data, ckpt_path=folder / CHECKPOINT if resume else None, weights_only=True)
    module.to(place)  # from where Lightning has taken it
    spent = {"steps": trainer.global_step, "seconds": round(timer.time_elapsed(), 1)}
    _finish(folder, module, {**_measure(module, data), **spent})


def _check_files(folder: Path, answers: list[str], start: str | None, resume: bool) -> None:
    if start is not None:
        find_adapter(start, "start")
    for path in answers:
        if not Path(path).is_file():
            raise FileNotFoundError(f"answers: there is no file '{path}'")
    if resume and not (folder / CHECKPOINT).is_file():
        raise FileNotFoundError(f"resume: there is no file '{folder / CHECKPOINT}'")
    if not resume and (folder.is_file() or (folder.is_dir() and any(folder.iterdir()))):
        advice = "go on with it by --resume true, or name another"
        raise ValueError(f"output: '{folder}' exists and is not an empty folder; {advice}")
    make_writable(folder)


def _load(source: str, shape: AdapterShape, block_size: int) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    model, tokenizer = load_model(source)
    decoder = Decoder(model.requires_grad_(False))
    if tokenizer is None:
        raise ValueError(f"model: {source!r} has no tokenizer")
    check_shape(shape, decoder.num_layers)
    if block_size > decoder.context_length:
        raise ValueError(f"block_size: {block_size} tokens, the model's context holds {decoder.context_length}")
    return model, tokenizer


def _read(
    answers: list[str],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    block_size: int,
    chat: bool | None,
    batch_size: int,
) -> list[AnswerRow]:
    """The answers; ValueError where they do not fill a batch."""
    rows = read_answers([Path(path) for path in answers], model, tokenizer, block_size, chat)
    num = sum(not row.held_out for row in rows)
    if num < batch_size:
        raise ValueError(f"batch_size: {batch_size}, but there are only {num} answers to train on")
    return rows


def _adapter(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[AnswerRow],
    shape: AdapterShape,
    vocabulary: int | None,
    start: str | None,
) -> ExitAdapter:
    """A new one, or the one in the folder `start`."""
    if start is None:
        words = None if vocabulary is None else frequent_words(rows, vocabulary, model, tokenizer)
        adapter = ExitAdapter(model, shape, words)
    else:
        adapter = load_adapter(find_adapter(start), model, shape)
    return adapter.eval()  # dropout would be the only thing that differs from run to run, or after resuming


def _move(model: PreTrainedModel, place: torch.device, dtype: torch.dtype) -> None:
    """In place. Its parameters alone change type: `to` would round rotary frequencies too."""
    model.to(place)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)


class SavedAdapter(Callback):
    """Saves the adapter after every validation: averaged, as it was validated, so it stands before AveragedWeights."""

    def __init__(self, folder: Path):
        self.folder = folder

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: AdapterModule) -> None:
        save_atomically(pl_module.adapter, self.folder)


def save_atomically(adapter: ExitAdapter, folder: Path) -> None:
    """`adapter.save`, but `folder` never holds half a file."""
    partial = folder / ".partial"
    adapter.save(partial, SAVED_DTYPE)
    for name in (WEIGHTS_FILE, SHAPE_FILE):
        os.replace(partial / name, folder / name)
    shutil.rmtree(partial)


def _trainer(folder: Path, training: AdapterTraining, timer: TimeBudget, place: torch.device, resume: bool) -> Trainer:
    quiet_lightning()
    warnings.filterwarnings("ignore", ".*in eval mode at the start of training.*")  # as it is meant to be
    callbacks = [timer, SavedAdapter(folder), RunCheckpoint(folder / CHECKPOINT.parent, training.checkpoint_every)]
    if training.ema is not None:
        callbacks.append(AveragedWeights(training.ema, training.warmup_steps, place))
    # What an interrupted run logged beyond its last checkpoint is hidden, since it is logged anew.
    purge = _steps_done(folder / CHECKPOINT) + 1 if resume else None
    return Trainer(
        accelerator="gpu" if place.type == "cuda" else place.type,
        devices=1 if place.index is None or place.type != "cuda" else [place.index],
        precision=training.precision,
        max_steps=training.steps,
        max_epochs=-1,
        val_check_interval=training.val_every,
        check_val_every_n_epoch=None,  # steps count on from one epoch to the next
        num_sanity_val_steps=0,
        log_every_n_steps=10,
        logger=TensorBoardLogger(folder, name="", version="logs", purge_step=purge),
        callbacks=callbacks,
        enable_model_summary=False,
        default_root_dir=folder,
    )


def _steps_done(path: Path) -> int:
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)["global_step"]
    except Exception as error:  # zip, pickle, end of file: it depends on where the file is damaged
        raise ValueError(f"resume: '{path}' is not a readable checkpoint") from error


@torch.inference_mode()
def _measure(module: AdapterModule, data: AnswerData) -> dict:
    """The report on all held-out answers, of the weights as they are saved, in float32."""
    for parameter in module.adapter.trained_parameters():
        parameter.copy_(parameter.to(SAVED_DTYPE))
    batches = tqdm(data.held_out_loader(), desc="held out", unit="batch")
    hits = [
        answer for batch in batches for answer in module.hits(module.transfer_batch_to_device(batch, module.device, 0))
    ]
    answered = data.held_out.answer_tokens()
    covered = np.isin(answered, module.adapter.token_ids.cpu().numpy()).mean()
    return {
        **report(hits),
        "words": len(module.adapter.token_ids),
        "words_share_of_held_out_tokens": round(float(covered), 4),
        "answers": {"train": len(data.train), "held_out": len(hits)},
        "answer_tokens": {"train": len(data.train.answer_tokens()), "held_out": len(answered)},
        "tokens_seen": module.tokens_seen,
    }


def _finish(folder: Path, module: AdapterModule, metrics: dict) -> None:
    save_atomically(module.adapter, folder)
    write_json(folder / METRICS_FILE, metrics)
    steps = " / ".join(f"{value:.3f}" for value in metrics["agreement"])
    rounds = ", ".join(f"{value:.2f} at d = {d}" for d, value in metrics["tokens_per_round"].items())
    print(f"draft_agreement {metrics['draft_agreement']:.3f} (by draft step: {steps})")
    print(f"tokens_per_round {rounds}, on {metrics['answers']['held_out']} held-out answers")
