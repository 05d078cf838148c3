"""The plan of a run: memory on each device, FLOPs a token, steps, tokens and hours."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from lightning.pytorch import Callback
from transformers import PreTrainedConfig

from lskip.flops import Work
from lskip.planning.memory import FSDP2, peak_memory
from lskip.planning.run_average import RunAverage, average_run
from lskip.planning.simulation import Batch, module_of, simulate


@dataclass(frozen=True)
class RunShape:
    """The sizes of a run.

    Attributes:
        batch: rows, length and how many micro-batches a step has, on each device.
        devices: how many there are on all machines.
        strategy: one of memory.SINGLE, DDP, FSDP2.
        precision: Lightning's name.
        on_gpu: whether they are GPUs.
        steps: of the optimizer; None: not known.
    """

    batch: Batch
    devices: int
    strategy: str
    precision: str
    on_gpu: bool
    steps: int | None

    @property
    def tokens_per_step(self) -> int:
        """Tokens of a step on all devices; rows that are not full have fewer."""
        return self.batch.rows * self.batch.length * self.batch.accumulate * self.devices


@dataclass(frozen=True)
class Plan:
    """What a run needs.

    Attributes:
        shape: its sizes.
        parameters, trained: numbers of weights.
        memory: bytes by part on one device at the peak, as configured.
        other_memory: the same with the other choice of gradient_checkpointing.
        checkpointing: what is configured.
        average: what its steps compute.
        flops_per_token: forward and backward, by part; their sum is that of a mean token.
        full_flops_per_token: the same model at full depth with the last exit alone.
        states_estimated: whether the optimizer's states are measured on a small matrix.
    """

    shape: RunShape
    parameters: int
    trained: int
    memory: dict[str, float]
    other_memory: dict[str, float]
    checkpointing: bool
    average: RunAverage
    flops_per_token: dict[str, float]
    full_flops_per_token: float
    states_estimated: bool

    def hours(self, mfu: float, peak: float) -> float:
        """Return the hours of a run (of one step, where the steps are not known) without validation and saving.

        Args:
            mfu: share of the devices' peak that training reaches.
            peak: FLOPs a second of one device.
        """
        tokens = self.shape.tokens_per_step * (self.shape.steps or 1)
        return tokens * sum(self.flops_per_token.values()) / (mfu * peak * self.shape.devices) / 3600

    def record(self) -> dict:
        """Return the plan in plain values."""
        shape = self.shape
        return {
            "shape": {**asdict(shape), "tokens_per_step": shape.tokens_per_step},
            "parameters": self.parameters,
            "trained_parameters": self.trained,
            "gradient_checkpointing": self.checkpointing,
            "memory_bytes": {**self.memory, "total": sum(self.memory.values())},
            "memory_bytes_with_the_other_checkpointing": {
                **self.other_memory,
                "total": sum(self.other_memory.values()),
            },
            "optimizer_states_estimated": self.states_estimated,
            "flops_per_token": {**self.flops_per_token, "total": sum(self.flops_per_token.values())},
            "flops_per_token_at_full_depth_last_exit_alone": self.full_flops_per_token,
            "mean_drop_rates": self.average.drop_rates,
            "share_of_steps_with_exit": self.average.exits_on,
            "tokens": None if shape.steps is None else shape.steps * shape.tokens_per_step,
        }


def plan_run(config: PreTrainedConfig, arguments: dict, callbacks: Sequence[Callback], shape: RunShape) -> Plan:
    """Return the plan of a run, without weights and without data.

    Args:
        config: of the model.
        arguments: of LayerSkipModule, without `model`.
        callbacks: that write drop rates and exit weights.
        shape: sizes of the run.

    Raises:
        ValueError: something does not fit the model, or needs a known number of steps.
    """
    module = module_of(config, arguments, shape.precision)
    check_shape(module.decoder.context_length, shape)
    weights = list(module.parameters())
    parameters = sum(each.numel() for each in weights), sum(each.numel() for each in weights if each.requires_grad)
    flops = module.training_flops()
    average = average_run(module, callbacks, shape.batch, shape.steps)
    checkpointing = bool(arguments.get("gradient_checkpointing"))
    found = {
        choice: _memory(config, {**arguments, "gradient_checkpointing": choice}, average, shape)
        for choice in (checkpointing, not checkpointing)
    }
    tokens = shape.batch.rows * shape.batch.length
    return Plan(
        shape,
        *parameters,
        found[checkpointing][0],
        found[not checkpointing][0],
        checkpointing,
        average,
        {part: count / tokens for part, count in flops.of(average.work).items()},
        sum(flops.of(_plain_work(module.decoder.num_layers, shape.batch)).values()) / tokens,
        found[checkpointing][1],
    )


def check_shape(context: int, shape: RunShape) -> None:
    """Raise ValueError for rows longer than the model's context."""
    if shape.batch.length > context:
        raise ValueError(f"block_size: {shape.batch.length} tokens, the model's context holds {context}")


def _memory(config: PreTrainedConfig, arguments: dict, average: RunAverage, shape: RunShape) -> tuple[dict, bool]:
    """Return the bytes by part at the peak, and whether the optimizer's states are estimated."""
    # FSDP2 runs bf16-mixed without autocast: on weights gathered in bfloat16, of shares that it holds in float32.
    gathers_half = shape.strategy == FSDP2 and shape.precision == "bf16-mixed"
    precision, held = ("bf16-true", 2.0) if gathers_half else (shape.precision, 1.0)
    module = module_of(config, arguments, precision)
    module.exit_weights.values = list(average.largest_exit_weights)
    simulated = simulate(module, shape.batch, precision, shape.on_gpu)
    parts = peak_memory(module, simulated, shape.strategy, shape.devices, average.kept_share, held)
    return parts, simulated.states_estimated > 0


def _plain_work(layers: int, batch: Batch) -> Work:
    """Return the work of a micro-batch at full depth with the last exit alone."""
    work = Work()
    work.embed(batch.rows, batch.length)
    for block in range(layers):
        work.run(block, batch.rows, batch.length)
    work.decode(batch.rows * (batch.length - 1), last=True)
    return work
