"""A step of training on tensors without values: nothing on the host depends on their numbers, and waits for them."""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lskip.low_rank import LowRank
from lskip.models.scored import with_scored
from lskip.module import LayerSkipModule
from lskip.targets import LK, SelfDistillation

STEPS = {
    "labels": {},
    "SelfDistillation": {"exit_target": SelfDistillation()},
    "LK": {"exit_target": LK()},
    "positions": {"position_share": 0.5},
    "exit heads and classifier": {"exit_heads": True, "learned_exit": True},
    "anchor": {"anchor_weight": 0.5},
    "LoRA": {"low_rank": LowRank(2, rank=2)},
    "checkpointing": {"gradient_checkpointing": True},
    "documents apart": {},
}


def without_values(module: nn.Module, mode: FakeTensorMode) -> None:
    """Replace parameters and buffers, tied ones by one, by tensors that have shapes alone."""
    fakes = {}
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False, remove_duplicate=False):
            fake = fakes.setdefault(parameter, nn.Parameter(mode.from_tensor(parameter).detach()))
            part._parameters[name] = fake.requires_grad_(parameter.requires_grad)
        for name, buffer in part.named_buffers(recurse=False):
            part._buffers[name] = mode.from_tensor(buffer)


@pytest.mark.parametrize("name", STEPS)
def test_forward_and_backward_read_no_value(tiny_model, name):
    """Red where a step calls item, bool, tolist or nonzero on what a device holds: each makes the host wait for it."""
    module = LayerSkipModule(tiny_model(), **STEPS[name])
    module.exit_weights.values = [0.1, 0.2, 0.3, 0.4]
    module.drop_rates.values = [0.0, 0.3, 0.6, 1.0]
    ids = torch.randint(0, 64, (4, 12), generator=torch.Generator().manual_seed(0))
    batch = with_scored({"input_ids": ids, "labels": ids.masked_fill(torch.arange(ids.shape[1]) < 3, -100)})
    if name == "documents apart":
        batch["position_ids"] = (torch.arange(ids.shape[1]) % 5).repeat(len(ids), 1)
    mode = FakeTensorMode(allow_non_fake_inputs=False)
    without_values(module, mode)
    if module.supervision.reference is not None:
        without_values(module.supervision.reference, mode)
    with mode:
        loss, _ = module(module.early_exit_loss, {name: mode.from_tensor(part) for name, part in batch.items()}, 5)
        loss.backward()
    assert all(part.grad is not None for part in module.decoder.blocks[0].parameters() if part.requires_grad)
