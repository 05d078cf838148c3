"""The tokens of a stream, stored segment by segment as training comes to them, so that a run goes on where it was.

A segment is a TokenStore of the next documents of the stream. The one behind it is made while it is read; those well
before it are removed, since the stream may be larger than the disk. What is removed or not here (on another machine)
is made again from where it begins, a few numbers that a checkpoint keeps.
"""

import copy
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from datasets import IterableDataset

from lskip.data.cache import cached_folder, discard, locked
from lskip.data.encoders import READ_AHEAD, Encoder
from lskip.data.grouping import grouped
from lskip.data.packed_rows import TrainingRows
from lskip.data.rows import Row
from lskip.data.token_store import TokenStore, encoded_here, write_tokens
from lskip.utils.output_files import write_json

FIRST, LARGEST = 2**22, 2**26  # characters of a segment: the first soon lets training begin, later ones shuffle widely
KEPT = 3  # segments before the one that is made
PART = 2**20  # characters that are tokenized together
MOST_KNOWN = 1000  # segments whose beginning is noted
MOST_SHARDS = 256  # parts of the source that are put in another order in each epoch

Place = dict[str, Any]  # {"epoch", "shard", "state"}: of a document in the stream
BEGIN: Place = {"epoch": 0, "shard": 0, "state": None}


def _still(rows: Iterator[dict]) -> Iterator[dict]:
    """Yield the rows for as long as the process has not come to its end; RuntimeError then, which nobody sees."""
    for row in rows:
        if not threading.main_thread().is_alive():
            raise RuntimeError("the process ends")
        yield row


class Segment(NamedTuple):
    """Part of a stream.

    Attributes:
        number: from 0.
        first: rows of the stream before its first.
        begin: where its first document is.
    """

    number: int
    first: int
    begin: Place


class StreamReader:
    """Reads a stream from any place on; its parts are in another order in each epoch, a function of (seed, epoch).

    Attributes:
        end: the place behind what was read last.
    """

    def __init__(self, rows: IterableDataset, seed: int):
        self.rows, self.seed = rows, seed
        self.end = BEGIN

    def read(self, begin: Place, characters: int) -> Iterator[dict]:
        """Yield the rows from `begin` on, until there are so many characters or the epoch ends."""
        count, found = min(self.rows.num_shards, MOST_SHARDS), 0
        order = np.random.default_rng((self.seed, begin["epoch"])).permutation(count)
        for shard in range(begin["shard"], count):
            part = self.rows.shard(count, int(order[shard]))
            if shard == begin["shard"] and begin["state"] is not None:
                part.load_state_dict(begin["state"])
            for batch in part.iter(READ_AHEAD):  # by rows a loader's worker would get its share alone
                for values in zip(*batch.values(), strict=True):
                    yield dict(zip(batch, values, strict=True))
                    found += sum(len(value if isinstance(value, str) else repr(value)) for value in values)
                if found >= characters:
                    self.end = {**begin, "shard": shard, "state": part.state_dict()}
                    return
        self.end = {"epoch": begin["epoch"] + 1, "shard": 0, "state": None}


class StreamedTokens:
    """The rows of a stream by their numbers, in an order that is a function of the seed: shuffled in each segment.

    Any number of processes may read them; one at a time makes a segment, and all read the same files.

    Args:
        reader: of the source.
        documents: makes training documents of the rows of the source.
        encoder: of those.
        make_rows: makes rows of a segment's tokens.
        place: of the segments, a path whose name is continued.
    """

    def __init__(
        self,
        reader: StreamReader,
        documents: Callable[[Iterator[dict]], Iterator[dict]],
        encoder: Encoder,
        make_rows: Callable[[TokenStore], TrainingRows],
        place: Path,
    ):
        self.reader, self.documents, self.make_rows, self.place = reader, documents, make_rows, place
        # Threads share no tokenizer: one that encodes in two at once raises.
        self.encoder = type(encoder)(copy.deepcopy(encoder.tokenizer), encoder.limit)
        self.known = {0: Segment(0, 0, BEGIN)}
        self.open: tuple[Segment, Any, np.ndarray] | None = None

    def add(self, segments: list[list]) -> None:
        """Note where segments begin, as `around` returned them."""
        self.known.update({number: Segment(number, *more) for number, *more in segments})

    def around(self, row: int) -> list[list]:
        """Return where the segment of a row begins, and the one before it: what is needed to go on from there."""
        self._read_index()
        return [list(segment) for segment in self._before(row)[-2:]]

    def row(self, number: int) -> Row:
        """Return a row of the stream.

        Raises:
            ValueError: a whole epoch holds no row; and what reading the source raises.
        """
        if self.open is None or not 0 <= number - self.open[0].first < len(self.open[2]):
            self._open(number)
        segment, rows, order = self.open
        return rows[int(order[number - segment.first])]

    def _open(self, number: int) -> None:
        self._read_index()
        segment, epoch = self._before(number)[-1], None  # the rows before an epoch
        while True:
            rows = self._rows(segment)
            if number < segment.first + len(rows):
                break
            following = self.known[segment.number + 1]
            if following.begin["epoch"] > segment.begin["epoch"]:
                if following.first == epoch:
                    raise ValueError("source: the stream holds no training row of block_size tokens")
                epoch = following.first
            segment = following
        order = np.random.default_rng((self.reader.seed, segment.number)).permutation(len(rows))
        self.open = segment, rows, order
        # No daemon: one that is amid a library's code when Python ends brings it down. It ends itself then (`_still`).
        threading.Thread(target=self._make_ahead, args=(self.known[segment.number + 1],)).start()

    def _before(self, row: int) -> list[Segment]:
        """Return the known segments that begin at or before a row, in their order."""
        return sorted(segment for segment in list(self.known.values()) if segment.first <= row)

    def _rows(self, segment: Segment) -> TrainingRows:
        """Return the rows of a segment, made where they are not here; afterwards the next one is known."""
        with locked(self._path("lock")):
            return self._made(segment)

    def _make_ahead(self, segment: Segment) -> None:
        with suppress(Exception), locked(self._path("lock"), timeout=0):  # who needs it, tries again and raises
            self._made(segment)

    def _made(self, segment: Segment) -> TrainingRows:
        def write(folder: Path) -> None:
            raw = _still(self.reader.read(segment.begin, min(FIRST << segment.number, LARGEST)))
            parts = grouped(self.documents(raw), PART, PART)
            write_tokens(folder, self.encoder, encoded_here(parts, self.encoder))
            write_json(folder / "end.json", self.reader.end)

        path = cached_folder(self._path(str(segment.number)), write)
        rows = self.make_rows(TokenStore(path))
        self._read_index()
        if segment.number + 1 not in self.known:
            end = json.loads((path / "end.json").read_text())
            self.known[segment.number + 1] = Segment(segment.number + 1, segment.first + len(rows), end)
            write_json(self._path("json"), [list(known) for known in sorted(self.known.values())[-MOST_KNOWN:]])
        self._remove_before(segment.number - KEPT)
        return rows

    def _remove_before(self, number: int) -> None:
        for path in self.place.parent.glob(f"{self.place.name}-*"):
            told = path.name.rpartition("-")[2]
            if told.isdigit() and int(told) < number:
                discard(path)

    def _read_index(self) -> None:
        with suppress(OSError, ValueError, TypeError):
            self.add(json.loads(self._path("json").read_text()))

    def _path(self, end: str) -> Path:
        mark = "-" if end.isdigit() else "."
        return self.place.with_name(f"{self.place.name}{mark}{end}")
