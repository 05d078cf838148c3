"""How memory and time of `lskip fit` grow with its corpus: two sizes of distinct documents of two thousand characters.

    python -m benchmarks.data.corpus_size --out result [--megabytes 200,2000] [--cores 1,2] [--quick]

Documents are slices of the standard library's source behind a serial number. Each corpus is prepared (documents, a
tokenizer, tokens) and trained on for a few steps, with an empty cache, on the given numbers of cores. Memory is
anonymous (RssAnon), of the process and its helpers together, read every few milliseconds: the highest while it
prepares, and while it trains from the cache that is there. Writes result.json into --out, and removes the corpora.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import time
from itertools import count
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.command_line import command_parser
from benchmarks.decoding.options import numbers
from benchmarks.environment import environment
from benchmarks.scale.memory import anonymous_bytes
from lskip.utils.output_files import write_json

LENGTH = 2000  # characters of a document
EVERY = 0.02  # seconds between two looks
MODEL = {"model_type": "llama", "vocab_size": 4096, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
         "num_attention_heads": 2, "num_key_value_heads": 2, "bos_token_id": 0, "eos_token_id": 0}  # fmt: skip
console = Console(width=120)


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    corpora, found = {size: options.out / f"{size}.jsonl" for size in options.megabytes}, []
    for size, path in corpora.items():
        documents = write_corpus(path, size * 10**6)
        for cores in options.cores:
            cache = options.out / "cache"
            shutil.rmtree(cache, ignore_errors=True)
            prepared = measured(path, cache, cores, options, 1)
            trained = measured(path, cache, cores, options, options.steps)
            stored = sum(file.stat().st_size for file in cache.rglob("*") if file.is_file())
            row = {"megabytes": size, "documents": documents, "cores": cores, "stored_bytes": stored}
            found.append({**row, "prepare": prepared, "train": trained})
            console.print(found[-1])
            shutil.rmtree(cache)
        path.unlink()
    write_json(options.out / "result.json", {"environment": environment(torch.device("cpu")), "corpora": found})
    print_result(found)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = command_parser("benchmarks.data.corpus_size", __doc__)
    parser.add_argument("--out", required=True, type=Path, help="folder for corpora, caches and result.json")
    parser.add_argument("--megabytes", type=numbers, default=(200, 2000), help="sizes of corpora, such as 200,2000")
    parser.add_argument("--cores", type=numbers, default=(2,), help="cores that each is prepared with, such as 1,2")
    parser.add_argument("--tokenizer", default=None, help="as --data.tokenizer; default: one is trained")
    parser.add_argument("--steps", type=int, default=20, help="of the training from the cache")
    parser.add_argument("--quick", action="store_true", help="tiny, to see that it runs; it says nothing")
    options = parser.parse_args(arguments)
    if options.quick:
        options.megabytes, options.cores, options.steps = (1,), (1,), 2
    options.out.mkdir(parents=True, exist_ok=True)
    return options


def write_corpus(path: Path, characters: int) -> int:
    """Write documents of so many characters in all, and return their number."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    text = "\n".join(file.read_text(errors="ignore") for file in files)
    starts, done = range(0, len(text) - LENGTH, LENGTH - 20), 0
    with path.open("w") as file:
        for number in count():
            if done >= characters:
                return number
            start = starts[number % len(starts)]
            document = f"document {number}\n{text[start : start + LENGTH - 20]}"
            file.write(json.dumps({"text": document}) + "\n")
            done += len(document)


def measured(source: Path, cache: Path, cores: int, options: argparse.Namespace, steps: int) -> dict:
    """Return the seconds and the highest anonymous memory of a training; the first one prepares the data."""
    model = MODEL if options.tokenizer is None else {**MODEL, "vocab_size": 49152}
    command = [
        *(sys.executable, "-m", "lskip", "fit", f"--model={json.dumps(model)}", f"--data.source={source}"),
        *(f"--data.cache_dir={cache}", f"--run_folder={options.out / 'run'}", f"--trainer.max_steps={steps}"),
        *("--data.block_size=256", "--data.batch_size=4", "--trainer.accelerator=cpu", "--trainer.devices=1"),
        *("--trainer.logger=false", "--trainer.enable_checkpointing=false", "--trainer.limit_val_batches=0"),
        *("--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"),
        *([] if options.tokenizer is None else [f"--data.tokenizer={options.tokenizer}"]),
    ]
    log, highest, began = options.out / "fit.log", [0], time.perf_counter()
    variables = os.environ | {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
    allowed = set(sorted(os.sched_getaffinity(0))[:cores])
    with (
        log.open("w") as said,
        subprocess.Popen(
            command, stdout=said, stderr=said, env=variables, preexec_fn=lambda: os.sched_setaffinity(0, allowed)
        ) as process,
    ):
        while process.poll() is None:
            highest = max(highest, [*map(anonymous_bytes, family(process.pid))], key=sum)
            time.sleep(EVERY)
    if process.returncode:
        raise SystemExit(f"benchmarks.data.corpus_size: lskip fit failed\n{log.read_text()[-2000:]}")
    seconds = round(time.perf_counter() - began, 1)
    return {"seconds": seconds, "anonymous_bytes": sum(highest), "of_each_process": highest}


def family(process: int) -> list[int]:
    """Return a process and those that it and its threads have begun; those that have ended are left out.

    So is one that has its parent's command line: between vfork and exec it shares its parent's memory, which would be
    counted twice (a look that falls there is rare, and said 1,014 MB once where 686 were held).
    """
    try:
        children = [Path(task, "children").read_text() for task in Path(f"/proc/{process}/task").iterdir()]
        begun = [child for child in " ".join(children).split() if command_line(child) != command_line(process)]
    except OSError:
        return [process]
    return [process, *(one for child in begun for one in family(int(child)))]


def command_line(process: int | str) -> bytes:
    """Return a process' command line; empty where it has ended."""
    try:
        return Path(f"/proc/{process}/cmdline").read_bytes()
    except OSError:
        return b""


def print_result(found: list[dict]) -> None:
    table = Table("MB", "documents", "cores", "preparing, s", "memory, MB", "training, memory, MB", "stored, MB")
    for row in found:
        seconds, memory = row["prepare"]["seconds"], row["prepare"]["anonymous_bytes"] / 1e6
        cells = f"{seconds:.0f}", f"{memory:.0f}", f"{row['train']['anonymous_bytes'] / 1e6:.0f}"
        table.add_row(str(row["megabytes"]), f"{row['documents']:,}", str(row["cores"]), *cells,
                      f"{row['stored_bytes'] / 1e6:.0f}")  # fmt: skip
    console.print(table)


if __name__ == "__main__":
    main(sys.argv[1:])
