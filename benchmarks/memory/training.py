"""Peak memory, step time and gradients of each option that saves memory in training.

    python -m benchmarks.memory.training --out DIR [--quick] [--threads 2] [--device cpu]

Every option runs in a separate process: lskip's module and Lightning's Trainer, rotational early exits, the same
batch. The peak is that of two steps, from the profiler's record of allocations; the time is a median of steps
interleaved with plain ones. Gradients of the first step are compared with the plain ones: relative error =
|difference| / |plain gradients| over all weights. Writes DIR/training_memory.json and DIR/training_memory.md.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path

import torch
from rich.console import Console
from safetensors.torch import load_file

from benchmarks.command_line import command_parser
from benchmarks.environment import environment
from benchmarks.memory.training_options import OPTIONS, SIZES
from benchmarks.training.train_step import megabytes, print_table
from lskip.utils.output_files import write_json

COLUMNS = ("option", "seconds / step", "time / plain", "peak MB", "peak / plain", "process MB", "gradients' error")


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    rows, left_out = [], []
    for name, option in OPTIONS.items():
        if option.package is not None and find_spec(option.package) is None:
            left_out.append(f"{name}: needs {option.package} (pip install bitsandbytes)")
            continue
        rows.append(measure(name, options))
        print(rows[-1], flush=True)  # a long run that is cut short has said what it knows
    compare(rows, options.out)
    torch.set_num_threads(options.threads)
    result = {
        "environment": environment(torch.device(options.device)),
        "sizes": asdict(SIZES[options.quick]),
        "options": rows,
        "left_out": left_out,
    }
    write_json(options.out / "training_memory.json", result)
    (options.out / "training_memory.md").write_text(markdown(rows))
    print_table(Console(width=130), "Memory of a training step", COLUMNS, [cells(row) for row in rows])
    print(*left_out, sep="\n")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = command_parser("benchmarks.memory.training", __doc__)
    parser.add_argument("--out", required=True, type=Path, help="folder for the results")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it runs; its times say nothing")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    return parser.parse_args(arguments)


def measure(name: str, options: argparse.Namespace) -> dict:
    """Measure one option in a separate process, so that its peak contains no other memory."""
    worker = [sys.executable, "-m", "benchmarks.memory.training_options", name, str(options.out)]
    flags = ["--threads", str(options.threads), "--device", options.device, *["--quick"] * options.quick]
    done = subprocess.run([*worker, *flags], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"benchmarks.memory.training: the option {name!r} failed\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def compare(rows: list[dict], folder: Path) -> None:
    """Add to each row what its option is against the plain one."""
    plain, exact = rows[0], load_file(folder / "plain.safetensors")
    size = torch.stack([gradient.norm() for gradient in exact.values()]).norm()
    for row in rows:
        path = folder / f"{row['option']}.safetensors"
        found = load_file(path)
        error = torch.stack([(found[name] - gradient).norm() for name, gradient in exact.items()]).norm()
        row["gradient_error"] = (error / size).item()
        row["memory_ratio"] = row["peak_bytes"] / plain["peak_bytes"]
    for row in rows:
        (folder / f"{row['option']}.safetensors").unlink()


def cells(row: dict) -> tuple[str, ...]:
    return (
        row["option"],
        f"{row['seconds']:.3f}",
        f"{row['time_ratio']:.2f}",
        megabytes(row["peak_bytes"]),
        f"{row['memory_ratio']:.2f}",
        megabytes(row["process_bytes"]),
        f"{row['gradient_error']:.1e}",
    )


def markdown(rows: list[dict]) -> str:
    lines = [COLUMNS, ("---", *["---:"] * (len(COLUMNS) - 1)), *map(cells, rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


if __name__ == "__main__":
    main()
