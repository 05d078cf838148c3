"""The tokens of a split's documents in flat files, without rows: written once, read memory-mapped at any block size."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from itertools import chain, islice
from pathlib import Path

import numpy as np
from datasets import Dataset
from datasets.utils import tqdm

from lskip.data.cache import cached_folder
from lskip.data.encoders import Arrays, Encoder, encoded
from lskip.data.grouping import grouped
from lskip.utils.worker_processes import WorkerProcesses, available_cores

PART = 2**20  # characters of documents that are tokenized by one process before another's turn
MOST_PROCESSES = 32  # each holds a tokenizer and a hundred megabytes of libraries; this one reads what they write
FEW_PARTS = 4  # are tokenized here: processes take a second to start
MOST_OF_AN_EXAMPLE = 2**24  # tokens: no row is longer


class TokenStore:
    """Tokens of documents, one document after the other.

    Attributes:
        tokens: [tokens], memory-mapped, unsigned.
        ends: int64 [documents], memory-mapped: where in `tokens` each document ends.
        scored: bool [tokens], memory-mapped; None: all are.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.tokens = _opened(next(folder.glob("tokens.*")))
        self.ends = _opened(folder / "ends.int64")
        scored = folder / "scored.bool"
        self.scored = _opened(scored) if scored.is_file() else None

    def __len__(self) -> int:
        return len(self.ends)

    def place(self, document: int) -> tuple[int, int]:
        """Return where in `tokens` a document begins and ends."""
        return int(self.ends[document - 1]) if document else 0, int(self.ends[document])

    def __reduce__(self):
        return TokenStore, (self.folder,)  # a process that loads batches maps the files itself


def _opened(path: Path) -> np.ndarray:
    kind = np.dtype(path.suffix[1:])
    # An empty file cannot be mapped. Of a memmap each slice would be one, ten times as slow to make.
    return np.asarray(np.memmap(path, kind, "r")) if path.stat().st_size else np.zeros(0, kind)


def stored_tokens(documents: Dataset, encoder: Encoder, folder: Path, split: str) -> TokenStore:
    """Return the tokens of all documents, from `folder` where they are cached, else made and written there.

    Where there is much to do, a process for each core tokenizes.

    Args:
        split: for the progress bar.
    """

    def write(target: Path) -> None:
        with tqdm(total=len(documents), desc=f"Tokenizing {split}", unit="") as progress:
            write_tokens(target, encoder, encoded_parts(documents, encoder), progress.update)

    return TokenStore(cached_folder(folder, write))


def write_tokens(
    folder: Path, encoder: Encoder, parts: Iterable[Arrays], report: Callable[[int], object] | None = None
) -> None:
    """Write the files of a TokenStore.

    Args:
        parts: of the documents, as `encoded` makes them.
        report: called with the number of documents of each part that is written.
    """
    largest = max(encoder.tokenizer.get_vocab().values())
    kind = np.dtype(np.uint16 if largest < 2**16 else np.uint32)
    names = [f"tokens.{kind.name}", "ends.int64", *(["scored.bool"] if encoder.marks_scored else [])]
    with ExitStack() as stack:
        files, end = [stack.enter_context((folder / name).open("wb")) for name in names], 0
        for tokens, lengths, *scored in parts:
            ends = end + lengths.cumsum(dtype=np.int64)
            for file, part in zip(files, (tokens.astype(kind), ends, *scored), strict=True):
                file.write(part.data)
            end = int(ends[-1])
            if report is not None:
                report(len(lengths))


def encoded_parts(documents: Dataset, encoder: Encoder) -> Iterator[Arrays]:
    """Yield the tokens, the lengths and, where it is told, which tokens are scored of documents, part by part."""
    processes = min(available_cores(), MOST_PROCESSES)
    parts = grouped(documents, len(documents), PART)
    few = list(islice(parts, FEW_PARTS + 1))
    if processes < 2 or len(few) <= FEW_PARTS:
        yield from encoded_here(chain(few, parts), encoder)
        return
    with WorkerProcesses(processes, encoded, encoder) as workers:
        for arrays, spelled in workers.map(chain(few, parts)):
            encoder.spelled = encoder.spelled or spelled
            encoder.warn()
            yield arrays


def encoded_here(parts: Iterable[list[dict]], encoder: Encoder) -> Iterator[Arrays]:
    """Yield the arrays of each part of the documents, made in this process."""
    for part in parts:
        yield encoded(encoder, part)[0]
        encoder.warn()
