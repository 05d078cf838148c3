"""Precedence of present settings over a checkpoint's when a run is resumed."""

import warnings
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lskip.training.optimizer_making import state_of

# Entries that a schedule writes into parameter groups, and its counters: no settings.
_OF_SCHEDULE = {"initial_lr", "max_lr", "min_lr", "max_momentum", "base_momentum"}
_MOVING = ("last_epoch", "_step_count", "_last_lr", "_get_lr_called_within_step", "_is_initial")


class ResumedSettings(Callback):
    """Replaces a checkpoint's settings of optimizer, schedule and batches by the present ones, where they differ.

    torch and Lightning restore a learning rate, a weight decay and a schedule together with their state. Here the state
    is restored and the present settings apply; the new schedule starts at the run's step. A run with the same settings
    resumes exactly.

    With other batches or blocks, or another number of devices, data resume after the share of the epoch that has been
    read, rounded down to whole batches. Blocks of another length are shuffled in another order.
    """

    def __init__(self) -> None:
        self._checkpoint: dict | None = None

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict) -> None:
        if trainer.state.fn != "fit":
            return
        self._checkpoint = checkpoint
        before, now = checkpoint.get("lskip", {}).get("rows"), rows_of(trainer)
        if before and now:
            self._rescale(checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"], before, now)
            if before.get("documents", now.get("documents")) != now.get("documents"):
                step = checkpoint["global_step"]
                rank_zero_warn(f"data.source: its training documents are not those that the run read up to step {step}")

    def _rescale(self, progress: dict[str, dict], before: dict[str, Any], now: dict[str, Any]) -> None:
        by_tokens = now.get("pack") or now.get("documents", {}).get("kind", "text") == "text"
        sizes = [_size(rows, by_tokens) for rows in (before, now)]
        for part in ("total", "current") if sizes[0] != sizes[1] else ():
            progress[part] = _rescaled(progress[part], *sizes)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # After this hook the state of optimizer and schedule is restored from this mapping.
        if self._checkpoint is not None:
            total = self._checkpoint.get("lskip", {}).get("total_steps")
            of_same_length = "lskip" not in self._checkpoint or total == pl_module.total_steps
            schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
            renew(self._checkpoint, trainer.optimizers[0], schedulers, of_same_length)
            self._checkpoint = None


def rows_of(trainer: Trainer) -> dict[str, Any] | None:
    """Return batch_size, block_size, devices and documents of a run, and if its rows are packed; None: not known."""
    data = trainer.datamodule
    names = ("batch_size", "block_size")
    if not all(isinstance(getattr(data, name, None), int) for name in names):
        return None
    rows = {**{name: getattr(data, name) for name in names}, "devices": trainer.world_size}
    rows |= {"pack": True} if getattr(data, "pack", False) else {}
    documents = getattr(data, "training_documents", None)
    return rows if documents is None else {**rows, "documents": documents}


def _size(rows: dict[str, Any], by_tokens: bool) -> int:
    """Return how much data a micro-batch reads: tokens, or rows where each row is an example."""
    return rows["batch_size"] * rows["devices"] * (rows["block_size"] if by_tokens else 1)


def _rescaled(progress: dict[str, int], before: int, now: int) -> dict[str, int]:
    """Return Lightning's counts of micro-batches for a new size `now` of each, where it was `before`."""
    done = progress["processed"] * before // now
    return {name: max(done + count - progress["processed"], 0) for name, count in progress.items()}


def renew(checkpoint: dict, optimizer: Optimizer, schedulers: list[LRScheduler], of_same_length: bool) -> None:
    """Write the settings of a new optimizer and schedule into a checkpoint, in place, where they differ.

    Args:
        checkpoint: from which the optimizer's state will be restored.
        optimizer: newly made, with its schedule.
        schedulers: one or none.
        of_same_length: whether the run has as many steps as when the checkpoint was made.

    Raises:
        ValueError: the checkpoint is of another kind of optimizer, or the schedule ends before the run's step.
    """
    state = checkpoint["optimizer_states"][0]
    _check_kind(state["param_groups"], optimizer)
    saved = checkpoint["lr_schedulers"]
    same_schedule = len(saved) == len(schedulers) and all(map(_same_schedule, saved, schedulers))
    moved = ("params", "lr") if schedulers else ("params",)
    same_settings = all(map(lambda old, new: _same(old, new, moved), state["param_groups"], optimizer.param_groups))
    if not same_settings:
        _check_state(state["state"], optimizer)
    if same_schedule and same_settings and (of_same_length or not schedulers):
        return
    for scheduler in schedulers:
        _advance(scheduler, checkpoint["global_step"])
    checkpoint["lr_schedulers"] = []  # nothing to restore: the new schedule has been advanced
    state["param_groups"] = [
        {**new, "params": old["params"]} for old, new in zip(state["param_groups"], optimizer.param_groups, strict=True)
    ]


def _check_kind(groups: list[dict], optimizer: Optimizer) -> None:
    name = type(optimizer).__name__
    sizes = [[len(group["params"]) for group in each] for each in (groups, optimizer.param_groups)]
    if sizes[0] != sizes[1]:
        raise ValueError(f"ckpt_path: its optimizer trains other weights ({sizes[0]} in its groups, {sizes[1]} here)")
    unknown = set(groups[0]) - set(optimizer.param_groups[0]) - _OF_SCHEDULE
    missing = set(optimizer.defaults) - set(groups[0])
    if unknown and missing:
        raise ValueError(f"optimizer: {name} takes {sorted(missing)}, the checkpoint's optimizer {sorted(unknown)}")


def _check_state(states: dict[int, dict], optimizer: Optimizer) -> None:
    """Raise ValueError where new settings (amsgrad, centered …) need state that the checkpoint lacks."""
    saved = {name for state in states.values() for name in state}
    # Without any state, as of SGD without momentum, the optimizer starts anew.
    if saved and (missing := state_of(optimizer) - saved):
        name = type(optimizer).__name__
        raise ValueError(f"optimizer: {name} so set goes by {', '.join(sorted(missing))}, which this run has not kept")


def _same(old: dict[str, Any], new: dict[str, Any], but: tuple[str, ...]) -> bool:
    return all(name in old and _plain(old[name]) == _plain(new[name]) for name in new if name not in but)


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _same_schedule(saved: dict[str, Any], scheduler: LRScheduler) -> bool:
    own = scheduler.state_dict()
    return saved.keys() == own.keys() and _same(saved, own, _MOVING)


def _advance(scheduler: LRScheduler, steps: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns that the optimizer has not stepped
        try:
            for _ in range(steps):
                scheduler.step()
        except ValueError as error:  # of OneCycleLR, after its end
            name = type(scheduler).__name__
            raise ValueError(f"lr_scheduler: {name} does not reach step {steps}, where the run is ({error})") from error
