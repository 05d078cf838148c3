"""DeeBERT, BERxiT, CALM and LayerSkip on one axis: quality against mean layers, on the same model and data.

    python -m benchmarks.predecessors.run --out result
    python -m benchmarks.predecessors.run --out result --quick

Every method trains a small Llama from the same first weights on the same batches (arms.py): on Python
source (generation), on what people say to a smart home and its intent (classification), on timers and ln of the
hours that are asked for (regression). Held-out texts are then read off at fixed exits and where the method's
criterion stops, threshold by threshold.

Writes into --out a JSON file for each arm, which a repeated command does not run again, and from all of them
predecessors.json, predecessors.csv (the table of thresholds), predecessors.png and environment.json.
"""

from __future__ import annotations

import argparse
import csv
import email
import json
import sys
import time
import warnings
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from benchmarks.command_line import command_parser
from benchmarks.environment import environment
from benchmarks.predecessors.arms import ARMS, Arm, Sizes, train
from benchmarks.predecessors.figure import COLUMNS, PANELS, figure
from benchmarks.predecessors.scores import score_language, score_sentences
from benchmarks.predecessors.texts import durations, intents, loaders
from lskip.data import TextData
from lskip.task_module import Classification, Regression
from lskip.training.lightning_utils import quiet_lightning
from lskip.utils.output_files import write_json

QUICK = Sizes(
    source=str(Path(email.__file__).parent),
    vocab_size=512,
    layers=3,
    width=32,
    steps=20,
    batch_size=4,
    block_size=48,
    task_steps=20,
    task_batch_size=32,
    per_template=2,
    texts=4,
    context=16,
    new_tokens=16,
)
SENTENCE_WORDS = 1024  # entries of the sentences' tokenizer


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    quiet_lightning()
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    options.out.mkdir(parents=True, exist_ok=True)
    sizes = QUICK if options.quick else Sizes()
    for task in options.tasks:
        for name in options.methods:
            run_arm(task, name, sizes, options)
    write_all(options.out)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = command_parser("benchmarks.predecessors.run", __doc__)
    add = parser.add_argument
    add("--out", required=True, type=Path, help="folder for the results")
    add("--tasks", nargs="+", choices=tuple(PANELS), default=list(PANELS))
    add("--methods", nargs="+", choices=tuple(ARMS), default=list(ARMS))
    add("--seed", type=int, default=0)
    add("--threads", type=int, default=1)
    add("--cache_dir", help="of the language model's data; default: ~/.cache/lskip")
    add("--quick", action="store_true", help="as little as shows that it runs; its figures say nothing")
    return parser.parse_args(arguments)


def run_arm(task: str, name: str, sizes: Sizes, options: argparse.Namespace) -> None:
    """Train and score one method on one task, unless its file is there.

    Raises:
        SystemExit: the file is of another run.
    """
    path = options.out / f"{task}_{name}.json"
    settings = {"sizes": asdict(sizes), "seed": options.seed}
    if path.is_file():
        if json.loads(path.read_text())["settings"] != settings:
            raise SystemExit(
                f"benchmarks.predecessors.run: out: '{path}' is of other sizes or another seed; name another folder"
            )
        return
    began = time.perf_counter()
    points = language_arm(ARMS[name], sizes, options) if task == "generation" else task_arm(task, name, sizes, options)
    content = {"settings": settings, "points": points, "seconds": round(time.perf_counter() - began, 1)}
    write_json(path, content)
    print(f"{task}, {name}: {content['seconds']:.0f} s", flush=True)


def language_arm(arm: Arm, sizes: Sizes, options: argparse.Namespace) -> list[dict]:
    data = TextData(
        source=sizes.source,
        vocab_size=sizes.vocab_size,
        block_size=sizes.block_size,
        batch_size=sizes.batch_size,
        val_fraction=0.1 if sizes is not QUICK else 0.4,
        test_fraction=0.0,
        max_val_blocks=sizes.texts,
        seed=options.seed,
        documents="joined",  # as its figures were measured
        cache_dir=options.cache_dir,
    )
    data.setup("fit")
    texts = held_out_texts(data.val_dataloader(), sizes)
    module = train(arm, None, sizes, len(data.tokenizer), sizes.steps, options.seed, data.train_dataloader())
    return list(score_language(arm, module, texts, sizes))


def held_out_texts(batches: DataLoader, sizes: Sizes) -> Tensor:
    rows = torch.cat([batch["input_ids"] for batch in batches])[: sizes.texts]
    return rows[:, : sizes.context + sizes.new_tokens]


def task_arm(task: str, name: str, sizes: Sizes, options: argparse.Namespace) -> list[dict]:
    classifies = task == "classification"
    sentences = (intents if classifies else durations)(sizes.per_template)
    kind = Classification(1 + int(max(each.target for each in sentences))) if classifies else Regression()
    dtype = torch.long if classifies else torch.float32
    words = min(SENTENCE_WORDS, 2 * sizes.vocab_size)
    training, held_out = loaders(sentences, words, sizes.task_batch_size, dtype, options.seed)
    module = train(ARMS[name], kind, sizes, words, sizes.task_steps, options.seed, training)
    return list(score_sentences(ARMS[name], module, held_out))


def write_all(folder: Path) -> None:
    """From the arms' files to the tables and the figure."""
    records = []
    for task in PANELS:
        for name in ARMS:
            path = folder / f"{task}_{name}.json"
            if path.is_file():
                points = json.loads(path.read_text())["points"]
                records += [{"task": task, "method": name, **point} for point in points]
    write_json(folder / "predecessors.json", records)
    with (folder / "predecessors.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(records)
    figure(records).savefig(folder / "predecessors.png", dpi=130)
    write_json(folder / "environment.json", environment(torch.device("cpu")))


if __name__ == "__main__":
    main(sys.argv[1:])
