"""`lskip inspect`: predictions of every layer, as a table, a figure, JSON, and a page token by token."""

import json
import os
import platform
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from matplotlib.image import imread
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from lskip.evaluation.layers.divergence import report_divergence
from lskip.evaluation.layers.divergence_figure import divergence_figure, print_divergence
from lskip.evaluation.layers.figure import image_of
from lskip.evaluation.layers.inspect_data import USUAL_BLOCK, DataOptions
from lskip.evaluation.layers.settling import Settling, read_settling, spellings
from lskip.evaluation.layers.settling_page import settling_page, token_ids
from lskip.inference.loading import resolve_device
from lskip.models.decoder import Decoder
from lskip.models.encoding import open_ended
from lskip.models.families import family_of
from lskip.models.pretrained import load_config, load_model
from lskip.models.scored import NOT_SCORED
from lskip.utils.checks import check_choice, check_whole
from lskip.utils.console import plain_console
from lskip.utils.devices import DTYPES, DType
from lskip.utils.interrupts import interrupt_explained
from lskip.utils.output_files import output_folder
from lskip.utils.user_paths import user_path

REPORT_FILE, FIGURE_FILE, PAGE_FILE = "report.json", "figure.png", "settling.html"


def inspect(
    output: str,
    data_options: DataOptions,
    model: str = "smollm2",
    text: str | None = None,
    text_tokens: int = 256,
    dtype: DType = "float32",
    device: str = "auto",
    overwrite: bool = False,
) -> None:
    """Show how far each layer of a model is from the last one: what early exits predict and could save.

    Prints a table and writes report.json, figure.png (also for TensorBoard) and settling.html, a page that shows
    token by token at which layer the prediction settles.

    Args:
        output: folder for what is written.
        data_options: which blocks of which data are read.
        model: a run folder, a checkpoint, an exported or downloaded folder, a hub name, a .gguf file, smollm2.
        text: the text of the page; null: the beginning of the data.
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
    check_choice("dtype", dtype, DTYPES)
    folder = _free(user_path(output, "output"), overwrite)
    place, documents = resolve_device(device), data_options.open()
    data_options = _fitting(load_config(model), data_options)
    with output_folder(folder), interrupt_explained("; nothing is written yet: the same command begins anew"):
        loaded, tokenizer = load_model(model, dtype=getattr(torch, dtype))
        if tokenizer is None:
            raise ValueError(f"model: {model!r} has no tokenizer to read the data with")
        decoder = Decoder(loaded.to(place))
        batches = documents.batches(tokenizer, data_options)
        shown = _beginning(batches[0]) if text is None else _encoded(text, tokenizer)
        report = report_divergence(decoder, tqdm(batches, desc="inspect", unit="batch", leave=False))
        settling = read_settling(decoder, shown[: min(text_tokens, decoder.context_length)])
        title = f"{model} on {data_options.name}, {report.positions:,} positions"
        print_divergence(report, plain_console(), title)
        read = {"model": model, "data": data_options.name, "block_size": data_options.block_size, "dtype": dtype}
        shown_by = f"{model} on {data_options.name if text is None else 'a text of yours'}"
        page = _page(settling, tokenizer, shown_by)
        _write(folder, {**read, **report.record()}, image_of(divergence_figure(report, title), dpi=130), page)
    plain_console().print(f"{folder}: {REPORT_FILE}, {FIGURE_FILE}, {PAGE_FILE}", soft_wrap=True)


def _free(folder: Path, overwrite: bool) -> Path:
    """Return the folder; ValueError if it holds a report already."""
    if (folder / REPORT_FILE).exists() and not overwrite:
        raise ValueError(f"output: '{folder}' holds a report; replace it by --overwrite true, or name another folder")
    return folder


def _fitting(config: PreTrainedConfig, options: DataOptions) -> DataOptions:
    """Return the options with a block_size; ValueError for an unsupported family, or a context shorter than a block."""
    family_of(config)
    longest = config.max_position_embeddings
    if options.block_size is None:
        return replace(options, block_size=min(USUAL_BLOCK, longest))
    if options.block_size > longest:
        raise ValueError(f"block_size: {options.block_size} is more than the {longest} tokens that the model can read")
    return options


def _beginning(batch: dict[str, Tensor]) -> Tensor:
    """Return the tokens of the first block [S], without the padding after the last scored one."""
    scored = (batch["labels"][0] != NOT_SCORED).nonzero()
    return batch["input_ids"][0, : int(scored.max()) + 1]


def _encoded(text: str, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    (ids,) = open_ended(tokenizer, [text])
    if len(ids) < 2:
        raise ValueError(f"text: {text!r} is too short, it needs 2 tokens: the second one is the first to be predicted")
    return torch.tensor(ids)


def _page(settling: Settling, tokenizer: PreTrainedTokenizerBase, title: str) -> str:
    words = spellings(tokenizer, token_ids(settling))
    return settling_page(settling, words, f"{title}, {len(settling.input_ids)} tokens")


def _write(folder: Path, report: dict, figure: bytes, page: str) -> None:
    """Write all files or, on a full disk, none; the report last, since it marks the folder as complete."""
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    with TemporaryDirectory(dir=folder, prefix=".unfinished-") as name:
        unfinished = Path(name)
        (unfinished / FIGURE_FILE).write_bytes(figure)
        (unfinished / PAGE_FILE).write_text(page, encoding="utf-8")
        with SummaryWriter(name) as writer:
            writer.add_image("inspect/divergence", imread(unfinished / FIGURE_FILE), dataformats="HWC")
        (unfinished / REPORT_FILE).write_text(json.dumps({**versions, **report}, indent=2) + "\n", encoding="utf-8")
        for path in sorted(unfinished.iterdir(), key=lambda path: path.name == REPORT_FILE):
            os.replace(path, folder / path.name)
