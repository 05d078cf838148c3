"""`lskip data`: what a run would train on, row by row, before it does."""

from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import chain, groupby, islice
from typing import Literal, NamedTuple

import torch
from rich.text import Text
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lskip.data import TextData
from lskip.models.scored import NOT_SCORED
from lskip.utils.checks import check_whole
from lskip.utils.console import plain_console
from lskip.utils.untrusted import printable

COUNTED = 50  # batches
WIDEST = 24  # cells of the picture of a mask
COLOURS = {"scored": "bold green", "context": "yellow", "padding": "dim"}


def data(data: TextData, split: Literal["train", "val", "test"] = "train", show: int = 3) -> None:
    """Print rows of a data set as a run with these options gets them: documents, positions, mask, scored tokens.

    Documents, tokenizer and tokens stay in the cache, where a run with the same options finds them.

    Args:
        split: train in the order of training; val and test in theirs.
        show: rows to print, with the mask of the first; 0: the numbers alone.
    """
    check_whole("show", show, 0)
    data.setup("test" if split == "test" else "fit")
    loader = getattr(data, f"{split}_dataloader")()
    console = plain_console()
    batches = list(islice(loader, max(COUNTED, show)))
    size = f"{len(loader.dataset):,} rows" if hasattr(loader.dataset, "__len__") else "rows without end"
    console.print(f"{split}: {size}; {numbers_of(batches)}", soft_wrap=True)
    rows = list(islice(rows_of(batches), show))
    for number, row in enumerate(rows):
        console.print()
        console.print(described(row, number, data.tokenizer), soft_wrap=True)
    if rows:
        console.print(f"\nattention in row 0: each position, downwards, reads those marked\n{mask_of(rows[0])}")


class Row(NamedTuple):
    """A row of a batch.

    Attributes:
        ids, labels: [S].
        starts: of its documents, which do not read each other, the position in the row where each begins.
        end: behind the last scored token; what follows is padding.
    """

    ids: Tensor
    labels: Tensor
    starts: list[int]
    end: int

    @property
    def kinds(self) -> list[str]:
        """What each position is: scored, context or padding."""
        is_scored = (self.labels[: self.end] != NOT_SCORED).tolist()
        return [*("scored" if each else "context" for each in is_scored), *["padding"] * (len(self.ids) - self.end)]


def rows_of(batches: Iterable[dict[str, Tensor]]) -> Iterator[Row]:
    """Yield the rows of batches."""
    for batch in batches:
        ids, labels = batch["input_ids"], batch["labels"]
        places = batch.get("position_ids", torch.arange(ids.shape[1])[None]).expand_as(ids)
        for row in range(len(ids)):
            scored = (labels[row] != NOT_SCORED).nonzero()
            end = int(scored[-1]) + 1 if len(scored) else 0
            starts = [at for at in (places[row] == 0).nonzero()[:, 0].tolist() if at < end]
            yield Row(ids[row], labels[row], starts, end)


def numbers_of(batches: list[dict[str, Tensor]]) -> str:
    """Return how much of some batches is scored, and what is computed for it."""
    counts = Counter(chain.from_iterable(row.kinds for row in rows_of(batches)))
    tokens = counts["scored"] + counts["context"]
    scored, computed = counts["scored"] / max(tokens, 1), counts.total() / max(tokens, 1)
    return (
        f"in {len(batches)} batches {tokens:,} tokens, {scored:.0%} of them scored, "
        f"{computed:.2f} positions computed for each"
    )


def described(row: Row, number: int, tokenizer: PreTrainedTokenizerBase) -> Text:
    """Return a row's documents, each with its positions and its text, whose «scored» parts are marked."""
    kinds = row.kinds
    found = Text(f"row {number}: {len(kinds)} positions, {len(row.starts)} documents, {kinds.count('scored')} scored")
    for start, end in zip(row.starts, [*row.starts[1:], row.end], strict=True):
        found.append(f"\n  positions 0 to {end - start - 1}: ")
        for kind, places in groupby(range(start, end), kinds.__getitem__):
            text = printable(tokenizer.decode(row.ids[list(places)]).replace("\n", "⏎"))
            found.append(f"«{text}»" if kind == "scored" else text, COLOURS[kind])
    if padding := kinds.count("padding"):
        found.append(f"\n  padding: {padding}", COLOURS["padding"])
    return found


def mask_of(row: Row) -> str:
    """Return a picture of what each position reads, of as many cells as fit a screen."""
    size, cells = len(row.ids), min(WIDEST, len(row.ids))
    borders = [*row.starts, row.end]
    document = [sum(at >= border for border in borders) for at in range(size)]
    places = [cell * size // cells for cell in range(cells)]
    lines = ("".join("██" if key <= at and document[key] == document[at] else "··" for key in places) for at in places)
    return "\n".join(lines)
