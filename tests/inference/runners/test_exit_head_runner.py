"""Exits with a map of their own, decoded: fixed exit, criteria and drafts, against references without a cache."""

import pytest
import torch

from lskip.inference import CriterionDraft, Entropy, LearnedExit, Margin, Saturation, TextGenerator
from lskip.models.exit_heads import TrainedExits
from tests.inference.test_early_exit import CRITERIA, NEW, PROMPT, PROMPTS, build, slow_reference


@pytest.fixture
def exits():
    torch.manual_seed(5)
    made = TrainedExits(4, 32, heads=True, classifier=True)
    for parameter in made.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return made


@pytest.mark.parametrize("name", ["entropy", "margin"])
def test_a_criterion_reads_through_the_heads(tiny_model, exits, name):
    model, (criterion, holds, threshold) = build(tiny_model), CRITERIA[name]
    generator = TextGenerator(model, trained_exits=exits)
    settings = {"exit_criterion": criterion(threshold), "max_new_tokens": NEW}
    tokens, depths = slow_reference(
        model, PROMPT, lambda *seen: holds(*seen, threshold=threshold), translate=exits.translate
    )
    ours = generator.generate(PROMPT, **settings)
    assert (ours.token_ids, ours.layers_run) == (tokens, sum(depths))
    assert len(set(depths)) > 1
    assert ours.token_ids != TextGenerator(model).generate(PROMPT, **settings).token_ids


@torch.inference_mode()
def test_a_fixed_exit_reads_through_its_head(tiny_model, exits):
    model, text = build(tiny_model), list(PROMPT)
    for _ in range(12):
        states = model.model.embed_tokens(torch.tensor([text]))
        positions = torch.arange(len(text))[None]
        for layer in model.model.layers[:2]:
            rotary = model.model.rotary_emb(states, positions)
            states = layer(states, attention_mask=None, position_ids=positions, position_embeddings=rotary)
        text.append(int(model.lm_head(model.model.norm(exits.heads.maps[1](states)))[0, -1].argmax()))
    ours = TextGenerator(model, trained_exits=exits).generate(PROMPT, exit_layer=2, max_new_tokens=12)
    assert ours.token_ids == text[len(PROMPT) :]


POLICIES = {
    "fixed": lambda: None,
    "entropy": lambda: CriterionDraft(Entropy(0.3)),
    "margin": lambda: CriterionDraft(Margin(0.4)),
    "learned": lambda: CriterionDraft(LearnedExit(0.5)),
}


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("policy", POLICIES)
def test_drafts_of_headed_exits_do_not_change_the_text(tiny_model, exits, policy, temperature):
    model = build(tiny_model)
    settings = {"max_new_tokens": NEW, "temperature": temperature, "seed": 4}
    drafting = {"exit_layer": 2, "num_speculations": 4, "draft_policy": POLICIES[policy]()}
    generator = TextGenerator(model, trained_exits=exits)
    truth = [outcome.token_ids for _, outcome in sorted(TextGenerator(model).generate_batch(PROMPTS, 3, **settings))]
    found = sorted(generator.generate_batch(PROMPTS, 3, **settings, **drafting))
    assert [outcome.token_ids for _, outcome in found] == truth
    assert sum(outcome.drafted for _, outcome in found) > 0


def test_a_head_that_is_right_is_accepted(tiny_model):
    """A map that undoes what it has not seen would be magic; with blocks that do nothing the identity is right."""
    model = build(tiny_model)
    for layer in model.model.layers[2:]:
        layer.self_attn.o_proj.weight.data.zero_()
        layer.mlp.down_proj.weight.data.zero_()
    exits = TrainedExits(4, 32, heads=True, classifier=False)
    settings = {"exit_layer": 2, "num_speculations": 3, "max_new_tokens": NEW}
    assert TextGenerator(model, trained_exits=exits).generate(PROMPT, **settings).acceptance_rate == 1.0
    exits.heads.maps[1].weight.data.neg_()
    assert TextGenerator(model, trained_exits=exits).generate(PROMPT, **settings).acceptance_rate < 0.5


@pytest.mark.parametrize(("threshold", "drafted"), [(0.0, 3), (1.0, 1)])
def test_a_draft_stops_at_the_first_unsure_exit(tiny_model, exits, threshold, drafted):
    """Certain at threshold 0, unsure of everything at 1: then only the token of which it was asked is drafted."""
    generator = TextGenerator(build(tiny_model), trained_exits=exits)
    settings = {"exit_layer": 2, "num_speculations": 3, "max_new_tokens": 30}
    ours = generator.generate(PROMPT, draft_policy=CriterionDraft(LearnedExit(threshold)), **settings)
    assert max(ours.accepted_counts) <= drafted
    rounds = sum(ours.accepted_counts.values())
    assert (drafted - 1) * rounds < ours.drafted <= drafted * rounds  # fewer where the text ends


def test_half_of_the_slots_stop_a_draft(tiny_model, exits):
    asked = []

    class First(Margin):
        """Sure of the first slot alone."""

        def exits(self, exit_layer, before, after, logits):
            asked.append((exit_layer, len(after)))
            return torch.arange(len(after)) == 0

    settings = {"exit_layer": 2, "num_speculations": 3, "max_new_tokens": 6, "draft_policy": CriterionDraft(First(0.5))}
    generator = TextGenerator(build(tiny_model), trained_exits=exits)
    dict(generator.generate_batch(PROMPTS[:2], 2, **settings))
    assert set(asked) >= {(2, 2)}
    two = [slots for _, slots in asked].count(2)
    assert two < 6  # one question a round: half of two slots doubt, and the draft ends


def test_what_a_draft_cannot_be_stopped_by(tiny_model):
    with pytest.raises(ValueError, match="criterion: Saturation compares two blocks' states"):
        CriterionDraft(Saturation(0.9))
    with pytest.raises(ValueError, match="LearnedExit needs a model that was trained with learned_exit: true"):
        settings = {"draft_policy": CriterionDraft(LearnedExit(0.5)), "exit_layer": 2, "num_speculations": 3}
        TextGenerator(build(tiny_model)).generate(PROMPT, **settings)
