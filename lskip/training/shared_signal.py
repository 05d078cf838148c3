"""A signal to one of several processes, of which all learn at the same moment."""

import math

import torch
from lightning.pytorch import Trainer
from torch import distributed

from lskip.utils.interrupts import FirstSignal


class SharedSignal(FirstSignal):
    """FirstSignal for processes that train together: each asks `agreed` at the same places, and gets the same answer.

    They tell of it over a gloo group of their own, so that no device waits, and a process that is gone is noticed
    within a step also where the devices' own library would wait for it.
    """

    def __init__(self) -> None:
        super().__init__()
        self._group: distributed.ProcessGroup | None = None
        self._told: tuple[torch.Tensor, distributed.Work] | None = None

    def listen_in(self, trainer: Trainer) -> None:
        """Start recording signals, in all processes."""
        self._told = self._group = None
        if trainer.world_size > 1:
            self._group = distributed.new_group(backend="gloo")
        self.listen(says=trainer.is_global_zero)

    def agreed(self) -> int | None:
        """Return the signal that any process had got before the last call but one (one process: so far), or None."""
        if self._group is None:
            return self.signum
        told, signum = self._told, torch.tensor(self.signum or 0)
        self._told = signum, distributed.all_reduce(signum, distributed.ReduceOp.MAX, self._group, async_op=True)
        if told is None:
            return None
        signum, work = told
        work.wait()
        return int(signum) or None

    def alike(self, numbers: list[float]) -> bool:
        """Return whether all processes pass the same finite numbers."""
        if self._group is None:
            return True
        of_all: list = [None] * self._group.size()
        distributed.all_gather_object(of_all, numbers, self._group)
        return math.isfinite(sum(numbers)) and all(each == numbers for each in of_all)
