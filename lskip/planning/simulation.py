"""Two training steps on tensors without memory, which show what a run will hold."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim import Optimizer
from transformers import PreTrainedConfig

from lskip import losses
from lskip.losses import rows_at_once
from lskip.models.reading.config import without_memory
from lskip.module import LayerSkipModule
from lskip.optimization import parameter_groups
from lskip.planning.allocations import Allocations
from lskip.training.optimizer_making import make_optimizer

FORWARD, BACKWARD, STEP = "forward", "backward", "step"
DTYPES = {"bf16-true": torch.bfloat16, "16-true": torch.float16, "64-true": torch.float64}
CASTS = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
PRECISIONS = ("32-true", *CASTS, *DTYPES)


def module_of(config: PreTrainedConfig, arguments: dict, precision: str) -> LayerSkipModule:
    """Return the module of a run, its weights on the meta device.

    Args:
        config: of its model.
        arguments: of LayerSkipModule, without `model`.
        precision: Lightning's name.
    """
    module = LayerSkipModule(without_memory(config).to(torch.float32), **arguments)
    return module.to(DTYPES.get(precision, torch.float32))


@dataclass(frozen=True)
class Batch:
    """The shape of a micro-batch: rows of `length` tokens, all scored; `accumulate` of them make a step.

    `has_mask`: a row has several documents, inside which attention stays by a mask of all pairs of tokens.
    """

    rows: int
    length: int
    accumulate: int = 1
    has_mask: bool = False


@dataclass(frozen=True)
class Simulated:
    """What two steps held.

    Attributes:
        record: of all storages.
        parameters: number of each weight's storage -> its shape, and whether it trains.
        gradients, states: number of a storage -> the shape of its tensor.
        accumulates: whether a step has several micro-batches.
        states_estimated: bytes of the optimizer's states where the optimizer does not run without memory; else 0.
        workspace: bytes inside of one operator, which the record does not see (of a logsumexp over logits).
    """

    record: Allocations
    parameters: dict[int, tuple[torch.Size, bool]]
    gradients: dict[int, torch.Size]
    states: dict[int, torch.Size]
    accumulates: bool
    states_estimated: float
    workspace: float


def simulate(module: LayerSkipModule, batch: Batch, precision: str, on_gpu: bool) -> Simulated:
    """Return what two steps hold with the module's present exit weights and no dropped rows; it is used up."""
    with FakeTensorMode(allow_non_fake_inputs=True), _chunks_of(on_gpu):
        _without_values(module)
        optimizer = make_optimizer(module.optimizer, parameter_groups(module))
        if on_gpu:
            _use_lists(optimizer)
        return _Simulation(module, batch, precision, optimizer).run()


class _Simulation:
    def __init__(self, module: LayerSkipModule, batch: Batch, precision: str, optimizer: Optimizer):
        self.module, self.batch, self.optimizer = module, batch, optimizer
        self.casts_to = CASTS.get(precision)
        self.record = Allocations()
        self.gradients: dict[int, torch.Size] = {}
        self.estimated = 0.0

    def run(self) -> Simulated:
        record, module = self.record, self.module
        for block in module.decoder.blocks:
            _label(block, record)
        with record:
            for tensor in [*module.parameters(), *module.buffers()]:
                record.see(tensor, "weights")
            for model in module.supervision.teachers():
                for tensor in [*model.parameters(), *model.buffers()]:
                    record.see(tensor, "anchor")
            self._step(1)  # makes the optimizer's states
            self._step(min(self.batch.accumulate, 2))  # more micro-batches are like the second
        numbers = {record.number(each): (each.shape, each.requires_grad) for each in module.parameters()}
        states = {record.number(each): each.shape for each in _states(self.optimizer)}
        rows = min(rows_at_once(module.decoder.vocab_size, torch.device("cpu")), self.batch.rows * self.batch.length)
        inside = rows * module.decoder.vocab_size * 4
        return Simulated(record, numbers, self.gradients, states, self.batch.accumulate > 1, self.estimated, inside)

    def _step(self, micro_batches: int) -> None:
        for number in range(micro_batches):
            self._micro_batch(first=number == 0)
        self.record.phase = STEP
        with self.record.within("stepping"):
            self._optimizer_step()
        self.record.name(_states(self.optimizer), "optimizer")

    def _micro_batch(self, first: bool) -> None:
        record, module = self.record, self.module
        record.phase = FORWARD
        with record.within("exits"):
            batch = _fake_batch(self.batch)
            with torch.autocast("cpu", self.casts_to, enabled=self.casts_to is not None):
                loss, _ = module.early_exit_loss(batch, 0)
            loss = loss * 1.0
            del batch
        if first:
            self.optimizer.zero_grad()
        record.phase = BACKWARD
        with record.within("workspace"):
            if loss.requires_grad:
                loss.backward()
        for each in module.parameters():
            if each.grad is not None:
                record.name([each.grad], "gradients")
                self.gradients[record.number(each.grad)] = each.shape

    def _optimizer_step(self) -> None:
        if self.estimated:
            return
        try:
            self.optimizer.step()
        except Exception:  # of any kind: whatever a foreign optimizer does that needs values
            trained = [part for group in self.optimizer.param_groups for part in group["params"]]
            self.estimated = state_bytes_per_weight(self.optimizer) * sum(part.numel() for part in trained)


def state_bytes_per_weight(optimizer: Optimizer) -> float:
    """Return the bytes of an optimizer's states for each weight, measured with a small matrix; 0 where that fails."""
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    group = {key: value for key, value in optimizer.param_groups[0].items() if key != "params"}
    with unset_fake_temporarily():
        small = torch.zeros(128, 128, requires_grad=True)
        small.grad = torch.zeros_like(small)
        try:
            twin = type(optimizer)([{**group, "params": [small]}])
            twin.step()
        except Exception:  # of any kind, as above
            return 0.0
        return sum(each.untyped_storage().nbytes() for each in _states(twin)) / small.numel()


def _states(optimizer: Optimizer) -> Iterator[Tensor]:
    for state in optimizer.state.values():
        yield from (each for each in state.values() if isinstance(each, Tensor))


def _use_lists(optimizer: Optimizer) -> None:
    """Let the optimizer step as it does on a GPU by default: on lists of tensors at once, in more memory."""
    for group in optimizer.param_groups:
        if group.get("foreach", False) is None and not group.get("fused"):
            group["foreach"] = True


def _label(block: nn.Module, record: Allocations) -> None:
    """Count what appears inside a block's call to the blocks' activations."""
    call = block.forward

    def labelled(*arguments, **more):
        with record.within("blocks"):
            return call(*arguments, **more)

    block.forward = labelled


def _fake_batch(batch: Batch) -> dict[str, Tensor]:
    """Return a batch of which all is scored; called inside a FakeTensorMode."""
    scored = batch.rows * (batch.length - 1)
    places = {"position_ids": torch.zeros(batch.rows, batch.length, dtype=torch.long)} if batch.has_mask else {}
    return {
        **places,
        "input_ids": torch.zeros(batch.rows, batch.length, dtype=torch.long),
        "scored_positions": torch.zeros(scored, dtype=torch.long),
        "scored_tokens": torch.zeros(scored, dtype=torch.long),
    }


def _without_values(module: LayerSkipModule) -> None:
    """Replace weights on the meta device by ones that look like the CPU's, inside a FakeTensorMode; ties stay."""
    made: dict[int, Tensor] = {}

    def twin(tensor: Tensor) -> Tensor:
        if id(tensor) not in made:
            fake = torch.empty_like(tensor, device="cpu")
            weight = isinstance(tensor, nn.Parameter)
            made[id(tensor)] = nn.Parameter(fake, tensor.requires_grad) if weight else fake
        return made[id(tensor)]

    for root in [module, *module.supervision.teachers()]:
        for part in root.modules():
            for tensors in (part._parameters, part._buffers):
                tensors |= {name: twin(each) for name, each in tensors.items() if each is not None}


@contextmanager
def _chunks_of(on_gpu: bool) -> Iterator[None]:
    """Let logits be computed in chunks as large as a GPU's, though the tensors look like the CPU's."""
    before = losses.LOGITS_AT_ONCE
    if on_gpu:
        losses.LOGITS_AT_ONCE = losses.LOGITS_ON_GPU
    try:
        yield
    finally:
        losses.LOGITS_AT_ONCE = before
