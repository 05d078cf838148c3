"""One option of benchmarks.memory.training in a separate process; the last line of its output is the record."""

from __future__ import annotations

import json
import resource
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from lightning.pytorch import Callback, Trainer
from safetensors.torch import save_file
from torch.utils.data import DataLoader

from benchmarks.command_line import command_parser
from benchmarks.memory.peak import peak_bytes, resident_bytes
from benchmarks.training.timed_training import PERIOD, Sizes, model_config
from lskip.callbacks import EarlyExitLoss
from lskip.curricula import Rotational
from lskip.module import LayerSkipModule
from lskip.training.lightning_utils import quiet_lightning

# By --quick. Rounds are pairs of steps that are timed.
SIZES = {
    False: Sizes(layers=12, vocabulary=8192, hidden=256, intermediate=768, heads=4, batch=8, length=256, rounds=5),
    True: Sizes(layers=3, vocabulary=512, hidden=64, intermediate=128, heads=4, batch=4, length=32, rounds=2),
}


def _adamw_8bit(parameters, **settings):
    from bitsandbytes.optim import AdamW8bit  # the extra `memory`

    return AdamW8bit(parameters, **settings)


@dataclass(frozen=True)
class Option:
    """A way to save memory.

    Attributes:
        module: arguments of LayerSkipModule.
        trainer: arguments of Trainer.
        package: that it needs besides lskip's own.
    """

    module: dict = field(default_factory=dict)
    trainer: dict = field(default_factory=dict)
    optimizer: Callable = torch.optim.AdamW
    micro_batches: int = 1
    package: str | None = None


CHECKPOINTING, BF16 = {"gradient_checkpointing": True}, {"precision": "bf16-mixed"}
OPTIONS = {
    "plain": Option(),
    "gradient checkpointing": Option(CHECKPOINTING),
    "bf16-mixed": Option(trainer=BF16),
    "8-bit AdamW": Option(optimizer=_adamw_8bit, package="bitsandbytes"),
    "accumulation of 4": Option(micro_batches=4),
    "all of them": Option(CHECKPOINTING, BF16, _adamw_8bit, 4, "bitsandbytes"),
}


class StepTimes(Callback):
    """Seconds of each optimizer step, and the gradients of the first."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.gradients: dict[str, torch.Tensor] = {}

    def on_train_start(self, trainer, pl_module) -> None:
        self._since = time.perf_counter()

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
        if not self.gradients:
            named = pl_module.model.named_parameters()
            self.gradients = {name: parameter.grad.detach().cpu().clone() for name, parameter in named}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if trainer.global_step > len(self.seconds):
            if pl_module.device.type == "cuda":
                torch.cuda.synchronize(pl_module.device)
            now = time.perf_counter()
            self.seconds.append(now - self._since)
            self._since = now


def make_training(option: Option, sizes: Sizes, device: torch.device, steps: int, *callbacks: Callback):
    """(module, function that trains it `steps` steps on the same batch)."""
    torch.manual_seed(0)
    optimizer = partial(option.optimizer, lr=1e-4)
    module = LayerSkipModule(model_config(sizes), optimizer=optimizer, lr_scheduler=None, **option.module).to(device)
    ids = torch.randint(0, sizes.vocabulary, (sizes.batch, sizes.length))
    parts = [{"input_ids": part} for part in ids.chunk(option.micro_batches)]
    trainer = Trainer(
        max_steps=steps,
        accumulate_grad_batches=option.micro_batches,
        callbacks=[EarlyExitLoss(0.2, Rotational(PERIOD)), *callbacks],
        accelerator="gpu" if device.type == "cuda" else "cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **option.trainer,
    )
    return module, partial(trainer.fit, module, DataLoader(parts * steps, batch_size=None))


def measure(name: str, sizes: Sizes, device: torch.device, folder: Path) -> dict:
    """The gradients of a step; the peak of two steps, the second with the optimizer's state in place; then the time."""
    option, first = OPTIONS[name], StepTimes()
    _, train = make_training(option, sizes, device, 1, first)
    train()
    save_file(first.gradients, folder / f"{name}.safetensors")
    process_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    module, train = make_training(option, sizes, device, 2)
    weights = resident_bytes(module, torch.optim.SGD(module.parameters()))
    peak = weights + peak_bytes(train, device)
    seconds, ratio = paired_seconds(option, sizes, device)
    return {
        "option": name,
        "seconds": seconds,
        "time_ratio": ratio,
        "peak_bytes": peak,
        "process_bytes": process_bytes,
    }


def paired_seconds(option: Option, sizes: Sizes, device: torch.device) -> tuple[float, float]:
    """Median seconds of a step, and the median of its ratios to a plain step of the same round.

    Rounds end after two minutes: bfloat16 takes that long on a CPU without its products.
    """
    began, seconds, ratios = time.perf_counter(), [], []
    while not seconds or (len(seconds) < sizes.rounds and time.perf_counter() - began < 120):
        plain = step_seconds(OPTIONS["plain"], sizes, device)
        seconds.append(step_seconds(option, sizes, device))
        ratios.append(seconds[-1] / plain)
    return statistics.median(seconds), statistics.median(ratios)


def step_seconds(option: Option, sizes: Sizes, device: torch.device) -> float:
    """Of the second step: the first makes the optimizer's state."""
    times = StepTimes()
    _, train = make_training(option, sizes, device, 2, times)
    train()
    return times.seconds[1]


def main() -> None:
    parser = command_parser("benchmarks.memory.training_options", __doc__)
    parser.add_argument("option", choices=OPTIONS)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    quiet_lightning()
    torch.set_num_threads(options.threads)
    print(json.dumps(measure(options.option, SIZES[options.quick], options.device, options.folder)))


if __name__ == "__main__":
    sys.exit(main())
