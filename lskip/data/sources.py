"""What `source` can name: an embedded corpus, a local file or folder, a dataset of the Hugging Face hub."""

import hashlib
import importlib.util
import re
from pathlib import Path

from datasets import Dataset, IterableDataset, load_dataset
from lightning.pytorch.utilities import rank_zero_warn

from lskip.data.corpora import EMBEDDED, files_below, read_texts

NAMES = (*EMBEDDED, "home_assistant")
TABLES = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}
FOLDER_TABLES = (".jsonl", ".parquet")  # a .json among source files is a setting more often than a corpus
EXTENSION = re.compile(r"\.[A-Za-z]\w*$")

Rows = Dataset | IterableDataset


def local_path(source: str) -> Path | None:
    """The file or folder that `source` names; None for an embedded corpus and for a hub name.

    Raises:
        FileNotFoundError: `source` looks like a path (an extension, two separators, a leading . / or ~)
            and nothing is there.
    """
    if source in NAMES:
        return None
    path = Path(source).expanduser()
    if path.exists():
        return path
    name = source.split(":")[0]
    if source.startswith((".", "/", "~")) or "\\" in source or name.count("/") > 1 or EXTENSION.search(name):
        raise FileNotFoundError(f"source: no file or folder '{source}' (looked for {path.absolute()})")
    return None


def open_source(source: str, streaming: bool, cache: Path) -> tuple[Rows, str]:
    """(rows, key): the raw rows of `source`, and a name for their present content on this machine.

    Plain text comes as an IterableDataset of {"text"} that reads the files when iterated; tables come as
    `datasets.load_dataset` gives them (an IterableDataset, without key, when `streaming`).
    """
    if source in EMBEDDED:
        return open_texts(source, EMBEDDED[source]())
    if source == "home_assistant":
        return open_home_assistant()
    path = local_path(source)
    if path is None:
        return open_hub(source, streaming)
    if path.is_file():
        files, is_table = [path], path.suffix in TABLES
    else:
        files, is_table = folder_files(path)
    return open_tables(source, files, streaming, cache) if is_table else open_texts(source, files)


def open_home_assistant() -> tuple[IterableDataset, str]:
    from lskip.data.home_assistant import content_key, read_pairs  # needs packages that only this source needs

    return IterableDataset.from_generator(read_pairs), content_key()


def check_packages(source: str) -> None:
    """ValueError where an embedded corpus needs a package that is not here."""
    needed = {"home_assistant_intents": "home-assistant-intents", "hassil": "hassil"}
    if source == "home_assistant" and any(importlib.util.find_spec(name) is None for name in needed):
        raise ValueError(f"source: for home_assistant, run: pip install {' '.join(needed.values())}")


def folder_files(folder: Path) -> tuple[list[Path], bool]:
    """(files, whether they are tables) of a folder, by what most of its files are; the others are left out."""
    files = files_below(folder, skipped={"__pycache__"})
    tables = [file for file in files if file.suffix in FOLDER_TABLES]
    texts = [file for file in files if file.suffix not in FOLDER_TABLES]
    kept, left_out = (tables, texts) if len(tables) > len(texts) else (texts, tables)
    if left_out:
        rank_zero_warn(f"source: folder '{folder}': {len(left_out)} files left out, such as {left_out[0].name}")
    kinds = sorted({file.suffix for file in kept})
    if kept is tables and len(kinds) > 1:
        raise ValueError(f"source: folder '{folder}' holds {' and '.join(kinds)} files; name a folder with one kind")
    return kept, kept is tables


def open_texts(source: str, files: list[Path]) -> tuple[IterableDataset, str]:
    if not files:
        raise ValueError(f"source: '{source}' holds no text files")
    rows = IterableDataset.from_generator(read_texts, gen_kwargs={"paths": [str(file) for file in files]})
    stats = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return rows, hashlib.sha256(repr(stats).encode()).hexdigest()


def open_tables(source: str, files: list[Path], streaming: bool, cache: Path) -> tuple[Rows, str]:
    if not any(file.stat().st_size for file in files):
        raise ValueError(f"source: '{source}' is empty")
    paths = [str(file) for file in files]
    return load(source, TABLES[files[0].suffix], streaming, data_files=paths, cache_dir=str(cache / "datasets"))


def open_hub(source: str, streaming: bool) -> tuple[Rows, str]:
    """`name`, `name:config` or `name:config:split` (`name::split`); the split is "train" if none is named."""
    name, config, split = [*source.split(":", 2), "", ""][:3]
    return load(source, name, streaming, name=config or None, split=split or "train")


def load(source: str, builder: str, streaming: bool, split: str = "train", **arguments) -> tuple[Rows, str]:
    try:
        rows = load_dataset(builder, split=split, streaming=streaming, **arguments)
    except Exception as error:  # network, unknown name, config or split, bad JSON: each its own unrelated type
        cause = first_line(error.__cause__ or error)
        place = "" if builder in TABLES.values() else f", which is no local path and not one of {list(NAMES)}"
        raise ValueError(f"source: cannot load '{source}'{place}: {cause}") from error
    return rows, "" if streaming else rows._fingerprint


def first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__
