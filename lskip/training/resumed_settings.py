"""A resumed run goes by the command line, not by what its checkpoint was trained with."""

import warnings
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lskip.training.optimizer_making import state_of

# What a schedule writes into the optimizer's groups, and what it counts as it goes: no settings.
_OF_SCHEDULE = {"initial_lr", "max_lr", "min_lr", "max_momentum", "base_momentum"}
_MOVING = ("last_epoch", "_step_count", "_last_lr", "_get_lr_called_within_step", "_is_initial")


class ResumedSettings(Callback):
    """Puts today's settings of optimizer, schedule and batches in the place of the checkpoint's, where they differ.

    torch and Lightning restore a learning rate, a weight decay and a schedule with the state that they belong to. Here
    the state is restored, and the settings are those that the optimizer was made with; the schedule is the new one at
    the step where the run is. A run with the same settings goes on exactly as before.

    With other batches or blocks, or on another number of devices, the data go on behind the share of the epoch that
    has been read, rounded down to whole batches. Blocks of another length are shuffled in another order.
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
        by_tokens = now.get("documents", {}).get("kind", "text") == "text"
        sizes = [_size(rows, by_tokens) for rows in (before, now)]
        for part in ("total", "current") if sizes[0] != sizes[1] else ():
            progress[part] = _rescaled(progress[part], *sizes)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Optimizer and schedule are made by now, and their state is about to be restored from this very mapping.
        if self._checkpoint is not None:
            total = self._checkpoint.get("lskip", {}).get("total_steps")
            of_same_length = "lskip" not in self._checkpoint or total == pl_module.total_steps
            schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
            renew(self._checkpoint, trainer.optimizers[0], schedulers, of_same_length)
            self._checkpoint = None


def rows_of(trainer: Trainer) -> dict[str, Any] | None:
    """Return how much a micro-batch reads (rows, tokens in a row, devices), and of what; None where it is not known."""
    data = trainer.datamodule
    names = ("batch_size", "block_size")
    if not all(isinstance(getattr(data, name, None), int) for name in names):
        return None
    rows = {**{name: getattr(data, name) for name in names}, "devices": trainer.world_size}
    documents = getattr(data, "training_documents", None)
    return rows if documents is None else {**rows, "documents": documents}


def _size(rows: dict[str, Any], by_tokens: bool) -> int:
    """How much of the data a micro-batch reads: tokens, or where each row is an example, however long, rows."""
    return rows["batch_size"] * rows["devices"] * (rows["block_size"] if by_tokens else 1)


def _rescaled(progress: dict[str, int], before: int, now: int) -> dict[str, int]:
    """Lightning's counts of micro-batches, for others that read `now` each where those read `before`."""
    done = progress["processed"] * before // now
    return {name: max(done + count - progress["processed"], 0) for name, count in progress.items()}


def renew(checkpoint: dict, optimizer: Optimizer, schedulers: list[LRScheduler], of_same_length: bool) -> None:
    """Put the settings of a new optimizer and its schedule into a checkpoint, in place, where they differ from its own.

    Args:
        checkpoint: from which the optimizer's state is going to be restored.
        optimizer: as it was made, with the schedule made on it.
        schedulers: one or none.
        of_same_length: whether the run has as many steps as the checkpoint was made for; a schedule may go by it.

    Raises:
        ValueError: the checkpoint is of another kind of optimizer, or the schedule does not reach so far.
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
    checkpoint["lr_schedulers"] = []  # nothing to restore: it is where it should be
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
    """ValueError where the new settings (amsgrad, centered …) need what the checkpoint does not hold of a weight."""
    saved = {name for state in states.values() for name in state}
    # Where nothing is kept, as of SGD without momentum, the optimizer begins by itself.
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
        warnings.simplefilter("ignore")  # that the optimizer has made no step before
        try:
            for _ in range(steps):
                scheduler.step()
        except ValueError as error:  # OneCycleLR's, beyond its end
            name = type(scheduler).__name__
            raise ValueError(f"lr_scheduler: {name} does not reach step {steps}, where the run is ({error})") from error
