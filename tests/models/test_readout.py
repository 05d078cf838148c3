"""Every layer's losses and predictions, against transformers' hidden states decoded one by one."""

import math

import pytest
import torch
from torch.nn.functional import cross_entropy

from lskip.models import readout
from lskip.models.decoder import Decoder
from lskip.models.readout import LayerReportMetric, Readout, read_exits, report_layers, settled_depth
from lskip.models.scored import scored_positions

SLIDING = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2}


def random_ids(rows=3, length=12):
    return torch.randint(0, 300, (rows, length), generator=torch.Generator().manual_seed(1))


def naive_layers(model, ids, labels):
    """Return losses and predictions [L, N] of the scored positions, by output_hidden_states, one sequence at a time."""
    losses, predictions = [], []
    for row, targets in zip(ids, labels[:, 1:], strict=True):
        hidden = model.model(row[None], output_hidden_states=True).hidden_states[1:]
        # the last one is already normed
        states = [model.model.norm(h[0]) for h in hidden[:-1]] + [hidden[-1][0]]
        logits = torch.stack([model.lm_head(h)[:-1] for h in states])[:, targets != -100]
        targets = targets[targets != -100]
        losses.append(torch.stack([cross_entropy(layer, targets, reduction="none") for layer in logits]))
        predictions.append(logits.argmax(-1))
    return torch.cat(losses, 1), torch.cat(predictions, 1)


@pytest.mark.parametrize(("family", "overrides"), [("llama", {}), ("qwen3", SLIDING)])
@torch.no_grad()
def test_all_exits_in_one_pass(tiny_model, family, overrides):
    model, ids = tiny_model(family, **overrides), random_ids()
    labels = ids.clone()
    labels[0, :7] = -100
    labels[2] = -100
    losses, predictions = naive_layers(model, ids, labels)
    ours = read_exits(Decoder(model), ids, labels, [1, 2, 3, 4])
    assert losses.shape == (4, 5 + 11)
    torch.testing.assert_close(ours.losses, losses, rtol=1e-4, atol=1e-5)
    assert torch.equal(ours.predictions, predictions)
    assert len({tuple(layer.tolist()) for layer in predictions}) == 4  # the layers do differ
    some = read_exits(Decoder(model), ids, labels, [2, 4])
    assert torch.equal(some.losses, ours.losses[[1, 3]])
    assert ours.losses[-1].mean().item() == pytest.approx(model(ids, labels=labels).loss.item(), rel=1e-5)


@torch.no_grad()
def test_chunks_change_nothing_and_no_chunk_is_larger(tiny_model, monkeypatch):
    decoder, ids = Decoder(tiny_model()), random_ids()
    whole = read_exits(decoder, ids, None, [1, 4])
    rows = []
    decoder.model.lm_head.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    monkeypatch.setattr(readout, "rows_at_once", lambda vocab_size, device: 7)
    chunked = read_exits(decoder, ids, None, [1, 4])
    torch.testing.assert_close(chunked.losses, whole.losses)
    assert torch.equal(chunked.predictions, whole.predictions)
    assert max(rows) == 7 and sum(rows) == 2 * 33


@torch.no_grad()
def test_a_batch_that_scores_nothing(tiny_model):
    ids = random_ids()
    empty = read_exits(Decoder(tiny_model()), ids, torch.full_like(ids, -100), [1, 4])
    assert empty.losses.shape == empty.predictions.shape == (2, 0)


@torch.no_grad()
def test_a_bfloat16_model_is_scored_in_float32(tiny_model):
    model = tiny_model().to(torch.bfloat16)
    assert read_exits(Decoder(model), random_ids(), None, [4]).losses.dtype == torch.float32


def test_scored_positions_by_hand():
    ids = torch.tensor([[5, 6, 7], [8, 9, 10]])
    positions, targets = scored_positions(ids, None)
    assert positions.tolist() == [0, 1, 3, 4] and targets.tolist() == [6, 7, 9, 10]
    # label s belongs to token s, which the state at s - 1 predicts; a label at 0 is predicted by nobody
    positions, targets = scored_positions(ids, torch.tensor([[5, -100, 7], [8, -100, -100]]))
    assert positions.tolist() == [1] and targets.tolist() == [7]


def test_settled_depth_by_hand():
    agree = torch.tensor(
        [
            # always, from 2, from 3 (a match in between does not count), last only
            [1, 0, 1, 0],
            [1, 1, 0, 0],
            [1, 1, 1, 0],
            [1, 1, 1, 1],
        ]
    ).bool()
    assert settled_depth(agree).tolist() == [1, 2, 3, 4]


def test_first_depth_by_hand():
    hits = torch.tensor([[1, 0, 0, 0], [0, 1, 0, 0], [1, 1, 1, 0]]).bool()
    assert readout.first_depth(hits).tolist() == [1, 2, 3, 4]  # the last one never


@torch.no_grad()
def test_the_metric_weighs_tokens_alike_over_batches_of_different_sizes(tiny_model):
    model, ids = tiny_model(), random_ids(5)
    losses, predictions = naive_layers(model, ids, ids)
    report = report_layers(Decoder(model), [ids[:1, :12], ids[1:4], ids[4:]])
    assert report.perplexity == pytest.approx(losses.mean(1).exp().tolist(), rel=1e-5)
    assert report.agreement == pytest.approx((predictions == predictions[-1]).float().mean(1).tolist())
    assert report.agreement[-1] == 1
    needed = 0
    for column in predictions.T.tolist():
        depth = len(column)
        while depth > 1 and column[depth - 2] == column[-1]:
            depth -= 1
        needed += depth
    assert report.layers_needed == pytest.approx(needed / predictions.shape[1])
    assert [row["layer"] for row in report.layers()] == [1, 2, 3, 4]
    assert report.layers()[2]["perplexity"] == report.perplexity[2]
    assert report.layers()[2]["agreement"] == report.agreement[2]


def test_the_metric_by_hand():
    metric = LayerReportMetric(2)
    metric.update(Readout(torch.tensor([[1.0], [0.0]]), torch.tensor([[3], [3]]), torch.tensor([0])))
    losses, predictions = torch.tensor([[3.0, 2.0, 4.0], [1.0, 2.0, 0.0]]), torch.tensor([[3, 4, 4], [1, 4, 5]])
    metric.update(Readout(losses, predictions, torch.tensor([0, 1, 2])))
    report = metric.compute()
    # Layer 1: one round for the first text, two for the second (its first token, then one that agrees and the next).
    # Layer 2, which agrees with itself, the same.
    assert report.tokens_per_round == {4: pytest.approx([4 / 3] * 2), 8: pytest.approx([4 / 3] * 2)}
    assert report.perplexity == pytest.approx([math.exp(2.5), math.exp(0.75)])
    assert report.agreement == [0.5, 1.0] and report.layers_needed == 1.5
    metric.reset()
    metric.update(Readout(torch.full((2, 1), 800.0), torch.zeros(2, 1), torch.tensor([5])))
    assert metric.compute().perplexity == [math.inf] * 2
