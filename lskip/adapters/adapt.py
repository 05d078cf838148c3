"""`lskip adapt`: train an exit adapter for a frozen model on the model's own answers."""

import os
import shutil
import warnings
from pathlib import Path

import numpy as np
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lskip.adapters.answers import AnswerRow, frequent_words, is_held_out, read_answers
from lskip.adapters.join_fit import fit_join
from lskip.adapters.module import AdapterModule, AveragedWeights, TimeBudget
from lskip.adapters.options import TARGETS, AdapterData, AdapterTraining
from lskip.adapters.record import record_answers
from lskip.adapters.states import AnswerData, StateCache
from lskip.adapters.unroll import draft_metrics
from lskip.callbacks.run_checkpoint import RunCheckpoint
from lskip.inference.loading import resolve_device
from lskip.inference.prompt_file import Prompt
from lskip.models.decoder import Decoder
from lskip.models.exit_adapter import (
    SHAPE_FILE,
    WEIGHTS_FILE,
    AdapterShape,
    ExitAdapter,
    check_shape,
    find_adapter,
    load_adapter,
)
from lskip.models.pretrained import load_model
from lskip.training.lightning_utils import how_to_go_on, interruptible, quiet_lightning
from lskip.training.step_bar import StepBar
from lskip.utils.checks import check_whole
from lskip.utils.console import say
from lskip.utils.interrupts import interrupt_explained
from lskip.utils.output_files import output_folder, write_json
from lskip.utils.user_paths import user_path

METRICS_FILE = "metrics.json"
CHECKPOINT = Path("training") / "last.ckpt"  # not the place of a run of `fit`, since an adapter is not a model
SAVED_DTYPE = torch.bfloat16
_KEPT = "; answers and states so far are kept: the same command goes on"


def adapt(
    output: str,
    data: AdapterData,
    training: AdapterTraining,
    model: str = "smollm2",
    exit_layer: int = 3,
    num_blocks: int = 1,
    joins_last_state: bool = True,
    vocabulary: int | None = 8192,
    device: str = "auto",
    start: str | None = None,
    resume: bool = False,
) -> None:
    """Train an exit adapter, with which an early exit of a frozen model drafts the tokens of its last layer.

    The model answers the prompts, and its states on each answer are kept on disk, so that a training step runs the
    adapter alone. 3 % of the prompts are held out; the adapter is measured on those of their answers that are greedy.
    `output` gets adapter.json and adapter.safetensors (after every validation, too) and in the end metrics.json; logs
    and the checkpoint to resume from are in subfolders.

    Args:
        output: folder for the adapter; it must not exist yet, or be empty.
        data: what it is trained on.
        training: how it is trained.
        model: a run folder, a checkpoint, a folder, a hub name, a .gguf file, smollm2.
        exit_layer: blocks of the model that run before the adapter.
        num_blocks: blocks of the adapter, at first copies of the model's last ones.
        joins_last_state: the adapter also gets the last layer's state of the previous token, or its own if drafted.
        vocabulary: number of tokens that the adapter predicts, the most frequent ones of the answers; null: all.
        device: cpu, cuda …; auto takes a GPU where there is one.
        start: folder of an adapter of the same shape whose weights are trained further (smollm2: the one that comes
            with lskip). null: the adapter begins as a copy of the model's last blocks, with a join fitted to them.
        resume: go on with the training that `output` holds, with the same arguments.

    Raises:
        ValueError: an argument out of its range, a non-empty `output`, or too few answers.
        FileNotFoundError: no such model, prompts or answers, or nothing to resume.
    """
    shape = AdapterShape(exit_layer, num_blocks, joins_last_state)
    if vocabulary is not None:
        check_whole("vocabulary", vocabulary, 16)
    _check_lengths(training, data.block_size)
    place, folder, prompts = resolve_device(device), user_path(output, "output"), data.read_prompts()
    _check_files(folder, start, resume)
    if prompts is not None:
        _check_enough([is_held_out(prompt.content) for prompt in prompts], training.batch_size)
    with output_folder(folder):
        _adapt(
            folder,
            prompts,
            data=data,
            training=training,
            source=model,
            shape=shape,
            vocabulary=vocabulary,
            place=place,
            start=start,
            resume=resume,
        )


def _adapt(
    folder: Path,
    prompts: list[Prompt] | None,
    *,
    data: AdapterData,
    training: AdapterTraining,
    source: str,
    shape: AdapterShape,
    vocabulary: int | None,
    place: torch.device,
    start: str | None,
    resume: bool,
) -> None:
    """Train and save the adapter; arguments are checked and `folder` is locked."""
    frozen, tokenizer = _load(source, shape, data.block_size)
    _move(frozen, place, torch.float32 if training.precision == "32-true" else torch.bfloat16)
    started = None if start is None else load_adapter(find_adapter(start), frozen, shape)
    with StateCache(frozen, shape.exit_layer, data.cache) as cache, interrupt_explained(_KEPT):
        if prompts is None:
            rows = read_answers(data.answer_files, frozen, tokenizer, data.block_size, data.chat)
        else:
            limits = {"block_size": data.block_size, "max_new_tokens": data.max_new_tokens}
            answering = {"batch_size": data.answers_at_once, "chat": data.chat}
            rows = record_answers(cache, frozen, tokenizer, prompts, **limits, **answering)
        _check_enough([row.held_out for row in rows], training.batch_size)
        adapter = _adapter(frozen, tokenizer, rows, shape, vocabulary, started)
        states = cache.states(rows)
    if start is None and not resume:
        fit_join(adapter, frozen, [row for row in rows if not row.held_out])
    batches = AnswerData(*states, training.batch_size, training.val_answers, training.seed)
    del frozen, started  # frees their memory: from here on only the adapter runs
    chosen = {name: getattr(training, name) for name in ("unroll", "decay", "unroll_every", "lr", "warmup_steps")}
    module = AdapterModule(adapter, **chosen, target=TARGETS[training.target]())
    timer = TimeBudget(training.max_minutes)
    trainer = _trainer(folder, training, timer, place, resume)
    with interruptible(trainer, lambda: how_to_go_on(trainer, folder / CHECKPOINT, "--resume true")):
        trainer.fit(module, datamodule=batches, ckpt_path=folder / CHECKPOINT if resume else None, weights_only=True)
    module.to(place)  # Lightning has moved it to the CPU
    spent = {"steps": trainer.global_step, "seconds": round(timer.time_elapsed(), 1)}
    _finish(folder, module, {**_measure(module, batches), **spent})


def _check_lengths(training: AdapterTraining, block_size: int) -> None:
    """Raise ValueError unless draft steps fit into a row of block_size tokens."""
    for name in ("unroll", "unroll_every"):
        if getattr(training, name) >= block_size:
            raise ValueError(f"{name}: {getattr(training, name)} is not below block_size, {block_size}")


def _check_files(folder: Path, start: str | None, resume: bool) -> None:
    if start is not None:
        find_adapter(start, "start")
    if resume and not (folder / CHECKPOINT).is_file():
        raise FileNotFoundError(f"resume: there is no file '{folder / CHECKPOINT}'")
    if not resume and (folder.is_file() or (folder.is_dir() and any(folder.iterdir()))):
        advice = "go on with it by --resume true, or name another"
        raise ValueError(f"output: '{folder}' exists and is not an empty folder; {advice}")


def _load(source: str, shape: AdapterShape, block_size: int) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    model, tokenizer = load_model(source)
    decoder = Decoder(model.requires_grad_(False))
    if tokenizer is None:
        raise ValueError(f"model: {source!r} has no tokenizer")
    check_shape(shape, decoder.num_layers)
    if block_size > decoder.context_length:
        raise ValueError(f"block_size: {block_size} tokens, the model's context holds {decoder.context_length}")
    return model, tokenizer


def _check_enough(held_out: list[bool], batch_size: int) -> None:
    """Raise ValueError if the answers to train on do not fill a batch."""
    num = len(held_out) - sum(held_out)
    if num < batch_size:
        raise ValueError(f"batch_size: {batch_size}, but there are only {num} answers to train on")


def _adapter(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[AnswerRow],
    shape: AdapterShape,
    vocabulary: int | None,
    started: ExitAdapter | None,
) -> ExitAdapter:
    """Return a new adapter in float32, with the weights of `started` if that is given."""
    words = None if vocabulary is None else frequent_words(rows, vocabulary, model, tokenizer)
    adapter = ExitAdapter(model, shape, words)
    if started is not None:
        adapter.take_weights(started)
    return adapter.float().eval()  # without dropout, so that runs and resumed runs are reproducible


def _move(model: PreTrainedModel, place: torch.device, dtype: torch.dtype) -> None:
    """Move the model in place; only parameters change type, since `to` would round rotary frequencies too."""
    model.to(place)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)


class SavedAdapter(Callback):
    """A callback that saves the adapter after every validation; before AveragedWeights, so the average is saved."""

    def __init__(self, folder: Path):
        self.folder = folder

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: AdapterModule) -> None:
        save_atomically(pl_module.adapter, self.folder)


def save_atomically(adapter: ExitAdapter, folder: Path) -> None:
    """Save the adapter so that `folder` never holds half a file or weights that are not finite.

    Raises:
        ValueError: the weights are not finite; the adapter saved before stays.
    """
    if not all(part.to(SAVED_DTYPE).isfinite().all() for part in adapter.trained_parameters()):
        raise ValueError(f"lr: training made weights NaN or infinite; '{folder}' keeps what was saved before")
    partial = folder / ".partial"
    adapter.save(partial, SAVED_DTYPE)
    for name in (WEIGHTS_FILE, SHAPE_FILE):
        os.replace(partial / name, folder / name)
    shutil.rmtree(partial)


def _trainer(folder: Path, training: AdapterTraining, timer: TimeBudget, place: torch.device, resume: bool) -> Trainer:
    quiet_lightning()
    warnings.filterwarnings("ignore", ".*in eval mode at the start of training.*")  # intended, see _adapter
    checkpoint = RunCheckpoint(folder / CHECKPOINT.parent, training.checkpoint_every)
    callbacks = [timer, SavedAdapter(folder), checkpoint, StepBar()]
    if training.ema is not None:
        callbacks.append(AveragedWeights(training.ema, training.warmup_steps, place))
    # Hides what an interrupted run logged after its last checkpoint: those steps are logged again.
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
    except Exception as error:  # of zip, pickle …, depending on where the file is damaged
        raise ValueError(f"resume: '{path}' is not a readable checkpoint") from error


@torch.inference_mode()
def _measure(module: AdapterModule, data: AnswerData) -> dict:
    """Return the metrics on all held-out answers, computed in float32 with the weights rounded as they are saved."""
    for parameter in module.adapter.trained_parameters():
        parameter.copy_(parameter.to(SAVED_DTYPE))
    batches = tqdm(data.held_out_loader(), desc="held out", unit="batch")
    hits = [
        answer for batch in batches for answer in module.hits(module.transfer_batch_to_device(batch, module.device, 0))
    ]
    answered = data.held_out.answer_tokens()
    covered = np.isin(answered, module.adapter.token_ids.cpu().numpy()).mean()
    return {
        **draft_metrics(hits),
        "words": len(module.adapter.token_ids),
        "words_share_of_held_out_tokens": round(float(covered), 4),
        "answers": {"train": len(data.train), "held_out": len(hits)},
        "answer_tokens": {"train": len(data.train.answer_tokens()), "held_out": len(answered)},
        "tokens_seen": module.tokens_seen,
    }


def _finish(folder: Path, module: AdapterModule, metrics: dict) -> None:
    save_atomically(module.adapter, folder)
    write_json(folder / METRICS_FILE, metrics)
    steps = " / ".join("-" if value is None else f"{value:.3f}" for value in metrics["agreement"])
    rounds = ", ".join(f"{value:.2f} at d = {d}" for d, value in metrics["tokens_per_round"].items())
    print(f"draft_agreement {metrics['draft_agreement']:.3f} (by draft step: {steps})")
    print(f"tokens_per_round {rounds}, on {metrics['answers']['held_out']} held-out answers")
    say(f"adapter: {folder}")
