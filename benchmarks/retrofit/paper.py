r"""LayerSkip fine-tuning of a real checkpoint: layers before and after, and the last layer against plain fine-tuning.

    python -m benchmarks.retrofit.paper --retrofit runs/retrofit_smollm2 \
        --plain runs/retrofit_smollm2_plain --out result

Perplexity, and agreement with the model's own last layer, of some layers on held-out text: the test split of the data
that the runs were trained on (or of --code_source, where that was a part of it: a document is on the same side of the
split wherever it lies), and the language topics of Python's `pydoc` (English prose). The stock model is the one that
the runs started from. Both runs must have seen the same tokens: the same data and steps, or it refuses.

The topics are a file of the standard library, which a run on `stdlib` may have been trained on: the result says so
(`prose_in_training`).

Writes retrofit.json and environment.json into --out, anew after each model.
"""

from __future__ import annotations

import argparse
import math
import pydoc_data.topics
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import yaml
from rich.console import Console
from rich.table import Table
from torch import Tensor
from tqdm import tqdm

from benchmarks.command_line import command_parser
from benchmarks.environment import environment
from lskip.data import TextData
from lskip.models.decoder import Decoder
from lskip.models.pretrained import LAST_CHECKPOINT, load_model, load_tokenizer, read_checkpoint
from lskip.models.readout import read_exits
from lskip.utils.checks import check_whole
from lskip.utils.output_files import write_json

console = Console(width=120)
DATA = ("source", "text_column", "val_fraction", "test_fraction", "block_size", "batch_size", "seed")


class Trained(NamedTuple):
    """What a run has seen: the model that it started from, its data, optimizer steps and tokens."""

    model: str
    data: dict
    steps: int
    tokens: int


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    try:
        for name in ("code_blocks", "prose_blocks"):
            check_whole(name, getattr(options, name), 2)  # an interval needs two
        seen = same_tokens(options.retrofit, options.plain)
        texts = held_out(seen, options)
        options.out.mkdir(parents=True, exist_ok=True)
        result = run(options, seen, texts)
    except (ValueError, OSError) as error:
        sys.exit(f"retrofit_paper: {error}")
    print_result(result)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = command_parser("benchmarks.retrofit.paper", __doc__)
    parser.add_argument("--retrofit", type=Path, required=True, help="run of lskip fit with EarlyExitLoss")
    parser.add_argument("--plain", type=Path, required=True, help="the same without")
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument(
        "--layers", type=int, nargs="+", default=[10, 15, 20, 25, 30], help="the last must be among them"
    )
    parser.add_argument("--code_blocks", type=int, default=64, help="blocks of the test split, of the run's block_size")
    parser.add_argument("--prose_blocks", type=int, default=8, help="of 512 tokens")
    parser.add_argument(
        "--code_source", default=None, help="a part of the runs' data, as data.source; default: all of it"
    )
    parser.add_argument("--device", default="cpu", help="cpu, cuda ...")
    parser.add_argument("--cache_dir", default=None, help="of TextData; default ~/.cache/lskip")
    return parser.parse_args(arguments)


def same_tokens(*folders: Path) -> Trained:
    """What both runs have seen; ValueError where they differ, or one is no run."""
    first, second = (trained(folder) for folder in folders)
    for name, ours, theirs in zip(Trained._fields, first, second, strict=True):
        if ours != theirs:
            raise ValueError(f"plain: {folders[1]} has other {name} than {folders[0]}: {theirs}, not {ours}")
    return first


def trained(folder: Path) -> Trained:
    path = folder / LAST_CHECKPOINT
    if not path.is_file():
        raise FileNotFoundError(f"{folder}: is no run of lskip fit (it has no {LAST_CHECKPOINT})")
    config = yaml.safe_load((folder / "config.yaml").read_text())
    data = {name: config["data"]["init_args"].get(name) for name in DATA}
    steps = read_checkpoint(path)["global_step"]
    rows = data["batch_size"] * config["trainer"]["accumulate_grad_batches"]
    return Trained(config["model"], data, steps, steps * rows * data["block_size"])


def held_out(seen: Trained, options: argparse.Namespace) -> dict[str, Tensor]:
    """Text -> its tokens [blocks, tokens of a block]."""
    tokenizer = load_tokenizer(seen.model)
    limits = {"tokenizer": tokenizer, "max_val_blocks": options.code_blocks, "cache_dir": options.cache_dir}
    data = seen.data | {"source": options.code_source or seen.data["source"]}
    code = torch.tensor(np.stack(TextData(**data, **limits).blocks("test")[:]["input_ids"]))
    topics = pydoc_data.topics.topics
    length = options.prose_blocks * 512
    text = "\n\n".join(topics[name] for name in sorted(topics))[: 16 * length]  # a token is no longer than that
    prose = tokenizer(text, add_special_tokens=False)["input_ids"][:length]
    return {"code": code, "prose": torch.tensor(prose).view(-1, 512)}


def prose_in_training(seen: Trained, cache_dir: str | None) -> bool:
    source = Path(pydoc_data.topics.__file__).read_text(encoding="utf-8")
    texts = TextData(**seen.data, cache_dir=cache_dir).documents("train").to_dict().get("text", [])
    return source.strip() in {text.strip() for text in texts}


def run(options: argparse.Namespace, seen: Trained, texts: dict[str, Tensor]) -> dict:
    result = {"steps": seen.steps, "tokens": seen.tokens, "layers": sorted(options.layers), "models": {}}
    result["prose_in_training"] = prose_in_training(seen, options.cache_dir)
    write_json(options.out / "environment.json", environment(torch.device(options.device)) | {"options": vars(options)})
    losses = {}
    for name, source in (("stock", seen.model), ("plain", str(options.plain)), ("retrofit", str(options.retrofit))):
        decoder = Decoder(load_model(source)[0].to(options.device))
        if decoder.num_layers != max(options.layers):
            raise ValueError(
                f"layers: {max(options.layers)} is the deepest, but the model's last is {decoder.num_layers}"
            )
        result["models"][name] = {}
        for text, blocks in texts.items():
            found, agreement = read(decoder, blocks.to(options.device), result["layers"], f"{name}, {text}")
            losses[name, text] = found[-1]
            perplexity = [math.exp(loss) for loss in found.mean(1).tolist()]
            result["models"][name][text] = {"perplexity": perplexity, "agreement": agreement}
        write_json(options.out / "retrofit.json", result)
    result["last_layer_over_plain"] = {text: ratio(losses["retrofit", text], losses["plain", text]) for text in texts}
    result["last_layer_over_stock"] = {text: ratio(losses["retrofit", text], losses["stock", text]) for text in texts}
    write_json(options.out / "retrofit.json", result)
    return result


@torch.inference_mode()
def read(decoder: Decoder, blocks: Tensor, layers: list[int], name: str) -> tuple[Tensor, list[float]]:
    """Mean loss of each layer on each block [layers, blocks], and each layer's agreement with the last."""
    readouts = [read_exits(decoder, block[None], None, layers) for block in tqdm(blocks, desc=name)]
    losses = torch.stack([readout.losses.cpu().double().mean(1) for readout in readouts], 1)
    same = [(readout.predictions == readout.predictions[-1]).cpu().double().mean(1) for readout in readouts]
    return losses, torch.stack(same, 1).mean(1).tolist()


def ratio(losses: Tensor, base: Tensor) -> dict:
    """Ratio of perplexities, and its 95 % interval by the spread of the paired differences over blocks."""
    difference = losses - base
    margin = 1.96 * difference.std().item() / len(difference) ** 0.5
    mean = difference.mean().item()
    return {"ratio": math.exp(mean), "interval": [math.exp(mean - margin), math.exp(mean + margin)]}


def print_result(result: dict) -> None:
    title = f"Perplexity (agreement with the last layer) after {result['steps']} steps, {result['tokens']} tokens"
    table = Table(title=title, title_justify="left")
    for column in ("", *(f"layer {layer}" for layer in result["layers"])):
        table.add_column(column, justify="right" if column else "left")
    for model, texts in result["models"].items():
        for text, found in texts.items():
            cells = zip(found["perplexity"], found["agreement"], strict=True)
            table.add_row(f"{model}, {text}", *(f"{ppl:.3g} ({agree:.2f})" for ppl, agree in cells))
    console.print(table)
    for base in ("plain", "stock"):
        for text, found in result[f"last_layer_over_{base}"].items():
            low, high = found["interval"]
            console.print(f"last layer over {base}, {text}: {found['ratio']:.4f} ({low:.4f} to {high:.4f})")
    if result["prose_in_training"]:
        console.print("The prose is a file of the training split: its figures are not held out.")


if __name__ == "__main__":
    main(sys.argv[1:])
