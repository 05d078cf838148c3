"""The divergence report: worked by hand on layers that are tables, and against transformers' hidden states."""

import json
import math

import pytest
import torch
from torch.distributions import Categorical
from torch.nn.functional import cross_entropy

from lskip.evaluation.layers.divergence import report_divergence
from lskip.models.decoder import Decoder
from lskip.models.readout import report_layers


class TableDecoder:
    """Three layers whose logits are given: [L, S, V]."""

    device = torch.device("cpu")

    def __init__(self, logits):
        self.logits, self.num_layers, self.vocab_size = logits, len(logits), logits.shape[-1]

    def block_index(self, exit_layer):
        return exit_layer - 1

    def enter(self, input_ids, position_ids):
        return torch.zeros(*input_ids.shape, self.vocab_size), None

    def block(self, index, x, inputs):
        return self.logits[index][None]

    def decode(self, x):
        return x


HALF, SURE = [0.5, 0.5, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0]
MOSTLY = {token: [0.7 if token == other else 0.1 for other in range(4)] for token in range(4)}
IDS = torch.tensor([[0, 1, 2, 3, 3]])
# What each layer says at the four positions that predict 1, 2, 3, 3:
SAYS = [
    [1, 2, 0, 3],
    [0, 2, 1, 2],
    [1, 2, 1, 2],
]


def by_hand():
    layers = [[MOSTLY[token] for token in row] + [SURE] for row in SAYS]  # the last position predicts nothing known
    return report_divergence(
        TableDecoder(torch.tensor(layers).log().clamp(min=-100)), [{"input_ids": IDS, "labels": IDS}]
    )


def test_depths_by_hand():
    report = by_hand()
    assert report.positions == 4 and report.num_layers == 3
    # columns: right, lost, came back (settles at 3, first agrees at 1); always; never right (settles at 2);
    # right at layer 1 and then no more (settles at 2)
    assert report.settled_at == [0.25, 0.5, 0.25]
    assert report.first_agreeing_at == [0.5, 0.5, 0.0]
    assert report.first_right_at == [0.75, 0.0, 0.0]
    assert report.agreement == [0.5, 0.75, 1.0]
    assert report.accuracy == [0.75, 0.25, 0.5]
    assert report.layers_needed == 2.0 and report.ideal_saving == pytest.approx(1 / 3)
    assert report.first_agreeing_depth == 1.5
    assert report.ever_right == 0.75 and report.first_right_depth == 1.0
    assert report.ideal_saving_first_right == pytest.approx(2 / 3)


def test_perplexity_and_entropy_by_hand():
    report = by_hand()
    losses = [-(right * math.log(0.7) + (4 - right) * math.log(0.1)) / 4 for right in (3, 1, 2)]
    assert report.perplexity == pytest.approx([math.exp(loss) for loss in losses])
    assert report.entropy == pytest.approx([-(0.7 * math.log(0.7) + 0.3 * math.log(0.1))] * 3)
    rows = torch.tensor([[HALF, SURE]]).log()  # logits of minus infinity: 0 log 0 is 0
    ids = torch.tensor([[2, 1]])
    report = report_divergence(TableDecoder(rows), [{"input_ids": ids, "labels": ids}])
    assert report.entropy == pytest.approx([math.log(2)])


def test_a_text_that_no_layer_is_ever_right_about():
    ids = torch.tensor([[0, 3]])
    logits = torch.tensor([[HALF, SURE]]).log()
    report = report_divergence(TableDecoder(logits), [{"input_ids": ids, "labels": ids}])
    assert report.ever_right == 0 and report.first_right_depth is None and report.ideal_saving_first_right is None
    assert report.perplexity == [math.inf]
    record = json.loads(json.dumps(report.record(), allow_nan=False))
    assert record["layers"][0]["perplexity"] is None and record["first_right_depth"] is None


@torch.no_grad()
def test_against_hidden_states_decoded_one_by_one(tiny_model):
    model = tiny_model()
    ids = torch.randint(0, 300, (3, 12), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[0, :7] = -100
    losses, entropies, right = [], [], []
    for row, targets in zip(ids, labels[:, 1:], strict=True):
        hidden = model.model(row[None], output_hidden_states=True).hidden_states[1:]
        states = [model.model.norm(h[0]) for h in hidden[:-1]] + [hidden[-1][0]]
        logits = torch.stack([model.lm_head(h)[:-1] for h in states])[:, targets != -100]
        targets = targets[targets != -100]
        losses.append(torch.stack([cross_entropy(layer, targets, reduction="none") for layer in logits]))
        entropies.append(Categorical(logits=logits).entropy())
        right.append(logits.argmax(-1) == targets)
    batches = [{"input_ids": ids[:1], "labels": labels[:1]}, {"input_ids": ids[1:], "labels": labels[1:]}]
    report = report_divergence(Decoder(model), batches)
    assert report.positions == 5 + 11 + 11
    assert report.perplexity == pytest.approx(torch.cat(losses, 1).mean(1).exp().tolist(), rel=1e-4)
    assert report.entropy == pytest.approx(torch.cat(entropies, 1).mean(1).tolist(), rel=1e-4)
    assert report.accuracy == pytest.approx(torch.cat(right, 1).float().mean(1).tolist())


@torch.no_grad()
def test_what_it_shares_with_validation_is_the_same(tiny_model):
    decoder = Decoder(tiny_model())
    ids = torch.randint(0, 300, (3, 12), generator=torch.Generator().manual_seed(1))
    ours, validation = report_divergence(decoder, [{"input_ids": ids, "labels": ids}]), report_layers(decoder, [ids])
    assert ours.perplexity == pytest.approx(validation.perplexity, rel=1e-5)
    assert ours.agreement == pytest.approx(validation.agreement)
    assert ours.layers_needed == pytest.approx(validation.layers_needed)
    assert sum(ours.settled_at) == pytest.approx(1) and sum(ours.first_agreeing_at) == pytest.approx(1)
