"""Ends of a training by two processes: signals and kills, at every moment, and what is left of the run.

    python -m benchmarks.scale.ends --out result [--faults "SIGTERM to rank 1, training"] [--sharded]

For each fault a run is started, ended by it, and resumed. The table shows the exit code, the seconds until no process
was left, the steps done and saved, and whether the resumed run ends with the weights, bit for bit, of one that nothing
ended, and leaves one checkpoint. DDP, or with --sharded FSDP2 that saves shards; gloo on the CPU. Writes result.json
into --out; ends with 1 where a process was left after a minute, where a signal lost a step or a kill more than those
since the last checkpoint, and where weights differ.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console
from rich.table import Table

from benchmarks.command_line import command_parser
from benchmarks.environment import environment
from lskip.training.checkpoint_file import WholeFiles
from lskip.utils.output_files import write_json

STEPS, EVERY, MOST_SECONDS = 60, 20, 60.0
TERM, USR1, INT, KILL = signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGKILL
console = Console(width=140)


class SlowSteps(Callback):
    """Makes steps and validations long enough for a signal, and notes what is done in `progress` beside the run.

    A line each, since a kill may come while one is written.
    """

    def __init__(self, folder: str):
        self.path = Path(folder) / "progress"

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *batch) -> None:
        if trainer.is_global_zero:
            self._note(f"step {trainer.global_step}")
        time.sleep(0.05)

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *batch) -> None:
        if trainer.is_global_zero and not trainer.sanity_checking:
            self._note(f"step {trainer.global_step}, validation")
        time.sleep(0.2)

    def _note(self, done: str) -> None:
        with self.path.open("a") as file:
            file.write(f"{done}\n")


@dataclass(frozen=True)
class Fault:
    """A signal, to whom ("0", "1", "all" or "torchrun"), and when ("start", "training", "validation", "writing")."""

    signum: signal.Signals
    to: str
    when: str = "training"
    torchrun: bool = False

    @property
    def name(self) -> str:
        to = f"rank {self.to}" if self.to in "01" else self.to
        of = " under torchrun" if self.torchrun and self.to != "torchrun" else ""
        return f"{self.signum.name} to {to}{of}, {self.when}"


FAULTS = [
    *(Fault(TERM, to, when) for when in ("start", "training", "validation", "writing") for to in ("0", "1", "all")),
    *(Fault(USR1, to) for to in ("1", "all")),
    Fault(INT, "all"),
    *(Fault(KILL, to, when) for when in ("training", "validation", "writing") for to in ("0", "1", "all")),
    *(Fault(TERM, to, torchrun=True) for to in ("torchrun", "1")),
    Fault(KILL, "1", torchrun=True),
]


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    config = write_config(options.out, options.sharded)
    whole = options.out / "whole"
    shutil.rmtree(whole, ignore_errors=True)
    whole.mkdir()
    subprocess.run(command(config, whole), check=True, stdout=subprocess.DEVNULL)
    found = []
    for fault in options.faults:
        found.append({**asdict(fault), "name": fault.name, **met(fault, config, options.out / "run", whole)})
        console.print(found[-1])
        write_json(options.out / "result.json", {"environment": environment(torch.device("cpu")), "faults": found})
    print_result(found)
    if any(wrong(each) for each in found):
        raise SystemExit(1)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = command_parser("benchmarks.scale.ends", __doc__)
    parser.add_argument("--out", required=True, type=Path, help="folder for runs and result.json")
    parser.add_argument("--faults", help="names, separated by semicolons; default: all")
    parser.add_argument("--sharded", action="store_true", help="FSDP2 with sharded checkpoints, in the place of DDP")
    options = parser.parse_args(arguments)
    names = [fault.name for fault in FAULTS]
    for name in (options.faults or "").split(";") if options.faults else ():
        if name not in names:
            parser.error(f"faults: {name!r} is not one of {'; '.join(names)}")
    options.faults = [fault for fault in FAULTS if not options.faults or fault.name in options.faults.split(";")]
    options.out.mkdir(parents=True, exist_ok=True)
    options.out = options.out.resolve()
    return options


def write_config(folder: Path, sharded: bool) -> Path:
    """Return the path of a config of a small training with layer dropout, and write its texts beside it."""
    draw = random.Random(0)
    texts = (" ".join(draw.choices(["on", "off", "the", "lamp", "2", "3", "of", "den"], k=60)) for _ in range(600))
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4}
    data = {"source": str(folder / "texts.jsonl"), "vocab_size": 300, "block_size": 32, "batch_size": 2}
    settings = {
        "model": {"model_type": "llama", "vocab_size": 300, "max_position_embeddings": 64, **sizes},
        "data": {"class_path": "TextData", "init_args": {**data, "val_fraction": 0.05, "cache_dir": str(folder)}},
        "layer_dropout": {"class_path": "LayerDropout", "init_args": {"p_max": 0.5}},
        "early_exit_loss": {"class_path": "EarlyExitLoss"},
        "checkpoint": {"every_n_train_steps": EVERY, "sharded": sharded},
        "trainer": {
            **{"accelerator": "cpu", "strategy": "fsdp2" if sharded else "ddp", "max_steps": STEPS},
            **{"enable_progress_bar": False},
            **{"val_check_interval": 15, "check_val_every_n_epoch": None, "limit_val_batches": 6},
        },
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def command(config: Path, run: Path, torchrun: bool = False) -> list[str]:
    """Return the command of a training by two processes."""
    start = ["torch.distributed.run", "--nproc_per_node", "2", "-m"] if torchrun else []
    slow = {"class_path": "benchmarks.scale.ends.SlowSteps", "init_args": {"folder": str(run)}}
    devices = [] if torchrun else ["--trainer.devices", "2"]
    return [
        *(sys.executable, "-m", *start, "lskip", "fit", "--config", str(config), "--run_folder", str(run)),
        *("--trainer.callbacks", json.dumps([slow]), *devices),
    ]


def met(fault: Fault, config: Path, run: Path, whole: Path) -> dict:
    """Return what became of a run that the fault ended, and of the one that went on with it."""
    shutil.rmtree(run, ignore_errors=True)
    run.mkdir()
    with (run / "output").open("wb") as output:
        main = subprocess.Popen(command(config, run, fault.torchrun), stdout=output, stderr=output)
        ranks: list[int] = []
        try:
            ranks = wait_for(lambda: ranks_of(main.pid, fault.torchrun))
            wait_for(lambda: arrived(fault.when, run))
            began = time.monotonic()
            send(fault, main.pid, ranks)
            ended = wait_for(lambda: main.poll() is not None and not any(alive(each) for each in ranks), MOST_SECONDS)
            seconds = time.monotonic() - began
        finally:
            for each in (main.pid, *ranks):
                if alive(each):
                    os.kill(each, KILL)
            main.wait()
    lines = len((run / "output").read_text(errors="replace").splitlines())
    done, saved = steps_done(run), saved_step(run)
    resume = ["--ckpt_path", "last"] if saved else []
    again = subprocess.run([*command(config, run), *resume], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return {
        **{"exit_code": main.returncode, "all_ended": bool(ended), "seconds": round(seconds, 1), "lines": lines},
        **{"done": done, "saved": saved, "resumed_alike": again.returncode == 0 and same_weights(run, whole)},
    }


def wait_for(found: Callable, most: float = 120.0):
    """Return what `found` returns as soon as it is true, or its last value after so many seconds."""
    until = time.monotonic() + most
    while not (value := found()) and time.monotonic() < until:
        time.sleep(0.001)
    return value


def ranks_of(main: int, torchrun: bool) -> list[int]:
    """Return the process numbers of rank 0 and rank 1, once both are there."""
    children = [int(number) for number in Path(f"/proc/{main}/task/{main}/children").read_text().split()]
    local = {local_rank(child): child for child in children} | ({} if torchrun else {0: main})
    return [local[0], local[1]] if {0, 1} <= local.keys() else []


def local_rank(number: int) -> int | None:
    """Return which rank of its machine a process was started as; None: it is another, or has ended."""
    try:
        variables = Path(f"/proc/{number}/environ").read_bytes().split(b"\0")
    except OSError:
        return None
    named = dict(each.partition(b"=")[::2] for each in variables)
    return int(named[b"LOCAL_RANK"]) if b"LOCAL_RANK" in named else None


def arrived(when: str, run: Path) -> bool:
    """Return whether a run has a checkpoint and is at the moment of a fault; "start": while it has nothing yet."""
    if when == "start":
        time.sleep(3)  # while both import and build
        return True
    if when == "writing":
        folder = run / "checkpoints"
        begun = (folder / ".last.ckpt.partial").exists() or len(list(folder.glob("*.shards-*"))) > 1
        return begun and saved_step(run) > 0
    return steps_done(run) > EVERY and ("validation" in progress_of(run)) == (when == "validation")


def send(fault: Fault, main: int, ranks: list[int]) -> None:
    chosen = {"torchrun": [main], "all": ranks}.get(fault.to) or [ranks[int(fault.to)]]
    for each in chosen:
        os.kill(each, fault.signum)


def alive(number: int) -> bool:
    """Return whether a process runs, or has ended but not been waited for."""
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return False
    return True


def progress_of(run: Path) -> str:
    """Return the last whole line that rank 0 noted; "" where there is none."""
    path = run / "progress"
    whole = path.read_text().splitlines(keepends=True) if path.exists() else []
    return next((line for line in reversed(whole) if line.endswith("\n")), "")


def steps_done(run: Path) -> int:
    """Return the steps that were done when the run ended, as far as rank 0 noted them."""
    noted = progress_of(run)
    return int(noted.removeprefix("step ").split(",")[0]) if noted else 0


def saved_step(run: Path) -> int:
    """Return the step of the run's checkpoint; 0: there is none."""
    path = run / "checkpoints" / "last.ckpt"
    return torch.load(path, weights_only=True, mmap=True)["global_step"] if path.exists() else 0


def same_weights(run: Path, whole: Path) -> bool:
    """Return whether two runs end with the same bits, and the first has one checkpoint and nothing left beside it."""
    paths = [each / "checkpoints" / "last.ckpt" for each in (run, whole)]
    one, other = (WholeFiles().load_checkpoint(path, weights_only=True) for path in paths)
    alike = all(torch.equal(part, other["state_dict"][name]) for name, part in one["state_dict"].items())
    return alike and len(list(paths[0].parent.iterdir())) == 1 + ("shards" in one)


def wrong(found: dict) -> bool:
    """Return whether a fault cost more than it may."""
    most = EVERY if found["signum"] == KILL else 0
    return not (found["all_ended"] and found["resumed_alike"] and found["done"] - found["saved"] <= most)


def print_result(found: list[dict]) -> None:
    table = Table("fault", "exit code", "seconds", "lines", "steps done", "saved", "resumed bit for bit")
    for each in found:
        cells = (str(each[key]) for key in ("exit_code", "seconds", "lines", "done", "saved"))
        table.add_row(each["name"], *cells, "yes" if each["resumed_alike"] else "NO")
    console.print(table)


if __name__ == "__main__":
    main(sys.argv[1:])
