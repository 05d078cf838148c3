"""Kills (SIGKILL) of processes that prepare data, train on them or train on a stream, and what the next ones read.

    python -m benchmarks.data.kills --out result [--kills 6] [--late_step 10000] [--quick]

Preparing: `lskip data` with an empty cache is killed at random moments, with its helpers or without; then it runs to
its end: the rows are those of a preparation that nobody disturbed, no process and no unfinished file is left.

Training: a module that only notes the rows it gets is trained, killed at random steps, and goes on by 1, 2 and 4
processes in turns, from a checkpoint of every fifth step. Of all steps together the rows are those of one process that
nobody killed, in the same order, and no row comes twice in an epoch.

Late: a stream is trained on for --late_step steps of 16 rows of 256 tokens; measured are the seconds from the start of
a process that goes on there to its first batch, with its cache and with an empty one.

Writes result.json into --out; ends with 1 where rows differ.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from itertools import chain
from pathlib import Path

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from rich.console import Console

from benchmarks.command_line import command_parser
from benchmarks.data.corpus_size import write_corpus
from benchmarks.environment import environment
from benchmarks.scale.ranks import QUIET, run_ranks
from lskip.data import TextData, stream_store
from lskip.utils.output_files import write_json

EVERY = 5  # steps between checkpoints
ROWS = 8  # of a step, of all processes
WORLDS = (1, 2, 4)  # processes, in turns
HELPERS_END = 20  # seconds: they look for their parent after each part
PATIENCE = 300  # seconds until a process that does nothing is a failure
SPLIT = {"val_fraction": 0.02, "test_fraction": 0.0, "vocab_size": 300, "max_val_blocks": 8}
console = Console(width=120)


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    if options.child:
        return run_child(json.loads(options.child))
    draw, found = random.Random(options.seed), {}
    write_corpus(options.out / "texts.jsonl", options.megabytes * 10**6)
    found["preparing"] = killed_preparations(options, draw)
    console.print({"preparing": found["preparing"]})
    for name in ("stored", "streamed"):
        found[name] = killed_trainings(name, options, draw)
        console.print({name: found[name]})
    if options.late_step:
        found["late"] = late_start(options)
        console.print({"late": found["late"]})
    write_json(options.out / "result.json", {"environment": environment(torch.device("cpu")), **found})
    if not all(each["as_undisturbed"] for each in found.values()):
        raise SystemExit(1)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = command_parser("benchmarks.data.kills", __doc__)
    parser.add_argument("--out", required=True, type=Path, help="folder for corpora, caches and result.json")
    parser.add_argument("--kills", type=int, default=6, help="of each kind")
    parser.add_argument("--megabytes", type=int, default=30, help="of the corpus that is prepared")
    parser.add_argument("--late_step", type=int, default=0, help="such as 10000; 0: not measured")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="one kill of each kind")
    parser.add_argument("--child", help="for the processes that it starts")
    options = parser.parse_args(arguments)
    if options.quick:
        options.kills, options.megabytes = 1, 1
    options.out = options.out.absolute()
    options.out.mkdir(parents=True, exist_ok=True)
    return options


# Preparing


def killed_preparations(options: argparse.Namespace, draw: random.Random) -> dict:
    """Return what kills did to the preparation of a corpus."""
    for cache in ("undisturbed", "killed"):
        shutil.rmtree(options.out / cache, ignore_errors=True)
    began = time.perf_counter()
    prepare(options.out / "undisturbed", options).wait()
    seconds = time.perf_counter() - began
    left = []
    for number in range(options.kills):
        process = prepare(options.out / "killed", options)
        time.sleep(draw.uniform(0.3, 1.0) * seconds)
        if number % 2:
            process.kill()  # its helpers are not told
        else:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        until = time.monotonic() + HELPERS_END
        while processes_of(process.pid) and time.monotonic() < until:
            time.sleep(0.1)
        left += processes_of(process.pid)
    end = prepare(options.out / "killed", options).wait()
    files = [
        str(path)
        for path in (options.out / "killed").rglob("*")
        if path.name[0] == "." and not path.name.endswith(".lock")
    ]
    rows = [rows_digest(options.out / cache, options) for cache in ("undisturbed", "killed")]
    same = rows[0] == rows[1] and end == 0 and not left and not files
    return {"kills": options.kills, "as_undisturbed": same, "processes_left": left, "files_left": files}


def prepare(cache: Path, options: argparse.Namespace) -> subprocess.Popen:
    source = options.out / "texts.jsonl"
    command = [sys.executable, "-m", "lskip", "data", f"--source={source}", f"--cache_dir={cache}", "--show=0"]
    command += [f"--{name}={value}" for name, value in SPLIT.items()]
    with (options.out / "prepare.log").open("a") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)


def processes_of(session: int) -> list[int]:
    """Return the processes of a session that run; one that has ended may still be listed (Z)."""
    found = []
    for path in Path("/proc").iterdir():
        with suppress(OSError, ValueError):  # it has just ended; no process
            state = Path(path, "stat").read_text().rpartition(")")[2].split()[0]
            found += [int(path.name)] if os.getsid(int(path.name)) == session and state != "Z" else []
    return found


def rows_digest(cache: Path, options: argparse.Namespace) -> str:
    rows = TextData(str(options.out / "texts.jsonl"), cache_dir=str(cache), **SPLIT).blocks("train")
    total = hashlib.sha256()
    for part in rows.in_parts():
        total.update(part["input_ids"].tobytes())
    return total.hexdigest()


# Training


class Notes(LightningModule):
    """A module that notes a hash of each row that it gets, and when the first one came."""

    def __init__(self, path: Path, attempt: int, slowly: float):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.path, self.attempt, self.slowly = path, attempt, slowly

    def training_step(self, batch: dict, batch_idx: int) -> torch.Tensor:
        rows = [hashlib.sha256(row.numpy().tobytes()).hexdigest()[:12] for row in batch["input_ids"]]
        note = {"attempt": self.attempt, "step": self.trainer.global_step, "rank": self.global_rank, "rows": rows}
        with self.path.open("a") as file:
            file.write(json.dumps({**note, "at": time.time()}) + "\n")
        time.sleep(self.slowly)
        return self.weight.sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def run_child(task: dict) -> None:
    """Train as a task says, in so many processes; one is this, so that its start is timed with one import."""
    if task["world"] == 1:
        torch.set_num_threads(1)
        return train(task)
    return run_ranks(task["world"], train, task)


def train(task: dict) -> None:
    if task["segment"]:
        stream_store.FIRST = stream_store.LARGEST = task["segment"]
    folder, world = Path(task["folder"]), task["world"]
    data = TextData(**task["data"], batch_size=task["rows"] // world)
    save = ModelCheckpoint(folder, save_last=True, save_top_k=0, every_n_train_steps=EVERY)
    trainer = Trainer(
        **QUIET,
        **{"devices": world, "strategy": "ddp" if world > 1 else "auto", "max_steps": task["steps"]},
        **{"callbacks": [save], "limit_val_batches": 0, "num_sanity_val_steps": 0, "default_root_dir": folder},
    )
    last = folder / "last.ckpt"
    module = Notes(folder / "notes.jsonl", task["attempt"], task["slowly"])
    trainer.fit(module, data, ckpt_path=str(last) if last.is_file() else None)


def killed_trainings(name: str, options: argparse.Namespace, draw: random.Random) -> dict:
    """Return what kills did to the rows of a training, on stored tokens or on a stream."""
    source = options.out / "few.jsonl"
    write_corpus(source, 600_000)
    data = {"source": str(source), "cache_dir": str(options.out / f"cache {name}"), "block_size": 64, **SPLIT}
    shutil.rmtree(data["cache_dir"], ignore_errors=True)
    data |= {"streaming": name == "streamed"}
    steps = 10 * (options.kills + 1)
    task = {"data": data, "rows": ROWS, "steps": steps, "segment": 30_000, "slowly": 0.02}
    whole, parts = (options.out / f"{name} {part}" for part in ("whole", "parts"))
    for folder in (whole, parts):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
    start({**task, "folder": str(whole), "world": 1, "attempt": 0}, options).wait()
    shutil.rmtree(data["cache_dir"])
    worlds = []
    for attempt in range(options.kills + 1):
        world = WORLDS[attempt % len(WORLDS)]
        worlds.append(world)
        child = start({**task, "folder": str(parts), "world": world, "attempt": attempt}, options)
        if attempt < options.kills:
            wait_for_step(parts / "notes.jsonl", attempt, draw.randint(1, 2 * EVERY), child)
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()
    expected, found = (order_of(folder / "notes.jsonl") for folder in (whole, parts))
    same = found == expected and len(found) == steps and len({*chain.from_iterable(found)}) == steps * ROWS
    return {"kills": options.kills, "processes": worlds, "steps": steps, "as_undisturbed": same}


def start(task: dict, options: argparse.Namespace) -> subprocess.Popen:
    command = [sys.executable, "-m", "benchmarks.data.kills", f"--out={options.out}", f"--child={json.dumps(task)}"]
    with (options.out / "train.log").open("a") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)


def notes_of(path: Path) -> list[dict]:
    """Return what was noted; a last line that a kill cut is left out."""
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]


def wait_for_step(path: Path, attempt: int, steps: int, child: subprocess.Popen) -> None:
    """Wait until an attempt has made so many steps, or has ended."""
    until = time.monotonic() + PATIENCE
    while sum(note["attempt"] == attempt and note["rank"] == 0 for note in notes_of(path)) < steps:
        if child.poll() is not None:
            return
        if time.monotonic() > until:
            raise SystemExit("benchmarks.data.kills: a training does not begin")
        time.sleep(0.01)


def order_of(path: Path) -> list[list[str]]:
    """Return the rows of each step, as the last attempt that made it had them, rank after rank."""
    steps: dict[int, dict] = {}
    for note in notes_of(path):
        attempt, ranks = steps.get(note["step"], (-1, {}))
        if note["attempt"] > attempt:
            attempt, ranks = note["attempt"], {}
        steps[note["step"]] = attempt, {**ranks, note["rank"]: note["rows"]}
    return [[row for rank in sorted(ranks) for row in ranks[rank]] for _, (_, ranks) in sorted(steps.items())]


# Late


def late_start(options: argparse.Namespace) -> dict:
    """Return the seconds until a stream's first batch, at a late step."""
    source, folder = options.out / "many.jsonl", options.out / "late"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    write_corpus(source, options.late_step * 16 * 256 * 4)
    data = {"source": str(source), "block_size": 256, "streaming": True, **SPLIT, "vocab_size": 4096}
    task = {"data": {**data, "cache_dir": str(options.out / "cache late")}, "rows": 16, "segment": 0, "slowly": 0.0}
    task |= {"folder": str(folder), "world": 1}
    start({**task, "steps": options.late_step + EVERY, "attempt": 0}, options).wait()
    kept, seconds = folder / "last.ckpt", {}
    late = kept.read_bytes()
    for attempt, (name, cache) in enumerate({"its cache": "cache late", "an empty cache": "cache new"}.items(), 1):
        shutil.rmtree(options.out / "cache new", ignore_errors=True)
        kept.write_bytes(late)  # else the second goes on behind the first
        task["data"]["cache_dir"] = str(options.out / cache)
        began = time.time()
        start({**task, "steps": options.late_step + EVERY + 1, "attempt": attempt}, options).wait()
        first = next(note for note in notes_of(folder / "notes.jsonl") if note["attempt"] == attempt)
        seconds[name] = {"seconds": round(first["at"] - began, 1), "step": first["step"], "rows": first["rows"]}
    rows = [each.pop("rows") for each in seconds.values()]
    return {**seconds, "as_undisturbed": rows[0] == rows[1]}


if __name__ == "__main__":
    main(sys.argv[1:])
