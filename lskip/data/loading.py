"""Loader and sampler whose order is a function of (seed, batch number), so that runs resume exactly."""

import time
from collections.abc import Callable, Iterator, Sequence, Sized
from itertools import count

import numpy as np
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info
from torch.utils.data.distributed import DistributedSampler

from lskip.data.mixture import Endless
from lskip.data.rows import Row
from lskip.models.scored import NOT_SCORED

WINDOW = 16  # batches whose rows are sorted by length together


class ResumableLoader(DataLoader):
    """A loader without state, since its sampler or data set knows where to begin.

    Lightning warns about loaders without these two methods on every resume.

    Attributes:
        seconds_waited: for batches, in all.
    """

    seconds_waited = 0.0

    def __iter__(self) -> Iterator[dict]:
        batches = super().__iter__()
        while True:
            began = time.perf_counter()
            batch = next(batches, None)
            self.seconds_waited += time.perf_counter() - began
            if batch is None:
                return
            yield batch

    def state_dict(self) -> dict:
        return {}

    def load_state_dict(self, state: dict) -> None:
        pass


class ResumableSampler(DistributedSampler):
    """Row indices of batches n, n + 1, … where n = `position()` when iteration begins.

    Batch n is a slice of the permutation of (seed, n // batches_per_epoch), so that an interrupted run has the order of
    an uninterrupted one, whatever `limit_train_batches` makes of an epoch. Each rank takes its own `batch_size` rows of
    the slice. Rows that do not fill a batch on every rank are left out of that epoch. Lightning does not replace it,
    since it is a DistributedSampler.

    With `lengths`, batches have rows of similar length and so little padding: rows are sorted within each WINDOW
    batches of the permutation, and the resulting batches are shuffled.
    """

    def __init__(
        self,
        rows: Sized,
        batch_size: int,
        seed: int,
        position: Callable[[], int],
        num_replicas: int = 1,
        rank: int = 0,
        lengths: np.ndarray | None = None,
    ):
        super().__init__(rows, num_replicas=num_replicas, rank=rank, seed=seed, drop_last=True)
        self.batch_size = batch_size
        self.position = position
        self.lengths = lengths
        self.batches_per_epoch = len(rows) // (batch_size * num_replicas)

    def __len__(self) -> int:
        return self.batches_per_epoch * self.batch_size

    def __iter__(self) -> Iterator[int]:
        first, order, epoch = self.position(), None, None
        for batch in range(first, first + self.batches_per_epoch):
            if batch // self.batches_per_epoch != epoch:
                epoch = batch // self.batches_per_epoch
                order = self._order(epoch)
            start = (batch % self.batches_per_epoch * self.num_replicas + self.rank) * self.batch_size
            yield from order[start : start + self.batch_size].tolist()

    def _order(self, epoch: int) -> np.ndarray:
        random = np.random.default_rng((self.seed, epoch))
        order = random.permutation(len(self.dataset))
        if self.lengths is None:
            return order
        rows = self.batch_size * self.num_replicas
        parts = np.split(order[: rows * self.batches_per_epoch], range(WINDOW * rows, len(order), WINDOW * rows))
        batches = np.concatenate([part[np.argsort(self.lengths[part], kind="stable")] for part in parts])
        return random.permutation(batches.reshape(-1, rows)).ravel()


class EndlessBatches(IterableDataset):
    """The rows of one device for batch after batch, of a stream or of several sources, which repeat without end.

    Batch n of all devices together is the same rows in the same order, however many there are; a worker of W makes
    each W-th batch from `first` on.

    Args:
        rows: `rows.row(n)` is row n.
    """

    def __init__(self, rows: Endless, batch_size: int, num_replicas: int = 1, rank: int = 0):
        self.rows, self.batch_size, self.num_replicas, self.rank = rows, batch_size, num_replicas, rank
        self.first = 0

    def __iter__(self) -> Iterator[Row]:
        worker = get_worker_info()
        workers, index = (worker.num_workers, worker.id) if worker else (1, 0)
        for batch in count(self.first + index, workers):
            start = (batch * self.num_replicas + self.rank) * self.batch_size
            yield from map(self.rows.row, range(start, start + self.batch_size))


class EndlessLoader(ResumableLoader):
    """A loader that sets where its EndlessBatches begin, before workers copy them."""

    position: Callable[[], int] = staticmethod(lambda: 0)

    def __iter__(self):
        self.dataset.first = self.position()
        return super().__iter__()


def check_ends(trainer: Trainer | None) -> None:
    """Raise ValueError for a training that rows without end would not let end."""
    if trainer is not None and trainer.max_steps == -1 and trainer.limit_train_batches == 1.0:
        raise ValueError(
            "trainer.max_steps: not set, but with streaming, or with several sources, the training documents repeat "
            "for ever"
        )


def held_out_loader(rows: Sequence[dict[str, np.ndarray]], world_size: int, rank: int, **loading) -> DataLoader:
    """Return the loader of a rank's share of validation or test; all ranks have as many batches."""
    if world_size == 1:
        return DataLoader(rows, shuffle=False, **loading)
    sampler = HeldOutSampler(rows, num_replicas=world_size, rank=rank, shuffle=False)
    return DataLoader(HeldOutRows(rows), sampler=sampler, **loading)


class HeldOutRows(Dataset):
    """Rows of validation or test, and behind the last as many as asked for that score nothing."""

    def __init__(self, rows: Sequence[dict[str, np.ndarray]]):
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        row = self.rows[min(index, len(self.rows) - 1)]
        labels = row.get("labels", row["input_ids"])
        return {**row, "labels": labels if index < len(self.rows) else np.full_like(labels, NOT_SCORED)}


class HeldOutSampler(DistributedSampler):
    """Indices of each rank's HeldOutRows, the same number on all: beyond the last row where rows do not divide.

    Lightning's own sampler repeats rows, which would count twice.
    """

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.rank, self.num_samples * self.num_replicas, self.num_replicas))
