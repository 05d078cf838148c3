"""Early checks of how many processes train, and how they share the work."""

from collections.abc import Mapping, MutableMapping
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import WeightAveraging

from lskip.training.fsdp2 import FSDP2, NOT_SHARDED
from lskip.utils.ranks import launched


def settle_devices(settings: MutableMapping[str, Any], saves_shards: bool = False) -> None:
    """Set the Trainer's devices and nodes, where they are left open, to the processes that a launcher started.

    Args:
        settings: the Trainer's.
        saves_shards: whether `checkpoint.sharded` is asked for.

    Raises:
        ValueError: they are set to something else, or the strategy does not train what lskip defines.
    """
    _check_strategy(settings)
    if saves_shards and isinstance(settings["strategy"], str) and settings["strategy"] != "fsdp2":
        raise ValueError(NOT_SHARDED)  # of a class it is known when it is made: RunCheckpoint
    _use_launch(settings)


def _use_launch(settings: MutableMapping[str, Any]) -> None:
    """Set devices and nodes, where they are left open, to the processes that a launcher started.

    Raises:
        ValueError: they are set to something else, as where each process would train by itself.
    """
    launch = launched()
    if launch is None:
        return
    nodes = launch.processes // launch.on_node
    if settings["devices"] == "auto":
        settings["devices"] = launch.on_node
    if settings["num_nodes"] == 1:
        settings["num_nodes"] = nodes
    if str(settings["devices"]) != str(launch.on_node) or settings["num_nodes"] != nodes:
        given = f"{settings['devices']!r} on {settings['num_nodes']} node(s)"
        raise ValueError(
            f"trainer.devices: {given}, but {launch.launcher} started {launch.on_node} processes on each of {nodes}; "
            "leave devices and num_nodes out"
        )


_STRATEGIES = {
    "fsdp": "fsdp2, which shards each weight",
    "deepspeed": "fsdp2, which shards weights, gradients and optimizer states",
    "ddp_spawn": "ddp",
    "ddp_fork": "ddp",
    "ddp_notebook": "ddp",
    "FSDPStrategy": "fsdp2, which shards each weight",
    "DeepSpeedStrategy": "fsdp2, which shards weights, gradients and optimizer states",
    "ModelParallelStrategy": "fsdp2; a block is not divided over devices",
}


def _check_strategy(settings: Mapping[str, Any]) -> None:
    """Raise ValueError for a strategy, or a precision under it, that does not train what lskip defines."""
    strategy = settings["strategy"]
    name = strategy if isinstance(strategy, str) else str(getattr(strategy, "class_path", "")).rpartition(".")[2]
    for refused, instead in _STRATEGIES.items():
        if name == refused or name.startswith(f"{refused}_"):
            raise ValueError(f"trainer.strategy: {name!r} is not supported; take {instead}")
    if name in ("fsdp2", "FSDP2") and str(settings["precision"]).startswith("16"):
        raise ValueError(f"trainer.precision: {settings['precision']!r} is not supported by fsdp2; take bf16-mixed")


def check_sharded(trainer: Trainer) -> None:
    """Raise ValueError for callbacks that need whole weights where each process has a share of them."""
    averaging = any(isinstance(callback, WeightAveraging) for callback in trainer.callbacks)
    if averaging and isinstance(trainer.strategy, FSDP2):
        raise ValueError("trainer.callbacks: averages of weights (EMA) are not supported by fsdp2; take ddp")
