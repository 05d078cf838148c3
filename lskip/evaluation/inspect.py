"""`lskip inspect`: what every layer of a model would say, as table, figure, JSON and one page token by token."""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import Literal

import torch
from matplotlib.image import imread
from rich.console import Console
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from lskip.checks import check_whole
from lskip.data.packing import NOT_SCORED
from lskip.data.text_tokens import open_ended
from lskip.decoder import Decoder
from lskip.evaluation.divergence import DivergenceReport, report_divergence
from lskip.evaluation.divergence_figure import divergence_figure, print_divergence
from lskip.evaluation.inspect_data import DataOptions
from lskip.evaluation.settling import Settling, read_settling, spellings
from lskip.evaluation.settling_page import settling_page, token_ids
from lskip.families import family_of
from lskip.inference.loading import resolve_device
from lskip.output_files import make_writable
from lskip.pretrained import load_config, load_model

REPORT_FILE, FIGURE_FILE, PAGE_FILE = "report.json", "figure.png", "settling.html"


def inspect(
    output: str,
    data_options: DataOptions,
    model: str = "smollm2",
    text: str | None = None,
    text_tokens: int = 256,
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    device: str = "auto",
    overwrite: bool = False,
) -> None:
    """Show how far each layer of a model is from the last one: what early exits would say and could save.

    Prints a table and writes report.json, figure.png (also for TensorBoard) and settling.html, a page that shows
    token by token at which layer the prediction settles.

    Args:
        output: folder for what is written.
        data_options: which blocks of which data are read.
        model: a run folder, a checkpoint, an exported or downloaded folder, a hub name, a .gguf file, smollm2.
        text: what the page shows; null: the beginning of the data.
        text_tokens: tokens of the page, at most.
        dtype: of the weights in memory.
        device: cpu, cuda …; auto takes a GPU where there is one.
        overwrite: replace the report that output holds.

    Raises:
        ValueError, FileNotFoundError: one sentence that names the argument.
    """
    check_whole("text_tokens", text_tokens, 2)
    if text == "":
        raise ValueError("text: is empty; give some text, or null for the beginning of the data")
    place, documents, folder = resolve_device(device), data_options.open(), _prepare(Path(output), overwrite)
    _check_model(load_config(model), data_options.block_size)
    loaded, tokenizer = load_model(model, dtype=getattr(torch, dtype))
    if tokenizer is None:
        raise ValueError(f"model: {model!r} has no tokenizer to read the data with")
    decoder = Decoder(loaded.to(place))
    batches = documents.batches(tokenizer, data_options)
    shown = _beginning(batches[0]) if text is None else _encoded(text, tokenizer)

    report = report_divergence(decoder, tqdm(batches, desc="inspect", unit="batch", leave=False))
    read = {"model": model, "data": data_options.name, "block_size": data_options.block_size, "dtype": dtype}
    _write_report(folder, report, read)
    settling = read_settling(decoder, shown[: min(text_tokens, decoder.context_length)])
    _write_page(folder, settling, tokenizer, f"{model} on {data_options.name if text is None else 'a text of yours'}")
    print(f"{folder}: {REPORT_FILE}, {FIGURE_FILE}, {PAGE_FILE}")


def _prepare(folder: Path, overwrite: bool) -> Path:
    """The folder, made if need be; ValueError where it holds a report or cannot be written."""
    if (folder / REPORT_FILE).exists() and not overwrite:
        raise ValueError(f"output: '{folder}' holds a report; replace it by --overwrite true, or name another folder")
    make_writable(folder)
    return folder


def _check_model(config: PreTrainedConfig, block_size: int) -> None:
    """ValueError if it is of a family that is not covered, or its context is shorter than a block."""
    family_of(config)
    longest = config.max_position_embeddings
    if block_size > longest:
        raise ValueError(f"block_size: {block_size} is more than the {longest} tokens that the model can read")


def _beginning(batch: dict[str, Tensor]) -> Tensor:
    """The first block's tokens [S], without what fills it up behind the last that is scored."""
    scored = (batch["labels"][0] != NOT_SCORED).nonzero()
    return batch["input_ids"][0, : int(scored.max()) + 1]


def _encoded(text: str, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    (ids,) = open_ended(tokenizer, [text])
    if len(ids) < 2:
        raise ValueError(f"text: {text!r} is too short, it needs 2 tokens: the second one is the first to be predicted")
    return torch.tensor(ids)


def _write_report(folder: Path, report: DivergenceReport, read: dict) -> None:
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    text = json.dumps({**read, **versions, **report.record()}, indent=2, ensure_ascii=False)
    (folder / REPORT_FILE).write_text(text + "\n", encoding="utf-8")
    title = f"{read['model']} on {read['data']}, {report.positions:,} positions"
    print_divergence(report, Console(), title)
    divergence_figure(report, title).savefig(folder / FIGURE_FILE, dpi=130)
    with SummaryWriter(str(folder)) as writer:
        writer.add_image("inspect/divergence", imread(folder / FIGURE_FILE), dataformats="HWC")


def _write_page(folder: Path, settling: Settling, tokenizer: PreTrainedTokenizerBase, title: str) -> None:
    words = spellings(tokenizer, token_ids(settling))
    page = settling_page(settling, words, f"{title}, {len(settling.input_ids)} tokens")
    (folder / PAGE_FILE).write_text(page, encoding="utf-8")
