"""Seconds of a round of decoding: a table measured once per model and machine, and the cost model on top of it."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from statistics import median
from time import perf_counter
from typing import Any

import torch

from lskip.inference.runners.base import ModelRunner
from lskip.inference.runners.draft_head import DraftHead, DraftHeadRunner
from lskip.utils.checks import check_whole, is_real

ROWS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
CONTEXT, FAR = 128, 1024  # positions that the measured rows attend to, besides each other
REPEATS = 9
BUSY = 1.5  # times as long as now, from which on a machine was busy when its costs were measured
QUICK = 0.3  # seconds of a pass, up to which it is repeated to see how fast the machine is now


OPTIONAL = ("draft_head", "far")  # of RowCosts


@dataclass(frozen=True)
class RowCosts:
    """Seconds by number of rows, for one set of weights.

    Attributes:
        rows: measured numbers of rows, ascending.
        block: seconds of one block over so many rows (the mean over all blocks).
        head: seconds of final norm, head and argmax over so many rows.
        draft_head: the same with the head of few tokens that drafts are decoded with; None: they have the whole head.
        far: seconds of one block over so many rows that attend to FAR positions, not to CONTEXT; None: not measured.
    """

    rows: tuple[int, ...]
    block: tuple[float, ...]
    head: tuple[float, ...]
    draft_head: tuple[float, ...] | None = None
    far: tuple[float, ...] | None = None

    def __post_init__(self):
        """Raise ValueError unless there are two numbers of rows or more, ascending, with a time above 0 each."""
        for count in self.rows:
            check_whole("rows", count, 1)
        if len(self.rows) < 2 or any(a >= b for a, b in zip(self.rows, self.rows[1:], strict=False)):
            raise ValueError(f"rows: {list(self.rows)} are not two or more ascending numbers")
        for name in ("block", "head", *OPTIONAL):
            seconds = getattr(self, name)
            if seconds is None and name in OPTIONAL:
                continue
            if len(seconds) != len(self.rows):
                raise ValueError(f"{name}: has {len(seconds)} times for {len(self.rows)} numbers of rows")
            for value in seconds:
                if not is_real(value) or value <= 0:
                    raise ValueError(f"{name}: {value!r} is not a number of seconds above 0")

    def at(self, positions: int) -> RowCosts:
        """Return the times of rows that attend to so many positions: on the line through CONTEXT and FAR."""
        if self.far is None:
            return self
        share = max(0.0, (positions - CONTEXT) / (FAR - CONTEXT))
        more = (max(0.0, far - near) for near, far in zip(self.block, self.far, strict=True))
        return replace(self, block=tuple(near + share * each for near, each in zip(self.block, more, strict=True)))

    def block_seconds(self, rows: int) -> float:
        """Return the seconds of one block over `rows` rows."""
        return self._between(self.block, rows)

    def head_seconds(self, rows: int) -> float:
        """Return the seconds of final norm, head and argmax over `rows` rows."""
        return self._between(self.head, rows)

    def token_seconds(self, blocks: int, rows: int) -> float:
        """Return the seconds of predicting a token in each of `rows` rows after `blocks` blocks."""
        return blocks * self.block_seconds(rows) + self.head_seconds(rows)

    def draft_seconds(self, blocks: int, rows: int) -> float:
        """Return the same with the head of a draft."""
        head = self.head if self.draft_head is None else self.draft_head
        return blocks * self.block_seconds(rows) + self._between(head, rows)

    def _between(self, seconds: tuple[float, ...], rows: int) -> float:
        """Return what lies on the line between two measured numbers of rows, or beyond the last."""
        index = bisect_left(self.rows, rows)
        if index < len(self.rows) and self.rows[index] == rows:
            return seconds[index]
        if index == len(self.rows):
            # A slope over the upper half of the table, since neighbours may differ by less than their error.
            low, high = min(bisect_left(self.rows, self.rows[-1] / 2), index - 2), index - 1
            slope = max(0.0, self._slope(seconds, low, high))
        else:
            high = max(index, 1)
            slope = self._slope(seconds, high - 1, high)
        return seconds[high] + slope * (rows - self.rows[high])

    def _slope(self, seconds: tuple[float, ...], low: int, high: int) -> float:
        return (seconds[high] - seconds[low]) / (self.rows[high] - self.rows[low])


@dataclass(frozen=True)
class Costs:
    """Cost model of a round, in seconds, from bare calls of blocks and head.

    Attributes:
        num_layers: L.
        model: times of the model's weights.
        draft: times of the draft weights; None where there are none.
        adapter: times of an exit adapter's blocks and head; None where there is none.
        adapter_blocks: A.
    """

    num_layers: int
    model: RowCosts
    draft: RowCosts | None = None
    adapter: RowCosts | None = None
    adapter_blocks: int = 0

    def at(self, positions: int) -> Costs:
        """Return the costs of rounds of texts that are so many tokens long."""
        model, *others = (each and each.at(positions) for each in (self.model, self.draft, self.adapter))
        return Costs(self.num_layers, model, *others, self.adapter_blocks)

    def verify(self, done: int, rows: int) -> float:
        """Return the seconds of one pass over `rows` rows, of which the first `done` blocks have been run."""
        return self.model.token_seconds(self.num_layers - done, rows)

    def plain(self, slots: int) -> float:
        """Return the seconds of a round that drafts nothing: one token a slot through all blocks."""
        return self.verify(0, slots)

    def to_dict(self) -> dict[str, Any]:
        """Return the costs in plain types, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, saved: Any) -> Costs:
        """Return the costs that `to_dict` gave, after JSON or not.

        Raises:
            ValueError: what is missing or wrong, in one sentence.
        """
        fields = fields_of(saved, "costs", ("num_layers", "model", "draft", "adapter", "adapter_blocks"))
        try:
            check_whole("num_layers", fields["num_layers"], 1)
            check_whole("adapter_blocks", fields["adapter_blocks"], 0 if fields["adapter"] is None else 1)
            for name in ("model", "draft", "adapter"):
                if name == "model" or fields[name] is not None:
                    fields[name] = _row_costs(fields[name])
            return cls(**fields)
        except ValueError as error:
            raise ValueError(f"costs: cannot be used ({error}); measure them again") from None


def _row_costs(saved: Any) -> RowCosts:
    found: tuple[str, ...] = ()
    if isinstance(saved, dict):  # what is optional may be null, or a file is from before it was measured
        found = tuple(name for name in OPTIONAL if saved.get(name) is not None)
        saved = {name: value for name, value in saved.items() if name not in OPTIONAL or name in found}
    fields = fields_of(saved, "model, draft or adapter", ("rows", "block", "head", *found))
    for name, value in fields.items():
        if not isinstance(value, list | tuple):
            raise ValueError(f"{name}: {value!r} is not a list")
    return RowCosts(**{name: tuple(value) for name, value in fields.items()})


def fields_of(saved: Any, name: str, expected: tuple[str, ...]) -> dict[str, Any]:
    """Return `saved` with its keys in `expected` order; ValueError, which begins with `name`, for other keys."""
    if not isinstance(saved, dict) or set(saved) != set(expected):
        found = repr(list(saved) if isinstance(saved, dict) else saved)[:80]
        raise ValueError(f"{name}: {found} is not a table of {', '.join(expected)}")
    return {key: saved[key] for key in expected}


@torch.inference_mode()
def measure_costs(
    runner: ModelRunner,
    draft_runner: ModelRunner | None = None,
    seconds: float = 4.0,
    adapter_runner: ModelRunner | None = None,
    draft_head: DraftHead | None = None,
) -> Costs:
    """Time blocks and head of each runner over growing numbers of rows, in about `seconds` or less.

    Returns medians of up to 9 rounds, each of which times everything once, so that a busy spell of the machine
    meets all alike. On a slow model the larger numbers of rows are left out.
    """
    begin = perf_counter()
    by_name = {"model": runner, "draft": draft_runner, "adapter": adapter_runner}
    heads = {"model": draft_head, "draft": draft_head}
    timers = {name: Timer(each, heads.get(name)) for name, each in by_name.items() if each is not None}
    for timer in timers.values():
        timer.choose_rows(seconds / 3 / len(timers))
    for _ in range(REPEATS):
        round_begin = perf_counter()
        for timer in timers.values():
            timer.time_all()
        now = perf_counter()
        if now - begin + (now - round_begin) > seconds:
            break
    times = {name: timer.medians() for name, timer in timers.items()}
    return Costs(runner.num_layers, **times, adapter_blocks=blocks_of(adapter_runner))


@torch.inference_mode()
def measured_while_busy(costs: Costs, runner: ModelRunner, draft_runner: ModelRunner | None) -> bool:
    """Return whether one row takes much less now than it did then, in the model's blocks or in those that draft.

    Costs of a busy machine say little of a quiet one: passes of all sizes then take about as long.
    """
    for known, each in ((costs.model, runner), (costs.draft, draft_runner)):
        if known is None or each is None:
            continue
        timer, kept = Timer(each), known.block_seconds(1) * each.num_layers
        passes = [timer.time(1, (CONTEXT,))[0]]  # also pays for what is made on demand
        while len(passes) < 4 and passes[-1] < QUICK:
            passes.append(timer.time(1, (CONTEXT,))[0])
        if kept > BUSY * min(passes):
            return True
    return False


def blocks_of(runner: ModelRunner | None) -> int:
    """Return its number of blocks; 0 for None."""
    return 0 if runner is None else runner.num_layers


class Timer:
    """Timer of one runner's bare passes, with a cache of one slot, and of a draft's head on its states."""

    def __init__(self, runner: ModelRunner, draft_head: DraftHead | None = None):
        self.runner = runner
        self.readers = [runner] if draft_head is None else [runner, DraftHeadRunner(runner, draft_head)]
        self.cache = runner.new_cache(1, FAR + ROWS[-1])
        self.samples: dict[int, list[tuple[float, ...]]] = {}

    def choose_rows(self, seconds: float) -> None:
        """Warm up with one pass of each number of rows, from few to many, until `seconds` are about to be over."""
        self.time(ROWS[0])  # the first pass also pays for what is made on demand
        spent = a_row = 0.0
        for rows in ROWS:
            # `a_row` bounds the time of a row in a larger pass from above. A line needs two points.
            if len(self.samples) >= 2 and spent + rows * a_row > seconds:
                break
            self.samples[rows] = []
            last = sum(self.time(rows))
            spent, a_row = spent + last, last / rows

    def time_all(self) -> None:
        """Take one more sample of each chosen number of rows."""
        for rows, samples in self.samples.items():
            samples.append(self.time(rows))

    def time(self, rows: int, contexts: tuple[int, ...] = (CONTEXT, FAR)) -> tuple[float, ...]:
        """Return the seconds of all blocks behind each of `contexts` positions, and of each head, over `rows` rows."""
        runner = self.runner
        x = runner.embed(torch.zeros(1, rows, dtype=torch.long, device=runner.device), [0])
        times = [self._now()]
        for positions in contexts:
            runner.run(x, self.cache, [positions], 0, runner.num_layers)
            times.append(self._now())
        # The head is timed on the embeddings: behind an empty cache the blocks' output is unlike any text's, with all
        # tokens about as probable, so that a screened head could rule none out.
        for reader in self.readers:
            if reader.argmax(x) is None:
                reader.decode(x).argmax(-1)
            times.append(self._now())
        return tuple(end - begin for begin, end in pairwise(times))

    def medians(self) -> RowCosts:
        """Return the medians of all samples so far."""
        found = (map(median, zip(*samples, strict=True)) for samples in self.samples.values())
        runs, far, *heads = zip(*found, strict=True)
        block, far = (tuple(each / self.runner.num_layers for each in passes) for passes in (runs, far))
        return RowCosts(tuple(self.samples), block, *heads, far=far)

    def _now(self) -> float:
        if self.runner.device.type != "cpu":
            torch.accelerator.synchronize(self.runner.device)  # the device works on after a call has returned
        return perf_counter()
