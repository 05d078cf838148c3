"""Opening of a `source`: an embedded corpus, a local file or folder, or a dataset of the Hugging Face hub."""

import hashlib
import importlib.util
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from datasets import IterableDataset, config, load_dataset
from huggingface_hub import constants

from lskip.data.corpora import EMBEDDED, read_texts
from lskip.data.csv_rows import read_csv
from lskip.data.files import check_is_read, folder_files, kind_of
from lskip.data.json_rows import read_json
from lskip.utils.foreign import first_line
from lskip.utils.hub import hub_lacks
from lskip.utils.user_paths import near, user_path

NAMES = (*EMBEDDED, "home_assistant")
EXTENSION = re.compile(r"\.[A-Za-z]\w*$")

Rows = Iterable[dict]  # an IterableDataset where it is streamed


def local_path(source: str) -> Path | None:
    """Return the file or folder that `source` names; None for an embedded corpus and for a hub name.

    Raises:
        FileNotFoundError: `source` looks like a path (an extension, two separators, a leading . / or ~) that does not
            exist. ValueError: no file can have this name.
    """
    if source in NAMES:
        return None
    path = user_path(source, "source")
    if path.exists():
        return path
    name = source.split(":")[0]
    if source.startswith((".", "/", "~")) or "\\" in source or name.count("/") > 1 or EXTENSION.search(name):
        raise FileNotFoundError(
            f"source: no file or folder '{source}' (looked for {path.absolute()}){near(path, NAMES)}"
        )
    return None


def open_source(source: str, streaming: bool) -> tuple[Rows, str]:
    """Return the raw rows of `source`, and a cache key of their present content on this machine.

    Files are read when the rows are iterated; a data set of the hub is opened by `datasets.load_dataset`. With
    `streaming` either is an IterableDataset, and one of the hub has no key.

    Raises:
        ValueError: it cannot be read, or is of an unsupported kind.
    """
    if source in EMBEDDED:
        return open_files(source, EMBEDDED[source](), "text", streaming)
    if source == "home_assistant":
        return open_home_assistant()
    path = local_path(source)
    if path is None:
        return open_hub(source, streaming)
    if path.is_dir():
        return open_files(source, *folder_files(path), streaming)
    check_is_read(path)
    return open_files(source, [path], kind_of(path), streaming, lone=True)


def open_home_assistant() -> tuple[IterableDataset, str]:
    from lskip.data.home_assistant import content_key, read_pairs  # imports packages that only this source needs

    return IterableDataset.from_generator(read_pairs), content_key()


def check_packages(source: str) -> None:
    """Raise ValueError where an embedded corpus needs a package that is not installed."""
    needed = {"home_assistant_intents": "home-assistant-intents", "hassil": "hassil"}
    if source == "home_assistant" and any(importlib.util.find_spec(name) is None for name in needed):
        raise ValueError(f"source: for home_assistant, run: pip install {' '.join(needed.values())}")


def open_files(source: str, files: list[Path], kind: str, streaming: bool, lone: bool = False) -> tuple[Rows, str]:
    """Return rows and cache key of files of one kind; `lone`: the source names one file."""
    try:
        stats = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    except OSError as error:
        raise ValueError(f"source: cannot read '{error.filename}' ({error.strerror})") from error
    if kind != "text" and not any(size for _, size, _ in stats):
        raise ValueError(f"source: '{source}' is empty")
    key = hashlib.sha256(repr((stats, lone)).encode()).hexdigest()
    paths = [str(file) for file in files]
    if kind == "parquet":
        return load(source, kind, True, data_files=paths), key
    read = {"json": read_json, "csv": read_csv, "text": read_texts}[kind]
    if streaming:  # an IterableDataset, which distributes the files among workers
        return IterableDataset.from_generator(read, gen_kwargs={"paths": paths, "lone": lone}), key
    return FileRows(read, paths, lone), key


@dataclass
class FileRows:
    """An iterable over the rows of files, which are read at each iteration."""

    read: Callable[[list[str], bool], Iterator[dict]]
    paths: list[str]
    lone: bool

    def __iter__(self) -> Iterator[dict]:
        return self.read(self.paths, self.lone)


def open_hub(source: str, streaming: bool) -> tuple[Rows, str]:
    """Open `name`, `name:config` or `name:config:split` (`name::split`), by default the split "train"."""
    name, subset, split = [*source.split(":", 2), "", ""][:3]
    if not _was_fetched(name) and (reason := hub_lacks(name, "dataset")) is not None:
        place = f"which is no local path and not one of {list(NAMES)}"
        raise ValueError(f"source: cannot load '{source}', {place}, from the hub ({reason}){near(Path(name), NAMES)}")
    rows = load(source, name, streaming, name=subset or None, split=split or "train")
    return rows, "" if streaming else rows._fingerprint


def _was_fetched(name: str) -> bool:
    caches = (Path(config.HF_DATASETS_CACHE), "___"), (Path(constants.HF_HUB_CACHE), "--")
    return any((cache / f"{'datasets--' * (by == '--')}{name.replace('/', by)}").exists() for cache, by in caches)


def load(source: str, builder: str, streaming: bool, split: str = "train", **arguments) -> Rows:
    try:
        rows = load_dataset(builder, split=split, streaming=streaming, **arguments)
        next(iter(rows), None)  # opens a stream, so that its errors are raised here
        return rows
    except Exception as error:  # unrelated types for network, unknown names, bad JSON …
        cause = first_line(error.__cause__ or error)
        raise ValueError(f"source: cannot load '{source}': {cause}") from error
