"""`lskip export`: write a model as a transformers folder, its first layers as a draft model, and GGUF files."""

import copy
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile

import torch
from safetensors import SafetensorError
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.initialization import no_init_weights

from lskip.export import to_gguf as gguf_file
from lskip.export.model_card import NUM_SPECULATIONS, model_card
from lskip.models.decoder import Decoder
from lskip.models.draft_tokens import find_draft_tokens, keep_draft_tokens
from lskip.models.exit_heads import load_trained_exits
from lskip.models.families import family_of
from lskip.models.pretrained import find_source, load_config, load_model, load_tokenizer
from lskip.models.reading.config import with_layers
from lskip.models.reading.folder_checks import GENERATION_FILE
from lskip.utils.checks import check_whole
from lskip.utils.console import say, warn
from lskip.utils.devices import DType
from lskip.utils.finite import check_finite_weights
from lskip.utils.foreign import first_line, quietly
from lskip.utils.output_files import hidden_beside, only_writer
from lskip.utils.user_paths import user_path

DRAFT_FOLDER, GGUF_FILE, CARD_FILE = "draft", "model.gguf", "README.md"


def export(
    model: str,
    output: str,
    dtype: DType = "float32",
    exit_layer: int | None = None,
    num_speculations: int | None = None,
    draft: int | None = None,
    gguf: bool = False,
) -> None:
    """Write a model as a transformers folder: safetensors, config, generation_config, tokenizer, model card.

    `AutoModelForCausalLM.from_pretrained` loads it without lskip, and its `generate(assistant_early_exit=E)`
    decodes self-speculatively.

    Args:
        model: a run folder, a checkpoint, a folder, a hub name, a .gguf file, smollm2.
        output: folder to make; it must not exist yet, or be empty.
        dtype: of the weights in the files.
        exit_layer: blocks that draft, as the model card explains. (Not set in generation_config.json, since
            transformers would apply it to the draft too, which is slower than no draft.)
        num_speculations: tokens that transformers' `generate` drafts at a time, with exit_layer or draft; null: 4.
        draft: blocks of a draft model to write to output/draft: the first blocks, the final norm and the head, for
            decoders that take a draft model (vLLM, llama.cpp, transformers); null: none.
        gguf: write model.gguf into output, and into output/draft, for llama.cpp; Llama, Qwen2, Qwen3.

    Raises:
        ValueError: `output` is not empty or not writable, the model has fewer layers, or GGUF does not support it.
        FileNotFoundError: no such model.
    """
    folder = Path(os.path.abspath(user_path(output, "output")))
    with _partial(folder) as partial:
        config = load_config(model)
        drafts = {"exit_layer": exit_layer, "num_speculations": num_speculations, "draft": draft}
        _check_drafts(config, **drafts)
        source = _check_gguf(model, config) if gguf else None
        tokens = find_draft_tokens(None, model)
        loaded, tokenizer = load_model(model, dtype=getattr(torch, dtype))
        exits = load_trained_exits(model, Decoder(loaded))
        check_finite_weights(loaded)
        _set_drafts(loaded.generation_config, **drafts)
        parts = {folder.name: (loaded, partial)}
        if draft is not None:
            parts[f"{folder.name}-draft"] = first_layers(loaded, draft), partial / DRAFT_FOLDER
        with _written(folder):
            for name, (part, place) in parts.items():
                _save(part, tokenizer, place)
                if gguf:
                    gguf_file.write_gguf(part, place / GGUF_FILE, source or tokenizer, name)
            reader = AutoTokenizer if tokenizer is None else _tokenizer_reader(tokenizer, partial)
            card = model_card(model, folder.name, config, gguf=gguf, tokenizer_reader=reader.__name__, **drafts)
            if exits is not None:
                exits.save(partial)
            if tokens is not None:
                keep_draft_tokens(partial, tokens.listed)
            (partial / CARD_FILE).write_text(card, encoding="utf-8")
            # Renamed last, so that `output` is never a partial model.
            os.replace(partial, folder)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    advice = f"decode with it: lskip generate --model {folder} --prompt …"
    say(f"{folder}: {size / 1e6:,.1f} MB; {advice}")


def _save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, folder: Path) -> None:
    """Save model and tokenizer; generation settings separately, since transformers refuses to save some it loads."""
    settings, model.generation_config = model.generation_config, GenerationConfig()
    try:
        with quietly():
            model.save_pretrained(folder)
    finally:
        model.generation_config = settings
    settings.to_json_file(folder / GENERATION_FILE, use_diff=True)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def _tokenizer_reader(tokenizer: PreTrainedTokenizerBase, folder: Path) -> type:
    """Return the class of transformers that reads the tokenizer as it is; say so where that is not AutoTokenizer."""
    with quietly():
        read = AutoTokenizer.from_pretrained(folder)
    if type(read) is type(tokenizer):
        return AutoTokenizer
    own = type(tokenizer)
    others = f"transformers' AutoTokenizer reads this tokenizer by the rules of {type(read).__name__}"
    warn(f"{others}, so that some texts get other tokens; the model card reads it by {own.__name__}")
    return own


def _set_drafts(
    settings: GenerationConfig, exit_layer: int | None, num_speculations: int | None, draft: int | None
) -> None:
    if exit_layer is not None or draft is not None:
        # transformers' default of 20 is far too many for an exit.
        settings.num_assistant_tokens = num_speculations or NUM_SPECULATIONS


def first_layers(model: PreTrainedModel, num_layers: int) -> PreTrainedModel:
    """Return a model of the same family with the first `num_layers` blocks, the final norm and the head, all copied.

    Its logits are those of `model`'s exit after so many blocks.
    """
    with no_init_weights():
        config = with_layers(model.config, slice(num_layers))
        draft = AutoModelForCausalLM.from_config(config, dtype=model.dtype, trust_remote_code=False)
    weights = model.state_dict()
    draft.load_state_dict({name: weights[name] for name in draft.state_dict()})
    draft.tie_weights()  # no_init_weights leaves them untied
    draft.generation_config = copy.deepcopy(model.generation_config)
    draft.generation_config.assistant_early_exit = None  # the draft is the exit
    return draft.eval()


def _check_drafts(
    config: PreTrainedConfig, exit_layer: int | None, num_speculations: int | None, draft: int | None
) -> None:
    family, num_layers = family_of(config), config.num_hidden_layers
    for name, value in (("exit_layer", exit_layer), ("draft", draft)):
        if value is None:
            continue
        if not 1 <= value < num_layers:
            raise ValueError(f"{name}: {value} is not from 1 to {num_layers - 1}; the model has {num_layers} layers")
    if exit_layer is not None and not family.exits_in_transformers:
        name = config.model_type
        raise ValueError(f"exit_layer: transformers cannot leave a {name} at a layer; use draft in its place")
    if num_speculations is not None:
        check_whole("num_speculations", num_speculations, 1)
        if exit_layer is None and draft is None:
            raise ValueError(f"num_speculations: {num_speculations} is given, but neither exit_layer nor draft is")


def _check_gguf(model: str, config: PreTrainedConfig) -> Path | None:
    """Return the GGUF file that the model comes from, or None; ValueError if GGUF does not support the model."""
    found = find_source(model)
    source = Path(found.place) if found.kind == "gguf" else None
    if (reason := gguf_file.obstacle(config, source)) is None and source is None:
        reason = gguf_file.obstacle(config, load_tokenizer(model))
    if reason is not None:
        raise ValueError(f"gguf: this model cannot be written as GGUF ({reason})")
    return source


@contextmanager
def _partial(folder: Path) -> Iterator[Path]:
    """Lock `folder`, and yield a hidden folder beside it to write into first, which is removed afterwards."""
    if folder.is_symlink() or folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise ValueError(f"output: '{folder}' exists and is not an empty folder")
    partial = hidden_beside(folder, "partial")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        TemporaryFile(dir=folder.parent).close()
    except OSError as error:
        raise ValueError(f"output: cannot write '{folder}' ({error.strerror})") from error
    with only_writer(folder, "output"):
        shutil.rmtree(partial, ignore_errors=True)
        try:
            partial.mkdir()
            yield partial
        finally:
            shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def _written(folder: Path) -> Iterator[None]:
    """Turn errors of writing, such as a full disk, into a ValueError."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise ValueError(f"output: could not write '{folder}' ({first_line(error)})") from error
