"""The processes that a launcher started together, as their environment variables tell."""

import os
from dataclasses import dataclass


@dataclass(frozen=True)
class Launch:
    """What torchrun, or SLURM's srun, started.

    Args:
        launcher: its name.
        processes: in all.
        on_node: of them on this machine.
    """

    launcher: str
    processes: int
    on_node: int


def launched() -> Launch | None:
    """Return what this process belongs to; None where it was started alone, or by lskip's own process of rank 0."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return Launch("torchrun", _number("WORLD_SIZE"), _number("LOCAL_WORLD_SIZE"))
    if "SLURM_STEP_NUM_TASKS" in os.environ:  # not SLURM_NTASKS, which a batch script's own commands have too
        tasks = _number("SLURM_STEP_NUM_TASKS")
        return Launch("srun", tasks, tasks // _number("SLURM_STEP_NUM_NODES"))
    return None


def rank() -> int:
    """Return the number of this process among those that work together, from 0."""
    for name in ("RANK", "SLURM_PROCID", "LOCAL_RANK"):
        if name in os.environ:
            return _number(name, 0)
    return 0


def _number(name: str, otherwise: int = 1) -> int:
    text = os.environ.get(name, "")
    return int(text) if text.isdigit() else otherwise
