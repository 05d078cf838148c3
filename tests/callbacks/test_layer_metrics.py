"""LayerMetrics: the numbers by a naive pass, TensorBoard by its own reader, the table by its text."""

from functools import partial

import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from lskip.callbacks import EarlyExitLoss, LayerDropout, LayerMetrics
from lskip.curricula import Rotational
from lskip.module import LayerSkipModule
from lskip.schedules import Linear
from tests.trainers import quiet_trainer

LAYERS = [f"layer_{layer:02d}" for layer in (1, 2, 3, 4)]


def random_ids(rows, length, seed):
    return torch.randint(0, 300, (rows, length), generator=torch.Generator().manual_seed(seed))


VALIDATION = [random_ids(2, 9, seed=3), random_ids(3, 20, seed=4)]


def loader(batches):
    return DataLoader([{"input_ids": ids} for ids in batches], batch_size=None)


def rounds_of(agree, num_speculations):
    """Return the rounds in which one text is decoded, its first token by the prefill."""
    rounds, done = 1, 1
    while done < len(agree):
        right = agree[done : done + num_speculations]
        done += 1 + (right.index(False) if False in right else len(right))
        rounds += 1
    return rounds


@torch.no_grad()
def naive_tokens_per_round(model, num_speculations):
    """Return tokens per round by layer over the rows of VALIDATION, each decoded alone."""
    tokens, rounds = 0, [0] * 4
    for row in (row for ids in VALIDATION for row in ids):
        *early, last = model.model(row[None], output_hidden_states=True).hidden_states[1:]
        says = torch.stack([model.lm_head(h)[0, :-1].argmax(-1) for h in [*map(model.model.norm, early), last]])
        tokens += says.shape[1]
        for layer, agree in enumerate((says == says[-1]).tolist()):
            rounds[layer] += rounds_of(agree, num_speculations)
    return [tokens / count for count in rounds]


@torch.no_grad()
def naive_report(model):
    """Return perplexity and agreement by layer over VALIDATION."""
    losses, agree = [], []
    for ids in VALIDATION:
        *early, last = model.model(ids, output_hidden_states=True).hidden_states[1:]
        logits = torch.stack([model.lm_head(h)[:, :-1] for h in [*map(model.model.norm, early), last]])
        losses.append(
            torch.stack([cross_entropy(z.flatten(0, 1), ids[:, 1:].flatten(), reduction="none") for z in logits])
        )
        predictions = logits.argmax(-1).flatten(1)
        agree.append(predictions == predictions[-1])
    return torch.cat(losses, 1).mean(1).exp().tolist(), torch.cat(agree, 1).float().mean(1).tolist()


def test_validate_measures_all_layers_and_ends_with_a_table(tiny_model, tmp_path, capsys):
    model, metrics = tiny_model(), LayerMetrics()
    assert metrics.report is None
    (logged,) = quiet_trainer(tmp_path, metrics).validate(LayerSkipModule(model), loader(VALIDATION), verbose=False)
    perplexity, agreement = naive_report(model)
    assert metrics.report.perplexity == pytest.approx(perplexity, rel=1e-5)
    assert metrics.report.agreement == pytest.approx(agreement)
    assert [logged[f"val/ppl/{layer}"] for layer in LAYERS] == pytest.approx(perplexity, rel=1e-5)
    assert [logged[f"val/agreement/{layer}"] for layer in LAYERS] == pytest.approx(agreement)
    assert logged["val/layers_needed"] == pytest.approx(metrics.report.layers_needed)
    for d in (4, 8):
        tokens = naive_tokens_per_round(model, d)
        assert metrics.report.tokens_per_round[d] == pytest.approx(tokens)
        assert [logged[f"val/tokens_per_round_{d}/{layer}"] for layer in LAYERS] == pytest.approx(tokens)
    table = capsys.readouterr().out
    for layer in range(4):
        assert any(
            {str(layer + 1), f"{perplexity[layer]:.4g}", f"{agreement[layer]:.2f}", f"{tokens[layer]:.2f}"}
            <= set(line.replace("│", " ").split())
            for line in table.splitlines()
        ), table
    assert f"layers_needed: {metrics.report.layers_needed:.1f} of 4" in table


def test_test_logs_under_its_own_name(tiny_model, tmp_path, capsys):
    metrics = LayerMetrics()
    (logged,) = quiet_trainer(tmp_path, metrics).test(LayerSkipModule(tiny_model()), loader(VALIDATION), verbose=False)
    assert logged["test/ppl/layer_04"] == pytest.approx(metrics.report.perplexity[3])
    assert not any(name.startswith("val/") for name in logged)
    assert "layers_needed" in capsys.readouterr().out


def test_each_validation_of_a_run_starts_from_zero(tiny_model, tmp_path):
    model, metrics = tiny_model(), LayerMetrics()
    trainer = quiet_trainer(tmp_path, metrics, max_steps=2, val_check_interval=1)
    module = LayerSkipModule(model, optimizer=partial(torch.optim.SGD, lr=5.0), lr_scheduler=None)
    trainer.fit(module, loader([random_ids(2, 16, seed=step) for step in range(2)]), loader(VALIDATION))
    perplexity, agreement = naive_report(model)
    assert metrics.report.perplexity == pytest.approx(perplexity, rel=1e-4)
    assert metrics.report.agreement == pytest.approx(agreement)


@pytest.fixture(scope="module")
def events(tmp_path_factory):
    """TensorBoard's own reading of a run of 4 steps of 2 micro-batches, logged every 2, validated after 2 and 4."""
    from tests.conftest import make_model

    folder = tmp_path_factory.mktemp("run")
    trainer = quiet_trainer(
        folder,
        LayerDropout(0.6, Linear(), Linear()),
        EarlyExitLoss(0.5, Rotational(2)),
        LayerMetrics(),
        logger=TensorBoardLogger(folder, name="", version=""),
        max_steps=4,
        accumulate_grad_batches=2,
        log_every_n_steps=2,
        val_check_interval=4,
    )
    training = loader([random_ids(2, 16, seed=step) for step in range(8)])
    trainer.fit(LayerSkipModule(make_model()), training, loader(VALIDATION))
    accumulator = EventAccumulator(str(folder), size_guidance={"images": 0, "scalars": 0})
    return accumulator.Reload()


def test_the_event_file_holds_every_tag(events):
    expected = {"train/loss", "train/loss_last_layer", "train/tokens_per_second", "val/loss", "val/layers_needed"}
    rounds = ("val/tokens_per_round_4", "val/tokens_per_round_8")
    for name in ("train/drop_rate", "train/exit_weight", "val/ppl", "val/agreement", *rounds):
        expected |= {f"{name}/{layer}" for layer in LAYERS}
    assert expected <= set(events.Tags()["scalars"])
    assert events.Tags()["images"] == ["val/perplexity_by_depth"]
    # PNGs, one a validation; none of the sanity check
    images = events.Images("val/perplexity_by_depth")
    assert [image.step for image in images] == [2, 4]
    assert all(image.encoded_image_string.startswith(b"\x89PNG") and image.width > 100 for image in images)


def test_the_curves_hold_the_means_over_the_steps_between(events):
    def curve(tag):
        return [(event.step, pytest.approx(event.value, rel=1e-6)) for event in events.Scalars(tag)]

    # Rates of the last block 0, 0.2, 0.4, 0.6 at the four steps; e = 0, 0.5, 1.5, 4.5 with exits 0, 2, 3 and 1, 3.
    assert curve("train/drop_rate/layer_01") == [(2, 0), (4, 0)]
    assert curve("train/drop_rate/layer_04") == [(2, 0.1), (4, 0.5)]
    assert curve("train/drop_rate/layer_02") == [(2, 0.1 / 3), (4, 0.5 / 3)]
    assert curve("train/exit_weight/layer_01") == [(2, 0), (4, 0)]
    assert curve("train/exit_weight/layer_02") == [(2, 1 / 20), (4, 1 / 20)]
    assert curve("train/exit_weight/layer_03") == [(2, 1 / 8), (4, 1 / 8)]
    assert curve("train/exit_weight/layer_04") == [(2, 33 / 40), (4, 33 / 40)]
    assert all(event.value > 0 for event in events.Scalars("train/tokens_per_second"))
    assert len(events.Scalars("val/ppl/layer_03")) == 2
    assert events.Scalars("val/ppl/layer_03")[0].value != events.Scalars("val/ppl/layer_03")[1].value


def test_a_run_that_logs_nothing_is_fine(tiny_model, tmp_path):
    trainer = quiet_trainer(tmp_path, max_steps=2, log_every_n_steps=0, logger=TensorBoardLogger(tmp_path))
    trainer.fit(LayerSkipModule(tiny_model()), loader(VALIDATION))
    assert trainer.global_step == 2
