"""LayerSkipModule, by itself and in Lightning's loop."""

from functools import partial

import pytest
import torch
from lightning.pytorch import Callback
from torch.utils.data import DataLoader, IterableDataset

import lskip.module
from lskip.callbacks import EarlyExitLoss, LayerDropout
from lskip.curricula import AllExits
from lskip.module import LayerSkipModule
from lskip.schedules import Constant, Schedule
from tests.trainers import quiet_trainer

SGD = partial(torch.optim.SGD, lr=0.1)


def random_ids(rows=3, length=12, seed=1):
    return torch.randint(0, 300, (rows, length), generator=torch.Generator().manual_seed(seed))


def make_module(model, rates=None, weights=None, **settings):
    module = LayerSkipModule(model, **settings)
    if rates is not None:
        module.drop_rates.write("test", rates)
    if weights is not None:
        module.exit_weights.write("test", weights)
    return module


def loader(batches, **settings):
    return DataLoader([{"input_ids": ids} for ids in batches], batch_size=None, **settings)


def gradients(module):
    parts = module.model.named_parameters()  # a block without rows has no gradient
    return {name: torch.zeros_like(part) if part.grad is None else part.grad.clone() for name, part in parts}


# Plain language-model training


@pytest.mark.parametrize(
    ("family", "overrides"),
    [("llama", {}), ("mistral", {"sliding_window": 5}), ("qwen2", {"tie_word_embeddings": False}), ("qwen3", {})],
)
@pytest.mark.parametrize("masked", [False, True])
def test_with_no_callback_loss_and_gradients_are_those_of_transformers(tiny_model, family, overrides, masked):
    ids = random_ids()
    labels = ids.clone()
    if masked:
        labels[0, :5] = labels[1, -3:] = labels[2] = -100
    batch = {"input_ids": ids, "labels": labels} if masked else {"input_ids": ids}
    module = make_module(tiny_model(family, **overrides))
    loss, last_loss = module.early_exit_loss(batch, micro_batch=0)
    loss.backward()
    theirs = tiny_model(family, **overrides)
    expected = theirs(ids, labels=labels).loss
    expected.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(last_loss, expected.detach())
    for (name, ours), parameter in zip(gradients(module).items(), theirs.parameters(), strict=True):
        torch.testing.assert_close(ours, parameter.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_a_batch_that_scores_nothing_trains_nothing(tiny_model):
    ids = random_ids()
    module = make_module(tiny_model(), weights=[0, 0.2, 0.3, 0.5], position_share=0.5)
    loss, last_loss = module.early_exit_loss({"input_ids": ids, "labels": torch.full_like(ids, -100)}, 0)
    loss.backward()
    assert loss.item() == last_loss.item() == 0
    assert not any(gradient.any() for gradient in gradients(module).values())


def test_only_the_blocks_that_the_exits_need_run(tiny_model):
    module = make_module(tiny_model(), weights=[0.0, 1.0, 0.0, 0.0])
    calls = []
    for block, layer in enumerate(module.model.model.layers):
        layer.register_forward_pre_hook(lambda *_, block=block: calls.append(block))
    module.early_exit_loss({"input_ids": random_ids()}, 0)
    assert calls == [0, 1]


def test_no_exit_at_all_is_refused(tiny_model):
    module = make_module(tiny_model(), weights=[0.0] * 4)
    with pytest.raises(ValueError, match="exit_weights: all are 0"):
        module.early_exit_loss({"input_ids": random_ids()}, 0)


# Layer dropout in the module (the reference is in test_training_reference.py)


def test_each_block_sees_as_many_rows_as_are_left(tiny_model):
    module = make_module(tiny_model(), rates=[0.0, 0.3, 0.6, 1.0], seed=4)
    rows = []
    for layer in module.model.model.layers:
        layer.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    module.early_exit_loss({"input_ids": random_ids(rows=16)}, micro_batch=5)
    kept = [int((~lskip.module.draw_dropped(4, 5, block, 16, r)).sum()) for block, r in enumerate([0, 0.3, 0.6, 1])]
    assert kept[0] == 16 and 0 < kept[1] < 16 and 0 < kept[2] < 16 and kept[3] == 0
    assert rows == kept[:3]  # a block without rows is not called


class AllButOne(Schedule):
    def __call__(self, index, count):
        return float(index != 2)


def test_a_block_that_a_step_skips_has_gradients_of_zero(tiny_model, tmp_path):
    """So weight decay and momentum go on, as for a block with no kept row in the equation. Red where it has none."""
    model = tiny_model()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    module = LayerSkipModule(model, optimizer=partial(torch.optim.SGD, lr=0.1, weight_decay=0.5), lr_scheduler=None)
    dropout = LayerDropout(1.0, depth=AllButOne())
    quiet_trainer(tmp_path, dropout, max_steps=1).fit(module, loader([random_ids(rows=1)]))
    for name, parameter in model.named_parameters():
        shrunk = before[name] * (1 - 0.1 * (0.5 if parameter.ndim > 1 else 0))
        skipped = any(f".layers.{block}." in name for block in (0, 1, 3))
        assert torch.allclose(parameter, shrunk, rtol=1e-6, atol=0) == skipped, name


def test_another_seed_drops_other_sequences(tiny_model):
    def loss(seed):
        module = make_module(tiny_model(), rates=[0.5] * 4, seed=seed)
        return module.early_exit_loss({"input_ids": random_ids(rows=16)}, 0)[0].item()

    assert loss(0) == loss(0) != loss(1)


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_changes_nothing(tiny_model, reentrant):
    def run(checkpointing):
        module = make_module(tiny_model(), rates=[0, 0.4, 0.4, 1.0], weights=[0, 0.2, 0.3, 0.5])
        if checkpointing:
            module.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        calls = []
        module.model.model.layers[1].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
        loss, _ = module.early_exit_loss({"input_ids": random_ids(rows=6)}, 3)
        loss.backward()
        return loss, gradients(module), len(calls)

    plain, grads, calls = run(False)
    checkpointed, same_grads, more_calls = run(True)
    assert (calls, more_calls) == (1, 2)  # it did recompute
    assert torch.equal(plain, checkpointed)
    for name in grads:
        torch.testing.assert_close(same_grads[name], grads[name], rtol=1e-5, atol=1e-7)


# Vectors and their writers, over runs


class MyMethod(Callback):
    """A method of a user's own: the first two exits alike, the deeper half dropped more over time."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        pl_module.exit_weights.write(self, [0.25, 0.25, 0.0, 0.5])
        pl_module.drop_rates.write(self, [0.0, 0.0, 0.1 * trainer.global_step, 0.1 * trainer.global_step])


def test_a_method_of_ones_own_is_a_callback_that_writes_the_vectors(tiny_model, tmp_path):
    seen = []

    class Look(Callback):
        def on_before_backward(self, trainer, pl_module, loss):
            seen.append((pl_module.exit_weights.values, pl_module.drop_rates.values))

    quiet_trainer(tmp_path, MyMethod(), Look(), max_steps=2).fit(
        LayerSkipModule(tiny_model()), loader([random_ids()] * 2)
    )
    assert seen == [([0.25, 0.25, 0, 0.5], [0.0] * 4), ([0.25, 0.25, 0, 0.5], [0, 0, 0.1, 0.1])]


@pytest.mark.parametrize(
    ("callbacks", "said"),
    [
        ([EarlyExitLoss(), MyMethod()], "EarlyExitLoss and MyMethod both write exit_weights"),
        ([LayerDropout(), LayerDropout()], "LayerDropout and LayerDropout both write drop_rates"),
    ],
)
def test_two_writers_of_a_vector_are_refused_by_name(tiny_model, tmp_path, callbacks, said):
    trainer = quiet_trainer(tmp_path, *callbacks, max_steps=1)
    with pytest.raises(ValueError, match=said):
        trainer.fit(LayerSkipModule(tiny_model()), loader([random_ids()]))


def test_a_second_run_of_the_module_starts_from_plain_training(tiny_model, tmp_path):
    module = LayerSkipModule(tiny_model(), optimizer=SGD)
    data = loader([random_ids()])
    quiet_trainer(tmp_path, LayerDropout(0.5, Constant()), EarlyExitLoss(0.5, AllExits()), max_steps=1).fit(
        module, data
    )
    assert module.drop_rates.values == [0.5] * 4
    quiet_trainer(tmp_path, LayerDropout(0.1, Constant()), max_steps=1).fit(module, data)
    assert module.drop_rates.values == [0.1] * 4 and module.exit_weights.values == [0, 0, 0, 1]
    quiet_trainer(tmp_path, max_steps=1).fit(module, data)
    assert module.drop_rates.values == [0.0] * 4


# What the module knows of the run


def test_micro_batches_are_numbered_through_the_run(tiny_model, tmp_path, monkeypatch):
    """Over epochs and accumulated steps alike: no two of them draw the same."""
    numbers = []
    original = LayerSkipModule.early_exit_loss
    monkeypatch.setattr(LayerSkipModule, "early_exit_loss", lambda *args: numbers.append(args[-1]) or original(*args))
    trainer = quiet_trainer(tmp_path, max_epochs=2, accumulate_grad_batches=2)
    trainer.fit(LayerSkipModule(tiny_model()), loader([random_ids()] * 3))
    assert numbers == [0, 1, 2, 3, 4, 5]


class Stream(IterableDataset):
    def __iter__(self):
        return iter([{"input_ids": random_ids()}] * 100)


@pytest.mark.parametrize(
    ("data", "settings", "expected"),
    [
        (Stream(), {"max_epochs": 1, "limit_train_batches": 2}, 2),
        (Stream(), {"max_steps": 3}, 3),
        ([{"input_ids": random_ids()}] * 5, {"max_epochs": 3, "accumulate_grad_batches": 2}, 9),
        ([{"input_ids": random_ids()}] * 5, {"max_epochs": 3, "max_steps": 7}, 7),
        (Stream(), {"max_epochs": 1}, None),
    ],
)
def test_total_steps(tiny_model, tmp_path, data, settings, expected):
    totals = []

    class Stop(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            totals.append(pl_module.total_steps)
            trainer.should_stop = True

    trainer = quiet_trainer(tmp_path, Stop(), **settings)
    trainer.fit(LayerSkipModule(tiny_model()), DataLoader(data, batch_size=None))
    assert totals[0] == expected


def test_norms_and_biases_do_not_decay(tiny_model):
    module = LayerSkipModule(
        tiny_model("qwen2"), optimizer=partial(torch.optim.AdamW, weight_decay=0.1), lr_scheduler=None
    )
    names = {id(parameter): name for name, parameter in module.model.named_parameters()}
    decaying, others = module.configure_optimizers().param_groups
    assert (decaying["weight_decay"], others["weight_decay"]) == (0.1, 0.0)
    assert all(".weight" in names[id(p)] and "norm" not in names[id(p)] for p in decaying["params"])
    assert all("norm" in names[id(p)] or ".bias" in names[id(p)] for p in others["params"])
    assert len(decaying["params"]) + len(others["params"]) == len(names)


def test_validation_loss_is_the_mean_over_tokens_of_all_batches(tiny_model, tmp_path):
    model = tiny_model()
    few, none, many = random_ids(2, 7, seed=2), random_ids(2, 9, seed=3), random_ids(3, 20, seed=4)
    batches = [{"input_ids": few}, {"input_ids": none, "labels": torch.full_like(none, -100)}, {"input_ids": many}]
    (result,) = quiet_trainer(tmp_path).validate(
        LayerSkipModule(model), DataLoader(batches, batch_size=None), verbose=False
    )
    with torch.no_grad():
        losses = [model(ids, labels=ids).loss.item() for ids in (few, many)]
    assert result["val/loss"] == pytest.approx((12 * losses[0] + 57 * losses[1]) / 69, rel=1e-5)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"position_share": 0.0}, "position_share: 0.0"),
        ({"position_share": 1.5}, "position_share: 1.5"),
        ({"seed": -1}, "seed: -1"),
    ],
)
def test_numbers_out_of_range_are_refused(tiny_model, settings, said):
    with pytest.raises(ValueError, match=said):
        LayerSkipModule(tiny_model(), **settings)


def test_data_that_does_not_fit_the_model_is_refused(tiny_model, tiny_tokenizer, tmp_path):
    trainer = quiet_trainer(tmp_path, max_steps=1)
    with pytest.raises(ValueError, match="block_size: 129 tokens, the model's context holds 128"):
        trainer.fit(LayerSkipModule(tiny_model()), loader([random_ids(1, 129)]))
    with pytest.raises(ValueError, match="vocab_size: the model has 200, the tokenizer 291 entries"):
        trainer.fit(LayerSkipModule(tiny_model(vocab_size=200), tiny_tokenizer), loader([random_ids() % 200]))


def test_a_fused_optimizer_is_clipped_in_bfloat16(tiny_model, tmp_path):
    """Lightning refuses the three together."""
    norms = []

    class Norms(Callback):
        def on_before_zero_grad(self, trainer, module, optimizer):
            grads = [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
            norms.extend([torch.nn.utils.get_total_norm(grads).item()] if grads else [])

    fused = partial(torch.optim.AdamW, lr=1e-3, fused=True)
    for algorithm, most in (("norm", 0.01), ("value", 0.01 * 40000**0.5)):
        norms.clear()
        settings = {"gradient_clip_val": 0.01, "gradient_clip_algorithm": algorithm, "precision": "bf16-mixed"}
        trainer = quiet_trainer(tmp_path, Norms(), max_steps=3, **settings)
        trainer.fit(
            LayerSkipModule(tiny_model(), optimizer=fused), loader([random_ids(seed=seed) for seed in range(3)])
        )
        assert norms and max(norms) <= most * 1.001
        assert (max(norms) > 0.02) == (algorithm == "value")  # unclipped it is far above both
