"""Planned against measured memory: `lskip plan` and `lskip fit` with the same options, on the CPU.

    python -m benchmarks.scale.memory --out result [--cases "weights;activations"] [--quick]

Each training runs three steps in a process of its own. Measured is the highest anonymous memory of that process
(RssAnon, read every few milliseconds) above that of an idle one that has imported lskip. A plan counts tensors: the
gaps that glibc leaves between them are kept small by MALLOC_MMAP_THRESHOLD_=131072. --default_malloc measures without
it, against what the plan says of them (GLIBC_GAPS). Writes result.json into --out; ends with 1 where a plan is more
than 15 % off.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.command_line import command_parser
from benchmarks.environment import environment
from lskip.cli import main as lskip
from lskip.planning.memory import GLIBC_GAPS
from lskip.utils.output_files import write_json

MOST = 0.15  # that a plan may be off, as a share of what was measured
FEW_GAPS = {"MALLOC_MMAP_THRESHOLD_": "131072"}
EVERY = 0.005  # seconds between two looks
IDLE = "import time, lskip.cli.fit, lskip.task_module; print('ready', flush=True); time.sleep(600)"
console = Console(width=120)


@dataclass(frozen=True)
class Case:
    """A training.

    Attributes:
        model: its transformers config.
        options: others of `lskip fit`.
    """

    model: dict
    options: tuple[str, ...]


def llama(**sizes) -> dict:
    heads = sizes["hidden_size"] // 64
    same = {"num_attention_heads": heads, "num_key_value_heads": heads, "bos_token_id": 0, "eos_token_id": 0}
    return {"model_type": "llama", "max_position_embeddings": 1024, **same, **sizes}


EXITS = ("--early_exit_loss=EarlyExitLoss", "--early_exit_loss.curriculum=Rotational")
CASES = {
    "weights": Case(
        llama(vocab_size=32000, hidden_size=512, intermediate_size=1408, num_hidden_layers=12),
        ("--data.batch_size=2", "--data.block_size=256", *EXITS, "--early_exit_loss.curriculum.period=4"),
    ),
    "activations": Case(
        llama(vocab_size=4096, hidden_size=256, intermediate_size=704, num_hidden_layers=12),
        (
            *("--data.batch_size=16", "--data.block_size=512", "--position_share=0.25"),
            *("--layer_dropout=LayerDropout", "--layer_dropout.p_max=0.2"),
            *("--early_exit_loss=EarlyExitLoss", "--early_exit_loss.curriculum=AllExits"),
        ),
    ),
    # Chosen, and first measured, after the formulae were finished.
    "another family, checkpointing, an anchor": Case(
        {
            **{"model_type": "gpt2", "vocab_size": 16000, "n_embd": 640, "n_layer": 10, "n_head": 10},
            **{"n_positions": 512, "bos_token_id": 0, "eos_token_id": 0},
        },
        (
            *("--data.batch_size=4", "--data.block_size=128", "--trainer.accumulate_grad_batches=2"),
            *("--gradient_checkpointing=true", "--anchor_weight=0.5", "--exit_target=SelfDistillation"),
            *("--early_exit_loss=EarlyExitLoss", "--early_exit_loss.curriculum=Rotational"),
            *("--early_exit_loss.curriculum.period=3", "--trainer.gradient_clip_val=1.0"),
        ),
    ),
    # Chosen, and first measured, ten hours of other changes later.
    "LoRA in 16 bits, grouped queries, an untied head": Case(
        {
            **{"model_type": "mistral", "vocab_size": 24000, "hidden_size": 640, "intermediate_size": 1792},
            **{"num_hidden_layers": 14, "num_attention_heads": 10, "num_key_value_heads": 2, "sliding_window": 256},
            **{"max_position_embeddings": 1024, "bos_token_id": 0, "eos_token_id": 0, "tie_word_embeddings": False},
        },
        (
            *("--data.batch_size=3", "--data.block_size=384", "--data.documents=separate"),
            *("--trainer.precision=bf16-mixed", "--low_rank=LowRank", "--low_rank.rank=8", "--low_rank.exit_layer=6"),
            *("--layer_dropout=LayerDropout", "--layer_dropout.p_max=0.3", "--layer_dropout.depth=Constant"),
            *("--early_exit_loss=EarlyExitLoss", "--early_exit_loss.curriculum=Gradual"),
        ),
    ),
}
QUICK = {
    "quick": Case(
        llama(vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=2),
        ("--data.batch_size=2", "--data.block_size=32", *EXITS, "--early_exit_loss.curriculum.period=1"),
    )
}


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    write_corpus(options.out / "texts.jsonl")
    idle, found = idle_bytes(), []
    for name in options.cases:
        case = options.known[name]
        planned, parts = planned_bytes(case, options.out)
        planned *= GLIBC_GAPS if options.default_malloc else 1
        measured = measured_bytes(case, options.out, options.default_malloc) - idle
        row = {"case": name, "planned": planned, "measured": measured, "parts": parts, "off": planned / measured - 1}
        console.print({key: value for key, value in row.items() if key != "parts"})
        found.append(row)
    write_json(options.out / "result.json", {"environment": environment(torch.device("cpu")), "memory": found})
    print_result(found)
    if not options.quick and any(abs(row["off"]) > MOST for row in found):
        raise SystemExit(1)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = command_parser("benchmarks.scale.memory", __doc__)
    parser.add_argument("--out", required=True, type=Path, help="folder for data and result.json")
    parser.add_argument("--cases", type=lambda text: text.split(";"), help="names of trainings; default: all")
    parser.add_argument("--default_malloc", action="store_true", help="with glibc's gaps")
    parser.add_argument("--quick", action="store_true", help="a tiny one, to see that it runs; it says nothing")
    options = parser.parse_args(arguments)
    options.known = QUICK if options.quick else CASES
    for name in options.cases or ():
        if name not in options.known:
            parser.error(f"cases: {name!r} is not one of {', '.join(options.known)}")
    options.cases = options.cases or list(options.known)
    options.out.mkdir(parents=True, exist_ok=True)
    return options


def write_corpus(path: Path) -> None:
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghij", k=4)) for _ in range(300)]
    texts = (" ".join(draw.choices(words, k=400)) for _ in range(400))
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def fit_arguments(case: Case, out: Path) -> list[str]:
    return [
        *(f"--model={json.dumps(case.model)}", f"--data.source={out / 'texts.jsonl'}"),
        *(f"--data.cache_dir={out / 'cache'}", f"--run_folder={out / 'run'}"),
        *("--trainer.accelerator=cpu", "--trainer.devices=1", "--trainer.max_steps=3", "--trainer.logger=false"),
        *("--trainer.enable_checkpointing=false", "--trainer.enable_progress_bar=false"),
        *("--trainer.enable_model_summary=false", "--trainer.limit_val_batches=0"),
        *case.options,
    ]


def planned_bytes(case: Case, out: Path) -> tuple[int, dict[str, int]]:
    """Return the bytes that `lskip plan` says, and those of each part."""
    if lskip(["plan", *fit_arguments(case, out), f"--output={out / 'plan.json'}"]) != 0:
        raise SystemExit("benchmarks.scale.memory: lskip plan failed")
    parts = json.loads((out / "plan.json").read_text())["memory_bytes"]
    return parts["total"], parts


def idle_bytes() -> int:
    """Return the anonymous memory of a process that has imported lskip and does nothing."""
    with subprocess.Popen([sys.executable, "-c", IDLE], stdout=subprocess.PIPE, text=True) as process:
        process.stdout.readline()
        found = anonymous_bytes(process.pid)
        process.kill()
    return found


def measured_bytes(case: Case, out: Path, default_malloc: bool) -> int:
    """Return the highest anonymous memory of a process that trains."""
    command, most = [sys.executable, "-m", "lskip", "fit", *fit_arguments(case, out)], 0
    log, environ = out / "fit.log", os.environ | ({} if default_malloc else FEW_GAPS)
    with log.open("w") as said, subprocess.Popen(command, stdout=said, stderr=said, env=environ) as process:
        while process.poll() is None:
            most = max(most, anonymous_bytes(process.pid))
            time.sleep(EVERY)
    if process.returncode:
        raise SystemExit(f"benchmarks.scale.memory: lskip fit failed\n{log.read_text()[-2000:]}")
    return most


def anonymous_bytes(process: int) -> int:
    """Return RssAnon of a process; 0 where it has just ended."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:")), 0)


def print_result(found: list[dict]) -> None:
    table = Table("training", "planned, GB", "measured, GB", "off")
    for row in found:
        sizes = (f"{row[name] / 1e9:.2f}" for name in ("planned", "measured"))
        table.add_row(row["case"], *sizes, f"{row['off']:+.1%}")
    console.print(table)


if __name__ == "__main__":
    main(sys.argv[1:])
