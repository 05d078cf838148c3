"""Check for memory leaks: resident memory over 1,000 sampled prompts, or over 5,000 training steps.

    python -m benchmarks.memory.steady --what predict --out steady_predict.json
    python -m benchmarks.memory.steady --what train --out steady_train.json

predict: `lskip predict` answers prompts, sampled and drafted, while a thread records the resident memory after every 50
lines of output. train: `lskip fit` trains a tiny model, with validation, checkpoints and logs, and a callback records
the memory every 50 steps. Prints the series, its value after the first 100, the largest one after that, and their
ratio. The exit code is 1 if the ratio is above 1.05. Linux only.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.command_line import command_parser

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from lightning.pytorch import Callback
from rich.console import Console

from benchmarks.environment import environment
from lskip.cli import main as lskip
from lskip.utils.output_files import write_json

FIRST, MOST = 100, 1.05
COUNTS = {"predict": 1000, "train": 5000}
TINY = {
    "model_type": "llama",
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
console = Console(width=120)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        series = (predicted if options.what == "predict" else trained)(options, Path(folder))
    found = summary(series)
    print_series(options.what, series, found)
    if options.out is not None:
        write_json(options.out, record_of(options, series, found))
    return int(found["ratio"] > MOST)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = command_parser("benchmarks.memory.steady", __doc__)
    add = parser.add_argument
    add("--what", choices=list(COUNTS), required=True, help="what is looked at")
    add("--count", type=int, help="prompts or steps; by default 1,000 or 5,000")
    add("--every", type=int, default=50, help="prompts or steps between two looks")
    add("--model", default="smollm2", help="that answers")
    add(
        "--drafts",
        choices=["adapter", "ngram", "layers"],
        default="adapter",
        help="of smollm2 or by n-grams, or at layer 2",
    )
    add("--max_new_tokens", type=int, default=6)
    add("--threads", type=int, default=1)
    add("--out", type=Path, help="JSON file to write")
    options = parser.parse_args(arguments)
    options.count = options.count or COUNTS[options.what]
    return options


def resident() -> float:
    """MiB of this process that are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


# Answering.


def predicted(options: argparse.Namespace, folder: Path) -> dict[int, float]:
    """Prompts done -> MiB."""
    prompts, output = folder / "prompts.txt", folder / "out.jsonl"
    prompts.write_text("".join(f"{prompt_of(index)}\n" for index in range(options.count)))
    drafts = {
        "adapter": ("--exit_adapter=smollm2", "--num_speculations=4"),
        "ngram": ("--draft=ngram", "--num_speculations=4"),
        "layers": ("--exit_layer=2", "--num_speculations=4"),
    }
    sampled = (
        "--temperature=1",
        "--batch_size=8",
        "--chat=false",
        f"--max_new_tokens={options.max_new_tokens}",
        "--device=cpu",
    )
    series: dict[int, float] = {}
    with watched(output, options.every, series):
        run(
            "predict",
            f"--model={options.model}",
            f"--prompts={prompts}",
            f"--output={output}",
            *sampled,
            *drafts[options.drafts],
        )
    return series


def prompt_of(index: int) -> str:
    """A short prompt, another for each index, in which something repeats for n-grams to find."""
    return f"Count {index}, {index + 1}, {index},"


@contextmanager
def watched(output: Path, every: int, series: dict[int, float]) -> Iterator[None]:
    """Fill `series` as lines are added to a file."""
    over = threading.Event()

    def look() -> None:
        while True:
            last = over.is_set()
            done = output.read_bytes().count(b"\n") if output.exists() else 0
            if done >= (len(series) + 1) * every:
                series[done // every * every] = resident()
            if last:
                return
            time.sleep(0.05)

    looking = threading.Thread(target=look)
    looking.start()
    try:
        yield
    finally:
        over.set()
        looking.join()


# Training.


class ResidentMemory(Callback):
    """A callback that writes the step and the resident memory every so many steps."""

    def __init__(self, path: str, every: int):
        self.path, self.every = Path(path), every

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if trainer.global_step % self.every == 0:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps([trainer.global_step, resident()]) + "\n")


def trained(options: argparse.Namespace, folder: Path) -> dict[int, float]:
    """Steps done -> MiB."""
    lines = [json.dumps({"text": f"def f{i}(x):\n    return x * {i} + {i % 7}\n" * 8}) for i in range(400)]
    (folder / "data.jsonl").write_text("\n".join(lines))
    looks = {
        "class_path": "benchmarks.memory.steady.ResidentMemory",
        "init_args": {"path": str(folder / "seen"), "every": options.every},
    }
    run(
        *(
            "fit",
            f"--model={json.dumps(TINY)}",
            f"--run_folder={folder / 'run'}",
            f"--data.source={folder / 'data.jsonl'}",
        ),
        *(
            f"--data.cache_dir={folder / 'cache'}",
            "--data.vocab_size=300",
            "--data.block_size=32",
            "--data.batch_size=4",
        ),
        *("--layer_dropout=LayerDropout", "--early_exit_loss=EarlyExitLoss", "--early_exit_loss.curriculum=Rotational"),
        *(f"--trainer.max_steps={options.count}", "--trainer.max_epochs=-1", "--trainer.accelerator=cpu"),
        *("--trainer.val_check_interval=250", "--trainer.check_val_every_n_epoch=null", "--data.max_val_blocks=16"),
        *(f"--trainer.callbacks={json.dumps(looks)}", "--trainer.enable_progress_bar=false"),
    )
    return {step: mebibytes for step, mebibytes in map(json.loads, (folder / "seen").read_text().splitlines())}


def run(*arguments: str) -> None:
    if lskip(list(arguments)) != 0:
        raise SystemExit(f"benchmarks.memory.steady: lskip {arguments[0]} failed")


# What came of it.


def summary(series: dict[int, float]) -> dict[str, float]:
    """MiB after the first 100 (or what comes nearest), the most after that, and their ratio."""
    first = max((done for done in series if done <= FIRST), default=min(series))
    most = max(mebibytes for done, mebibytes in series.items() if done >= first)
    return {"first": first, "after_first": series[first], "most_after": most, "ratio": most / series[first]}


def print_series(what: str, series: dict[int, float], found: dict[str, float]) -> None:
    console.print(", ".join(f"{done}: {mebibytes:.0f}" for done, mebibytes in series.items()) + " MiB", highlight=False)
    console.print(
        f"{what}: {found['after_first']:.0f} MiB after {found['first']}, at most {found['most_after']:.0f} after that: "
        f"{found['ratio']:.3f}",
        highlight=False,
    )


def record_of(options: argparse.Namespace, series: dict[int, float], found: dict[str, float]) -> dict:
    named = {name: getattr(options, name) for name in ("what", "count", "every", "model", "drafts", "max_new_tokens")}
    return {
        **environment(torch.device("cpu")),
        **named,
        **found,
        "mebibytes": {str(done): round(mib, 1) for done, mib in series.items()},
    }


if __name__ == "__main__":
    sys.exit(main())
