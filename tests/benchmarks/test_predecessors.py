"""The predecessors' benchmark: its texts, its scores against slow ones, and that a repeated command repeats no arm."""

import csv
import json
import math
import re

import pytest
import torch

from lskip.inference import Entropy, Margin, TextGenerator
from lskip.models.exit_heads import TrainedExits
from lskip.module import LayerSkipModule

pytestmark = pytest.mark.usefixtures("process_settings")


def said_by(hours, pattern):
    """(groups, hours) of the sentences that are as `pattern` says."""
    matches = ((re.fullmatch(pattern, text), value) for text, value in hours.items())
    return [(match.groups(), value) for match, value in matches if match]


def test_durations_are_those_that_are_said():
    from benchmarks.predecessors.texts import durations

    found = durations(2)
    hours = {each.text: math.exp(each.target) for each in found}
    assert len(found) > 300 and {each.held_out for each in found} == {True, False}
    simple = said_by(hours, r"(\d+)[ -](hour|minute|second)s? timer.*")
    assert all(value == pytest.approx(int(n) / {"h": 1, "m": 60, "s": 3600}[unit[0]]) for (n, unit), value in simple)
    # The timer that is changed has a length too; it is not what is asked for.
    changes = said_by(hours, r"add (\d+)[ -]minutes? to .*hours? timer")
    assert all(value == pytest.approx(int(n) / 60) for (n,), value in changes)
    assert simple and changes
    assert min(hours.values()) >= 1 / 3600 and max(hours.values()) < 110


def test_no_template_and_no_sentence_is_on_both_sides():
    from benchmarks.predecessors.texts import intents

    found = intents(4)
    sides = [{each.text for each in found if each.held_out is side} for side in (True, False)]
    assert all(sides) and not sides[0] & sides[1]
    assert {each.target for each in found} == set(range(1 + max(each.target for each in found)))


def test_following_a_text_that_never_exits_is_reading_it(tiny_model):
    from benchmarks.predecessors.scores import follow

    model = tiny_model(eos_token_id=None)
    texts = torch.randint(0, 300, (3, 14), generator=torch.Generator().manual_seed(2))
    logits = model(texts).logits[:, 5:-1].flatten(0, 1)
    own = texts[:, 6:].flatten()
    runner = TextGenerator(model, weights="plain").runner
    quality, depth = follow(runner, None, texts, 6, Margin(1.0))
    assert depth == 4
    assert quality["perplexity"] == pytest.approx(math.exp(torch.nn.functional.cross_entropy(logits, own)), rel=1e-4)
    assert quality["accuracy"] == pytest.approx((logits.argmax(-1) == own).float().mean().item())


@torch.inference_mode()
def test_following_a_text_that_always_exits_reads_the_exits_head(tiny_model):
    """Exit 2 always: what blocks 3 and 4 hold of the context is seen by nobody."""
    from benchmarks.predecessors.scores import follow

    model, exits = tiny_model(eos_token_id=None), TrainedExits(4, 32, heads=True, classifier=False)
    exits.heads.maps[1].weight.data.neg_()
    texts = torch.randint(0, 300, (2, 9), generator=torch.Generator().manual_seed(2))
    quality, depth = follow(TextGenerator(model, weights="plain").runner, exits, texts, 2, Entropy(1.0, first=2))
    assert depth == 2
    first_two = model.model.layers[:2]
    states, positions = model.model.embed_tokens(texts), torch.arange(9)[None]
    for layer in first_two:
        rotary = model.model.rotary_emb(states, positions)
        states = layer(states, attention_mask=None, position_ids=positions, position_embeddings=rotary)
    logits = model.lm_head(model.model.norm(exits.heads.maps[1](states)))[:, 1:-1].flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(logits, texts[:, 2:].flatten())
    assert quality["perplexity"] == pytest.approx(math.exp(expected), rel=1e-4)


def test_calms_weights(tiny_model):
    from benchmarks.predecessors.arms import DepthWeights

    module = LayerSkipModule(tiny_model())
    DepthWeights().on_fit_start(None, module)
    assert module.exit_weights.values == pytest.approx([0.1, 0.2, 0.3, 0.4])


def test_the_command_and_its_repetition(tmp_path, capsys):
    from benchmarks.predecessors import run as predecessors

    command = ["--quick", "--out", str(tmp_path), "--methods", "DeeBERT", "BERxiT", "--cache_dir", str(tmp_path / "c")]
    predecessors.main([*command, "--tasks", "generation", "regression"])
    assert len(capsys.readouterr().out.splitlines()) == 4
    before = (tmp_path / "predecessors.json").read_text()
    (tmp_path / "regression_BERxiT.json").unlink()  # as if it had been killed there
    predecessors.main([*command, "--tasks", "regression"])
    assert capsys.readouterr().out.startswith("regression, BERxiT: ")
    assert (tmp_path / "predecessors.json").read_text() == before  # nothing lost, and the same numbers again
    with (tmp_path / "predecessors.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(json.loads(before))
    said = {(row["task"], row["method"], row["criterion"]) for row in rows}
    assert ("regression", "BERxiT", "LearnedExit") in said and ("regression", "DeeBERT", "fixed") in said
    assert ("generation", "DeeBERT", "Entropy") in said and ("regression", "DeeBERT", "Entropy") not in said
    assert all(1 <= float(row["mean_layers"]) <= 3 for row in rows if not row["criterion"].startswith("self"))
    assert (tmp_path / "predecessors.png").stat().st_size > 10_000
    with pytest.raises(SystemExit, match="is of other sizes or another seed"):
        predecessors.main([*command, "--seed", "1"])
