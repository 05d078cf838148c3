"""The folder where the example model is kept, de-quantized: to read its GGUF file takes seconds, at every command."""

import hashlib
import shutil
import tempfile
from pathlib import Path

import transformers
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lskip.utils.foreign import quietly
from lskip.utils.output_files import make_writable
from lskip.utils.user_paths import user_path

EXAMPLE = "smollm2"
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


def keep(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write the model into the folder, in one step; a full disk leaves none, and is no error."""
    part = Path(tempfile.mkdtemp(dir=folder.parent))
    try:
        with quietly():
            model.save_pretrained(part)
            tokenizer.save_pretrained(part)
        part.rename(folder)
    except OSError:  # or another process was first
        shutil.rmtree(part, ignore_errors=True)
