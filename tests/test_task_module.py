"""Classification and regression on a decoder: each text alone and by hand, against the batch that exits as it goes."""

import math

import pytest
import torch
from torch.utils.data import DataLoader

from lskip.callbacks import AlternatingExits, TwoStages
from lskip.inference import Entropy, LearnedExit, Margin, Saturation
from lskip.task_module import Classification, Regression, TaskModule
from tests.trainers import quiet_trainer

TEXTS = [[5, 9, 2], [7], [3, 1, 4, 1, 5, 9], [2, 6, 5, 3], [50, 60, 70], [8, 8, 8, 8, 8]]


def batch_of(targets):
    input_ids = torch.zeros(len(TEXTS), 6, dtype=torch.long)
    for row, text in zip(input_ids, TEXTS, strict=True):
        row[: len(text)] = torch.tensor(text)
    return {"input_ids": input_ids, "lengths": torch.tensor([len(t) for t in TEXTS]), "targets": torch.tensor(targets)}


CLASSES, NUMBERS = batch_of([0, 1, 2, 0, 1, 2]), batch_of([0.1, -1.0, 2.0, 0.5, 0.0, 1.5])


def make(tiny_model, task, **settings):
    module = TaskModule(tiny_model(), task, **settings).eval()
    torch.manual_seed(3)
    for parameter in [*module.heads.parameters(), *(module.exits.parameters() if module.exits else [])]:
        parameter.data = torch.randn_like(parameter)
    return module


@torch.no_grad()
def states_alone(module, text):
    """Return the last token's state before block 0 and after each block, for a single text."""
    hidden, seen = module.model.model, []
    hooks = [layer.register_forward_hook(lambda *call: seen.append(call[2])) for layer in hidden.layers]
    hidden(torch.tensor([text]))
    for hook in hooks:
        hook.remove()
    outputs = [states[0] if isinstance(states, tuple) else states for states in seen]
    return [states[0, -1] for states in (hidden.embed_tokens(torch.tensor([text])), *outputs)]


def read_alone(module, layer, state):
    return module.heads[layer - 1](module.model.model.norm(state)).detach()


@pytest.mark.parametrize(("task", "batch"), [(Classification(3), CLASSES), (Regression(), NUMBERS)])
def test_losses_by_hand(tiny_model, task, batch):
    module = make(tiny_model, task, learned_exit=True)
    weights = [0.5, 0.0, 0.25, 1.0]
    module.exit_weights.write("test", weights)
    expected, classified = 0.0, []
    for text, target in zip(TEXTS, batch["targets"].tolist(), strict=True):
        states = states_alone(module, text)
        for layer, weight in enumerate(weights, start=1):
            if not weight:
                continue
            outputs = read_alone(module, layer, states[layer]).tolist()
            if task.has_probabilities:
                loss = math.log(sum(map(math.exp, outputs))) - outputs[target]
                right = float(max(outputs) == outputs[target])
            else:
                loss, right = (outputs[0] - target) ** 2, 1 - math.tanh(abs(outputs[0] - target))
            expected += weight * loss / len(TEXTS)
            if layer < 4:
                classified.append((module.exits.classifier(states[layer]).item() - right) ** 2)
    loss, _ = module.early_exit_loss(batch, 0)
    assert loss.item() == pytest.approx(expected + sum(classified) / len(classified), rel=1e-4)


THRESHOLDS = {
    Entropy: (0.0, 0.3, 0.6, 1.0),
    Margin: (0.0, 0.5, 1.0),
    Saturation: (-1, 0.8, 1),
    LearnedExit: (0, 0.6, 1),
}


def stops_alone(module, criterion, states, layer):
    before, after = states[layer - 1][None], states[layer][None]
    return criterion.exits(layer, before, after, lambda: read_alone(module, layer, after))


@pytest.mark.parametrize("kind", THRESHOLDS)
def test_each_text_exits_in_a_batch_where_it_would_alone(tiny_model, kind):
    module, spread = make(tiny_model, Classification(3), learned_exit=True), set()
    for threshold in THRESHOLDS[kind]:
        criterion = kind(threshold).bound(module.exits.classifier)
        found = module.answer(CLASSES["input_ids"], CLASSES["lengths"], kind(threshold))
        for text, outputs, depth in zip(TEXTS, found.outputs, found.depths.tolist(), strict=True):
            states = states_alone(module, text)
            stops = [layer for layer in (2, 3) if stops_alone(module, criterion, states, layer)]
            assert depth == (stops[0] if stops else 4)
            torch.testing.assert_close(outputs, read_alone(module, depth, states[depth]), atol=1e-4, rtol=1e-4)
        spread |= set(found.depths.tolist())
    assert spread >= {2, 4}


def test_a_fixed_exit(tiny_model):
    module = make(tiny_model, Regression())
    found = module.answer(NUMBERS["input_ids"], NUMBERS["lengths"], exit_layer=3)
    expected = torch.stack([read_alone(module, 3, states_alone(module, text)[3]) for text in TEXTS])
    torch.testing.assert_close(found.outputs, expected, atol=1e-4, rtol=1e-4)
    assert found.depths.tolist() == [3] * 6


@pytest.mark.parametrize("criterion", [Entropy(0.5), Margin(0.5)])
def test_a_regression_has_no_probabilities(tiny_model, criterion):
    with pytest.raises(ValueError, match=f"exit_criterion: {type(criterion).__name__} reads probabilities"):
        make(tiny_model, Regression()).answer(NUMBERS["input_ids"], NUMBERS["lengths"], criterion)


def test_an_exit_classifier_that_was_not_trained(tiny_model):
    with pytest.raises(ValueError, match="LearnedExit needs a model that was trained with learned_exit: true"):
        make(tiny_model, Regression()).answer(NUMBERS["input_ids"], NUMBERS["lengths"], LearnedExit(0.5))


def fit(module, batch, steps, *callbacks):
    trainer = quiet_trainer(None, *callbacks, max_steps=steps)
    trainer.fit(module, DataLoader([batch] * steps, batch_size=None))
    return module.eval()


def test_deebert_freezes_the_model_and_the_last_head(tiny_config):
    torch.manual_seed(0)
    module = TaskModule(tiny_config(), Classification(3))
    fit(module, CLASSES, 2, TwoStages(0.99))
    before = {name: part.clone() for name, part in module.state_dict().items()}
    fit(module, CLASSES, 3, TwoStages(0))
    moved = {name for name, part in module.state_dict().items() if not torch.equal(part, before[name])}
    assert moved == {f"heads.{layer}.{part}" for layer in range(3) for part in ("weight", "bias")}


def test_berxit_learns_numbers_and_where_they_are_right(tiny_config):
    torch.manual_seed(0)
    module = TaskModule(tiny_config(), Regression(), learned_exit=True, lr_scheduler=None)
    module.optimizer = lambda groups: torch.optim.AdamW(groups, lr=3e-3)
    fit(module, NUMBERS, 120, AlternatingExits())
    for layer in (2, 4):
        found = module.answer(NUMBERS["input_ids"], NUMBERS["lengths"], exit_layer=layer)
        assert (found.outputs[:, 0] - NUMBERS["targets"]).abs().mean() < 0.3
    # Memorized: the classifier has seen that the exits are right.
    assert module.answer(NUMBERS["input_ids"], NUMBERS["lengths"], LearnedExit(0.5)).depths.float().mean() < 3


def test_bad_classes():
    with pytest.raises(ValueError, match="num_outputs: 1 is not a whole number from 2 up"):
        Classification(1)
