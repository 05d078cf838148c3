"""Rounds of draft and verify against slow references, and the passes that they take."""

from collections import Counter

import pytest
import torch

from lskip.inference import GenerationSettings, TextGenerator
from lskip.inference.decoding.sampling import TokenChooser
from lskip.inference.drafting.draft import Draft, DraftPlan
from lskip.inference.drafting.policies import FixedDraft
from lskip.inference.runners.module_runner import ModuleRunner
from lskip.models.decoder import Decoder

PROMPT = [7, 42, 99, 3, 250, 18, 77]
FULL = {"max_new_tokens": 40, "min_new_tokens": 40}


def damped(model, exit_layer, factor):
    """Multiply the output of blocks from `exit_layer` on: at 0 the draft is the model, at 0.5 it often agrees."""
    for layer in model.model.layers[exit_layer:]:
        layer.self_attn.o_proj.weight.data *= factor
        layer.mlp.down_proj.weight.data *= factor
    return model


class NeverAccepting(ModuleRunner):
    """Runner that ranks tokens the other way round where it decodes a state of block 2, the draft's exit."""

    def run(self, x, cache, starts, first, last):
        self.last = last
        return super().run(x, cache, starts, first, last)

    def decode(self, x):
        logits = super().decode(x)
        return -logits if self.last == 2 else logits


@torch.inference_mode()
def slow_reference(model, prompt, exit_layer, num_speculations, new_tokens):
    """Return (tokens, rounds as [drafted, accepted, own]) of self-speculation without a cache, all states anew."""

    def best(tokens, last):
        states = model(torch.tensor([tokens]), output_hidden_states=True).hidden_states
        x = states[last] if last == model.config.num_hidden_layers else model.model.norm(states[last])
        return model.lm_head(x)[0].argmax(-1).tolist()

    layers = model.config.num_hidden_layers
    text = [*prompt, best(prompt, layers)[-1]]  # the prefill brings the first token
    rounds = [((), 0, text[-1])]
    while len(text) < len(prompt) + new_tokens:
        room = min(num_speculations, len(prompt) + new_tokens - len(text) - 1)
        drafted = []
        for _ in range(room):
            drafted.append(best(text + drafted, exit_layer)[-1])
        own = best(text + drafted, layers)[len(text) - 1 :]
        accepted = next((i for i in range(room) if drafted[i] != own[i]), room)
        text += own[: accepted + 1]
        rounds.append((tuple(drafted), accepted, own[accepted]))
    return text[len(prompt) :], rounds


@pytest.mark.parametrize("weights", ["plain", "packed"])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_self_speculation_equals_autoregressive(tiny_model, family, weights):
    generator = TextGenerator(tiny_model(family, tie_word_embeddings=False), weights=weights)
    truth = generator.generate(PROMPT, **FULL).token_ids
    for exit_layer in (1, 2, 3):
        for num_speculations in range(1, 7):
            ours = generator.generate(PROMPT, exit_layer=exit_layer, num_speculations=num_speculations, **FULL)
            assert ours.token_ids == truth, (exit_layer, num_speculations)


def test_model_always_accepts(tiny_model):
    generator = TextGenerator(damped(tiny_model("llama"), 2, 0.0))
    truth = generator.generate(PROMPT, **FULL).token_ids
    ours = generator.generate(PROMPT, exit_layer=2, num_speculations=4, **FULL)
    assert ours.token_ids == truth
    # 1 token from the prefill, 7 rounds of 4 + 1, and the last 4 tokens by a draft of 3.
    assert (ours.acceptance_rate, ours.rounds, ours.tokens_per_round) == (1.0, 9, 40 / 9)
    assert ours.accepted_counts == Counter({4: 7, 3: 1})


def test_model_never_accepts(tiny_model):
    model = tiny_model("llama")
    generator = TextGenerator(model)
    truth = generator.generate(PROMPT, **FULL).token_ids
    generator.runner = NeverAccepting(Decoder(model))
    ours = generator.generate(PROMPT, exit_layer=2, num_speculations=3, **FULL)
    assert ours.token_ids == truth
    assert (ours.acceptance_rate, ours.rounds, ours.tokens_per_round) == (0.0, 40, 1.0)


@pytest.mark.parametrize("num_speculations", [1, 3, 6])
@pytest.mark.parametrize("exit_layer", [2, 3])
def test_model_sometimes_accepts_as_the_slow_reference(tiny_model, exit_layer, num_speculations):
    model = damped(tiny_model("llama", tie_word_embeddings=False, eos_token_id=None), 2, 0.5)
    tokens, rounds = slow_reference(model, PROMPT, exit_layer, num_speculations, 40)
    ours = TextGenerator(model).generate(
        PROMPT, exit_layer=exit_layer, num_speculations=num_speculations, max_new_tokens=40
    )
    assert ours.token_ids == tokens
    assert [(each.drafted, each.accepted, each.own) for each in ours.history] == rounds
    assert {each.draft for each in ours.history if each.drafted} == {Draft("layers", exit_layer)}
    assert all((each.draft is None) == (not each.drafted) for each in ours.history)
    assert (ours.rounds, ours.drafted) == (len(rounds), sum(len(drafted) for drafted, _, _ in rounds))
    assert ours.accepted == sum(accepted for _, accepted, _ in rounds)
    assert ours.accepted_counts == Counter(accepted for drafted, accepted, _ in rounds if drafted)
    assert ours.tokens_per_round == pytest.approx(40 / len(rounds))
    # The test would see nothing if the text repeated one token, or if all drafts shared one fate.
    assert len(set(tokens)) > 10 and 0.05 < ours.acceptance_rate < 0.95


class Judged(FixedDraft):
    """Policy that probes other exits, and n-grams, in every round."""

    PROBED = (Draft("layers", 1), Draft("layers", 3))

    def __init__(self):
        self.agreed, self.accepted = [], []

    def plan(self, slots, most, without=frozenset()):
        return super().plan(slots, most, without)._replace(probed=self.PROBED)

    def judge(self, agreed):
        self.agreed.append(agreed)

    def learn(self, plan, drafted, accepted, seconds=None):
        self.accepted.append(accepted)


@torch.inference_mode()
@pytest.mark.parametrize("settings", [{}, {"temperature": 1.0, "seed": 5}, {"temperature": 1.0, "top_k": 4, "seed": 2}])
def test_probed_exits_agree_where_a_draft_of_theirs_would_have_been_accepted(tiny_model, settings):
    """Against fixed drafts of one token by each exit: its token is accepted at a position, or not."""
    model, judged = damped(tiny_model("llama"), 1, 0.4), Judged()
    settings = {**settings, **FULL}
    drafting = {"exit_layer": 2, "num_speculations": 3}
    ours = TextGenerator(model).generate(PROMPT, draft_policy=judged, **drafting, **settings)
    assert ours.token_ids == TextGenerator(model).generate(PROMPT, **settings).token_ids
    told = {draft: [said for agreed in judged.agreed for said in agreed[draft][0]] for draft in Judged.PROBED}
    lengths = [len(agreed[Judged.PROBED[0]][0]) for agreed in judged.agreed]
    assert lengths == [1 + sum(row) for row in judged.accepted][: len(lengths)]  # the last round has no room for a plan
    for draft, said in told.items():
        expected = accepted_at(model, draft.exit_layer, ours.token_ids, settings)
        assert said[: len(expected)] == expected[: len(said)]
        assert len(said) > 20 and 0 < sum(said) < len(said)


def accepted_at(model, exit_layer, tokens, settings):
    """Return, for each token after the first, whether an exit's draft of it is the text's own token."""
    found = []
    for length in range(1, len(tokens)):
        text = [*PROMPT, *tokens[:length]]
        state = model(torch.tensor([text]), output_hidden_states=True).hidden_states[exit_layer]
        logits = model.lm_head(model.model.norm(state))[0, -1:].float()
        chosen = GenerationSettings(**settings)
        chooser = TokenChooser(chosen, settings.get("seed", 0), (model.generation_config.eos_token_id,), PROMPT)
        chooser.text = text
        found.append(chooser.sample(logits, torch.empty(0, dtype=torch.long)).item() == tokens[length])
    return found


class Foreseeing(Judged):
    """Policy that drafts nothing, and has n-grams judged in every round."""

    PROBED = (Draft("ngram", 0),)

    def plan(self, slots, most, without=frozenset()):
        return DraftPlan(None, 0, self.PROBED)


def test_where_some_texts_have_no_ngram_their_drafts_count_as_refused(tiny_model):
    """Red where texts without a guess are left out: in a batch n-grams then promise more than they bring."""
    prompts, judged = [[5, 6, 7, 5, 6], [9, 8, 7, 6, 5]], Foreseeing()
    generator = TextGenerator(tiny_model("llama"))
    settings = {"draft": "ngram", "num_speculations": 4, "draft_policy": judged, **FULL}
    texts = dict(generator.generate_batch(prompts, batch_size=2, **settings))
    expected = []
    for length in range(1, len(judged.agreed) + 1):
        ids = [prompts[slot] + texts[slot].token_ids[:length] for slot in (0, 1)]
        hits = [following(text, texts[slot].token_ids[length]) for slot, text in enumerate(ids)]
        expected.append([[], []] if hits == [None, None] else [[bool(hit)] for hit in hits])
    assert [agreed[Draft("ngram", 0)] for agreed in judged.agreed] == expected
    assert [[False], [True]] in expected or [[True], [False]] in expected


def following(text, token):
    """Return whether `token` followed the text's last three tokens, else its last two, where they last stood."""
    for size in (3, 2):
        for end in range(len(text) - 1, size - 1, -1):
            if text[end - size : end] == text[-size:]:
                return text[end] == token
    return None


def test_a_draft_drafts_nothing_behind_its_end_of_the_text(tiny_model):
    """Red where it goes on, which brings nothing: behind an end that verification refuses all is refused."""
    model = damped(tiny_model("llama", tie_word_embeddings=False, eos_token_id=None), 1, 0.4)
    settings = {"exit_layer": 2, "num_speculations": 12, "max_new_tokens": 40}
    free = TextGenerator(model).generate(PROMPT, **settings)
    drafts = [each.drafted for each in free.history if len(each.drafted) > 2]
    ends = [row[1] for row in drafts]  # each is drafted, with more behind it
    for end in ends:
        model.generation_config.eos_token_id = end
        generator = TextGenerator(model)
        ours = generator.generate(PROMPT, **settings)
        assert ours.token_ids == generator.generate(PROMPT, max_new_tokens=40).token_ids
        assert all(end not in each.drafted[:-1] for each in ours.history)
        twice = dict(generator.generate_batch([PROMPT, PROMPT], batch_size=2, **settings))
        assert [twice[0].history, twice[1].history] == [ours.history] * 2
        other = [*PROMPT, 9]  # whose draft goes on where this one's has ended
        beside = dict(generator.generate_batch([PROMPT, other], batch_size=2, **settings))
        assert [beside[0].token_ids, beside[1].token_ids] == [
            generator.generate(each, max_new_tokens=40).token_ids for each in (PROMPT, other)
        ]


@pytest.mark.parametrize("exit_layer", [1, 2, 3])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_fixed_exit_equals_a_model_cut_off_there(tiny_model, family, exit_layer):
    model = tiny_model(family)
    short = tiny_model(family, num_hidden_layers=exit_layer)
    short.load_state_dict(model.state_dict(), strict=False)
    truth = short.generate(torch.tensor([PROMPT]), max_new_tokens=25, min_new_tokens=25, do_sample=False)
    ours = TextGenerator(model).generate(PROMPT, exit_layer=exit_layer, max_new_tokens=25, min_new_tokens=25)
    assert ours.token_ids == truth[0, len(PROMPT) :].tolist()
    assert (ours.drafted, ours.acceptance_rate, ours.tokens_per_round) == (0, None, 1.0)


def test_nothing_is_computed_twice(tiny_model):
    """Every block sees the prompt once, and in a round the pending token and the draft once."""
    model, exit_layer, num_speculations = tiny_model("llama"), 2, 3
    generator = TextGenerator(model)
    generator.runner = ModuleRunner(Decoder(model))
    seen = {block: [] for block in range(4)}
    for block, layer in enumerate(model.model.layers):
        layer.register_forward_pre_hook(
            lambda _, args, kwargs, block=block: seen[block].extend(kwargs["position_ids"][0].tolist()),
            with_kwargs=True,
        )
    ours = generator.generate(PROMPT, exit_layer=exit_layer, num_speculations=num_speculations, **FULL)
    # The prefill, and one row for each pending and each drafted token.
    rows = len(PROMPT) + ours.drafted + ours.rounds - 1
    assert [len(seen[block]) for block in range(4)] == [rows] * 4
    # Only refused positions are ever computed again.
    refused = ours.drafted - ours.accepted
    for block in range(4):
        assert len(seen[block]) - len(set(seen[block])) <= refused
        assert seen[block][: len(PROMPT)] == list(range(len(PROMPT)))


def test_upper_blocks_run_once_a_round(tiny_model):
    model = tiny_model("llama")
    generator = TextGenerator(model)
    generator.runner = ModuleRunner(Decoder(model))
    calls = Counter()
    for block, layer in enumerate(model.model.layers):
        layer.register_forward_hook(lambda *_, block=block: calls.update([block]))
    ours = generator.generate(PROMPT, exit_layer=1, num_speculations=4, **FULL)
    assert [calls[block] for block in (1, 2, 3)] == [ours.rounds] * 3
    assert calls[0] == ours.rounds + ours.drafted
