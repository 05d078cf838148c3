"""The last lines of `lskip fit`: the layers at the last validation, the run's folder, commands to go on with."""

import shlex
from pathlib import Path

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from rich.console import Console
from transformers import PreTrainedTokenizerBase

from lskip.callbacks import LayerMetrics
from lskip.evaluation.layers.figure import print_layers
from lskip.models.pretrained import is_run
from lskip.models.prompt_form import trained_ending
from lskip.utils.untrusted import printable


def print_end(trainer: Trainer, folder: Path) -> None:
    """Print the end of a finished run, in the process of rank 0 only."""
    if not trainer.is_global_zero:
        return
    metrics = next(each for each in trainer.callbacks if isinstance(each, LayerMetrics))
    if metrics.report is not None and "val/layers_needed" in trainer.callback_metrics:
        print_layers(metrics.report, Console(), "Layers at the last validation")
    steps = f"{trainer.global_step} step{'s' * (trainer.global_step != 1)}"
    if metrics.report is not None and 0 < metrics.step < trainer.global_step:
        steps += f", validated after step {metrics.step}"
    if trainer.fast_dev_run:
        print(f"run: {steps} of fast_dev_run, of which nothing is kept")
        return
    if not is_run(folder):  # trainer.enable_checkpointing: false
        print(f"run: {steps}, of which nothing is kept")
        return
    run = shlex.quote(printable(str(folder), keep=""))
    print(f"run: {steps}, in {run}")
    print(f"next: lskip generate --model {run} --prompt {_prompt_like(trainer.lightning_module.tokenizer)}")
    print(f"      lskip validate --model {run}")
    if any(isinstance(logger, TensorBoardLogger) for logger in trainer.loggers):
        print(f"      tensorboard --logdir {run}")


def _prompt_like(tokenizer: PreTrainedTokenizerBase | None) -> str:
    """Return a word of the shell that stands for a prompt as training had them."""
    ending = "" if tokenizer is None else trained_ending(tokenizer)
    if not ending:
        return '"…"'
    return f"$'…{ending.encode('unicode_escape').decode().replace(chr(39), chr(92) + chr(39))}'"
