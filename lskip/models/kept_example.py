"""The folder where the example model is kept, de-quantized: to read its GGUF file takes seconds, at every command."""

import hashlib
import json
import shutil
import tempfile
from pathlib import Path

import transformers
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lskip.utils.foreign import quietly
from lskip.utils.output_files import make_writable, write_json
from lskip.utils.user_paths import user_path

EXAMPLE = "smollm2"
SIZES = "sizes.json"  # of the files beside it
CACHE = "~/.cache/lskip/models"


def kept_folder(file: str) -> Path | None:
    """Return the folder for the model of a GGUF file, as this transformers reads it; None: it cannot be written."""
    about = Path(file).stat()
    key = [file, about.st_size, about.st_mtime_ns, transformers.__version__]
    try:
        folder = user_path(CACHE, "model")
        make_writable(folder, "model")
    except ValueError:  # a home that cannot be written: nothing that the user asked for
        return None
    return folder / hashlib.sha256(repr(key).encode()).hexdigest()[:24]


def is_whole(folder: Path) -> bool:
    """Return whether the folder has all files that were kept in it, as long as they were."""
    try:
        sizes = json.loads((folder / SIZES).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return sizes == _sizes(folder)


def _sizes(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in sorted(folder.iterdir()) if path.name != SIZES}


def keep(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write the model into the folder, in one step; a full disk leaves none, and is no error."""
    part = Path(tempfile.mkdtemp(dir=folder.parent))
    try:
        with quietly():
            model.save_pretrained(part)
            tokenizer.save_pretrained(part)
        write_json(part / SIZES, _sizes(part))
        part.rename(folder)
    except OSError:  # or another process was first
        shutil.rmtree(part, ignore_errors=True)
