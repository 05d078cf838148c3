"""Supervision of the exits: the module's loss against autograd through transformers' own hidden states."""

import pytest
import torch
from torch.nn.functional import cross_entropy, kl_div

from lskip.losses import Teacher
from lskip.module import LayerSkipModule
from lskip.targets import Anchored, Labels, SelfDistillation
from lskip.training.teachers import ExitSupervision

WEIGHTS = [0, 0.3, 0, 0.7]


def random_ids():
    return torch.randint(0, 300, (2, 9), generator=torch.Generator().manual_seed(0))


def exits_of(model, ids):
    """Return the logits of exit 2 and of the last, [B*(S-1), V], and the next tokens."""
    hidden = model.model(ids, output_hidden_states=True).hidden_states  # its last entry is normed
    states = model.model.norm(hidden[2])[:, :-1], hidden[-1][:, :-1]
    return *(model.lm_head(state).flatten(0, 1) for state in states), ids[:, 1:].flatten()


def divergence(teacher, student):
    log_p, log_q = teacher.detach().log_softmax(-1), student.log_softmax(-1)
    return kl_div(log_q, log_p, log_target=True, reduction="batchmean")


def compare(model, expected, **settings):
    """Assert that loss and gradients of the module in a step are those of `expected`."""
    wanted = torch.autograd.grad(expected, list(model.parameters()), allow_unused=True)
    module = LayerSkipModule(model, **settings)
    module.exit_weights.write("test", WEIGHTS)
    loss, _ = module.early_exit_loss({"input_ids": random_ids()}, 0)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    for parameter, grad in zip(model.parameters(), wanted, strict=True):
        torch.testing.assert_close(parameter.grad, grad, rtol=1e-4, atol=1e-5)
    return module


def test_self_distillation_teaches_the_exit_and_leaves_the_labels_to_the_last_layer(tiny_model):
    model = tiny_model()
    early, last, labels = exits_of(model, random_ids())
    expected = 0.3 * divergence(last, early) + 0.7 * cross_entropy(last, labels)
    compare(model, expected, exit_target=SelfDistillation())


def test_an_anchor_holds_the_last_layer_to_what_it_was(tiny_model):
    model = tiny_model()
    module = LayerSkipModule(model, anchor_weight=0.5)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        before = exits_of(model, random_ids())[1].clone()
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    early, last, labels = exits_of(model, random_ids())
    expected = 0.3 * cross_entropy(early, labels) + 0.7 * (cross_entropy(last, labels) + 0.5 * divergence(before, last))
    module.exit_weights.write("test", WEIGHTS)
    loss, own = module.early_exit_loss({"input_ids": random_ids()}, 0)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(own, cross_entropy(last, labels) + 0.5 * divergence(before, last))
    assert module.state_dict().keys() == LayerSkipModule(model).state_dict().keys()  # no checkpoint holds the copy


def test_an_untrained_last_layer_still_teaches(tiny_model):
    model = tiny_model()
    early, last, _ = exits_of(model, random_ids())
    module = LayerSkipModule(model, exit_target=SelfDistillation())
    module.exit_weights.write("test", [0, 1, 0, 0])
    loss, _ = module.early_exit_loss({"input_ids": random_ids()}, 0)
    torch.testing.assert_close(loss, divergence(last, early))


def test_each_row_is_taught_by_its_own_position(tiny_model):
    states = torch.arange(10.0)[:, None].requires_grad_()
    supervision = ExitSupervision(tiny_model(), SelfDistillation(), None)
    picked = torch.tensor([7, 2])
    early, last = supervision.of_step([picked, None], states, {"input_ids": random_ids()}, torch.arange(10))
    assert early.teacher.states.flatten().tolist() == [7, 2] and not early.teacher.states.requires_grad
    assert (last.count, type(last.target), last.teacher) == (10, Labels, None)


def test_without_the_last_layer_all_learn_the_exit_target(tiny_model):
    supervision = ExitSupervision(tiny_model(), Labels(), 0.5)
    (only,) = supervision.of_step([torch.tensor([1])], None, {"input_ids": random_ids()}, torch.arange(10))
    assert (only.count, type(only.target)) == (1, Labels)
    *_, last = supervision.of_step([None, None], torch.zeros(10, 32), {"input_ids": random_ids()}, torch.arange(10))
    assert isinstance(last.target, Anchored) and isinstance(last.teacher, Teacher)


@pytest.mark.parametrize("anchor_weight", [-0.5, float("nan")])
def test_an_anchor_out_of_range_is_refused_before_the_model_is_read(anchor_weight):
    with pytest.raises(ValueError, match=f"anchor_weight: {anchor_weight} "):
        LayerSkipModule("no/such/model", anchor_weight=anchor_weight)
