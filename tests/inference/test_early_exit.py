"""Exit criteria against a slow reference without a cache, and criteria worked out by hand."""

import math
from collections import Counter
from functools import partial

import numpy as np
import pytest
import torch
from transformers import DynamicCache

from lskip.inference import GenerationSettings, TextGenerator
from lskip.inference.drafting.drafter import Available
from lskip.inference.exit_criteria import Entropy, ExitCriterion, LearnedExit, Margin, Saturation
from lskip.inference.layers.linear import Packed, Plain
from lskip.inference.runners.fused_runner import FusedRunner
from lskip.inference.runners.module_runner import ModuleRunner
from lskip.models.decoder import Decoder
from lskip.models.exit_heads import TrainedExits

PROMPT = [7, 42, 99, 3, 250, 18, 77]
PROMPTS = [PROMPT, [5], [11, 12, 13] * 9, [200, 4, 61], [90] * 15]
NEW = 40
RUNNERS = {
    "plain": lambda decoder: FusedRunner(decoder, [Plain]),
    "packed": lambda decoder: FusedRunner(decoder, [Packed]),
    "exact": lambda decoder: FusedRunner(decoder, [Packed], width=4),
    "module": ModuleRunner,
}


def probabilities(logits):
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


def entropy(logits, before, after):
    return -sum(p * math.log(p) for p in probabilities(logits) if p > 0) / math.log(len(logits))


def margin(logits, before, after):
    *_, second, highest = sorted(probabilities(logits))
    return highest - second


def cosine(logits, before, after):
    return float(before @ after) / math.sqrt(float(before @ before) * float(after @ after))


# Thresholds in the middle of what the tiny models show, so that tokens differ in depth.
CRITERIA = {
    "entropy": (Entropy, lambda *seen, threshold: entropy(*seen) < threshold, 0.22),
    "margin": (Margin, lambda *seen, threshold: margin(*seen) >= threshold, 0.5),
    "saturation": (Saturation, lambda *seen, threshold: cosine(*seen) >= threshold, 0.74),
}


def build(tiny_model, family="llama", **overrides):
    """Return a model that is sure of some tokens, and whose texts neither end nor repeat themselves at once."""
    model = tiny_model(family, tie_word_embeddings=False, eos_token_id=None, **overrides)
    model.lm_head.weight.data *= 5
    return model


@torch.inference_mode()
def slow_reference(
    model, prompt, exits, first=2, every=1, full=4, new_tokens=NEW, translate=lambda layer, state: state
):
    """Return tokens and depths, where for each token all positions run again, frozen above their exits.

    translate: (exit_layer, states) -> what norm and head read.
    """

    def hidden(tokens, depths):
        """Return the states of all positions before block 0 and after each block."""
        states = [model.model.embed_tokens(torch.tensor([tokens]))]
        positions = torch.arange(len(tokens))[None]
        rotary = model.model.rotary_emb(states[0], positions)
        for block, layer in enumerate(model.model.layers[:full]):
            after = layer(states[-1], attention_mask=None, position_ids=positions, position_embeddings=rotary)
            frozen = torch.tensor(depths) <= block
            states.append(torch.where(frozen[None, :, None], states[-1], after))
        return states

    def logits(layer, state):
        return model.lm_head(model.model.norm(translate(layer, state)))[0, -1]

    def depth_of(states):
        for exit_layer in range(first, full, every):
            before, after = (state[0, -1].double().numpy() for state in states[exit_layer - 1 : exit_layer + 1])
            if exits(logits(exit_layer, states[exit_layer]).double().numpy(), before, after):
                return exit_layer
        return full

    text, depths = list(prompt), [full] * len(prompt)
    text.append(int(logits(full, hidden(text, depths)[full]).argmax()))  # a prompt goes through all blocks
    while len(text) < len(prompt) + new_tokens:
        states = hidden(text, [*depths, full])
        depths.append(depth_of(states))
        text.append(int(logits(depths[-1], states[depths[-1]]).argmax()))
    return text[len(prompt) :], depths[len(prompt) :]


@pytest.mark.parametrize(("looks", "full"), [({}, None), ({"first": 1}, None), ({"every": 2}, 4), ({}, 3)])
@pytest.mark.parametrize("name", CRITERIA)
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_tokens_and_depths_equal_the_slow_reference(tiny_model, family, name, looks, full):
    model, (criterion, exits, threshold) = build(tiny_model, family), CRITERIA[name]
    tokens, depths = slow_reference(model, PROMPT, partial(exits, threshold=threshold), full=full or 4, **looks)
    settings = {"exit_criterion": criterion(threshold, **looks), "exit_layer": full, "max_new_tokens": NEW}
    generator = TextGenerator(model)
    for build_runner in RUNNERS.values():
        generator.runner = build_runner(Decoder(model))
        ours = generator.generate(PROMPT, **settings)
        assert ours.token_ids == tokens
        assert ours.layers_run == sum(depths)
        assert ours.mean_exit_layer == pytest.approx(np.mean(depths))
    # The test would see nothing if the text repeated one token, or if all tokens went equally deep.
    assert len(set(tokens)) > 10 and max(Counter(depths).values()) < 0.93 * len(depths)


NEVER = {"entropy": Entropy(0.0), "margin": Margin(1.0), "saturation": Saturation(1.0)}
ALWAYS = {"entropy": Entropy(1.0), "margin": Margin(0.0), "saturation": Saturation(-1.0)}


@pytest.mark.parametrize("name", NEVER)
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_criterion_that_never_fires_changes_nothing(tiny_model, family, name):
    model = tiny_model(family, eos_token_id=None)
    generator = TextGenerator(model)
    truth = model.generate(torch.tensor([PROMPT]), max_new_tokens=NEW, do_sample=False)[0].tolist()
    ours = generator.generate(PROMPT, exit_criterion=NEVER[name], max_new_tokens=NEW)
    assert (PROMPT + ours.token_ids, ours.mean_exit_layer) == (truth, 4.0)
    bounded = generator.generate(PROMPT, exit_criterion=NEVER[name], exit_layer=3, max_new_tokens=NEW)
    fixed = generator.generate(PROMPT, exit_layer=3, max_new_tokens=NEW)
    assert (bounded.token_ids, bounded.mean_exit_layer) == (fixed.token_ids, 3.0)
    assert fixed.mean_exit_layer is None and fixed.token_ids != ours.token_ids


@pytest.mark.parametrize("first", [1, 2, 3])
@pytest.mark.parametrize("name", ALWAYS)
def test_a_criterion_that_always_fires_is_the_fixed_exit(tiny_model, name, first):
    """The first token is an exception, since the prefill runs all blocks."""
    generator = TextGenerator(build(tiny_model))
    criterion = type(ALWAYS[name])(ALWAYS[name].threshold, first=first)
    ours = generator.generate(PROMPT, exit_criterion=criterion, max_new_tokens=NEW)
    begun = PROMPT + generator.generate(PROMPT, max_new_tokens=1).token_ids
    rest = generator.generate(begun, exit_layer=first, max_new_tokens=NEW - 1).token_ids
    assert ours.token_ids == begun[len(PROMPT) :] + rest
    assert ours.mean_exit_layer == first
    assert (ours.rounds, ours.drafted, ours.tokens_per_round) == (NEW, 0, 1.0)


@pytest.mark.parametrize("runner", ["plain", "exact", "module"])
@pytest.mark.parametrize("name", CRITERIA)
@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.8, "top_k": 30}], ids=["greedy", "sampled"])
def test_a_batch_of_unequal_slots_equals_solo(tiny_model, sampling, name, runner):
    """Three slots for five prompts, so that slots leave and join; neighbours exit at other depths."""
    model, (criterion, _, threshold) = build(tiny_model, "qwen3"), CRITERIA[name]
    generator = TextGenerator(model)
    generator.runner = RUNNERS[runner](Decoder(model))
    settings = {"exit_criterion": criterion(threshold), "max_new_tokens": NEW, "seed": 3, **sampling}
    together = dict(generator.generate_batch(PROMPTS, batch_size=3, **settings))
    for index, prompt in enumerate(PROMPTS):
        alone = generator.generate(prompt, **{**settings, "seed": 3 + index})
        assert together[index].token_ids == alone.token_ids
        assert together[index].layers_run == alone.layers_run
    assert len({outcome.layers_run for outcome in together.values()}) > 2


def test_where_a_criterion_looks():
    assert list(filter(Margin(0.5, first=3, every=2).looks_at, range(1, 9))) == [3, 5, 7]


class OnlyAtTwo(Margin):
    def exits(self, exit_layer, before, after, logits):
        return super().exits(exit_layer, before, after, logits) & (exit_layer == 2)


def test_a_slot_that_has_exited_is_not_called_back(tiny_model):
    generator = TextGenerator(build(tiny_model))
    settings = {"exit_criterion": OnlyAtTwo(0.5), "max_new_tokens": NEW}
    alone = [generator.generate(prompt, **settings).token_ids for prompt in PROMPTS[:2]]
    assert [outcome.token_ids for _, outcome in generator.generate_batch(PROMPTS[:2], **settings)] == alone


class Learned(ExitCriterion):
    """Criterion of a user's own: one linear layer on the state, as in BERxiT."""

    def __init__(self, weight, threshold):
        super().__init__()
        self.weight, self.threshold, self.looks = weight, threshold, []

    def exits(self, exit_layer, before, after, logits):
        self.looks.append((exit_layer, tuple(after.shape)))
        return torch.sigmoid(after @ self.weight) >= self.threshold


def test_a_criterion_of_ones_own(tiny_model):
    model = build(tiny_model)
    weight = torch.randn(32, generator=torch.Generator().manual_seed(3)) / 4
    by_hand = weight.double().numpy()
    tokens, depths = slow_reference(model, PROMPT, lambda z, x, y: 1 / (1 + math.exp(-(y @ by_hand))) >= 0.6)
    ours = TextGenerator(model).generate(PROMPT, exit_criterion=(criterion := Learned(weight, 0.6)), max_new_tokens=NEW)
    assert (ours.token_ids, ours.layers_run) == (tokens, sum(depths))
    assert set(depths) == {2, 3, 4}
    assert criterion.looks == [(layer, (1, 32)) for depth in depths for layer in range(2, min(depth, 3) + 1)]


def test_learned_exit_equals_the_slow_reference(tiny_model):
    model, exits = build(tiny_model), TrainedExits(4, 32, heads=False, classifier=True)
    exits.classifier.linear.weight.data = torch.randn(1, 32, generator=torch.Generator().manual_seed(3)) / 4
    weight = exits.classifier.linear.weight.detach()[0].double().numpy()

    def certain(logits, before, after):
        return 1 / (1 + math.exp(-(after @ weight) / math.sqrt(after @ after / len(after)))) >= 0.55

    tokens, depths = slow_reference(model, PROMPT, certain)
    generator = TextGenerator(model, trained_exits=exits)
    for build_runner in RUNNERS.values():
        generator.runner = build_runner(Decoder(model))
        ours = generator.generate(PROMPT, exit_criterion=LearnedExit(0.55), max_new_tokens=NEW)
        assert (ours.token_ids, ours.layers_run) == (tokens, sum(depths))
    assert max(Counter(depths).values()) < 0.93 * len(depths)


def test_learned_exit_needs_a_classifier(tiny_model):
    with pytest.raises(ValueError, match="LearnedExit needs a model that was trained with learned_exit: true"):
        TextGenerator(build(tiny_model)).generate(PROMPT, exit_criterion=LearnedExit(0.5))


class Counting(ModuleRunner):
    """Runner that counts blocks that run or are filled, and decoded exits."""

    def __init__(self, decoder):
        super().__init__(decoder)
        self.blocks, self.filled, self.decoded = [], [], 0

    def run(self, x, cache, starts, first, last):
        self.blocks += range(first, last)
        return super().run(x, cache, starts, first, last)

    def fill(self, x, cache, starts, first, last):
        self.filled += range(first, last)
        ModuleRunner(self.decoder).fill(x, cache, starts, first, last)

    def decode(self, x):
        self.decoded += 1
        return super().decode(x)


@pytest.mark.parametrize("bound", [None, 3])
@pytest.mark.parametrize("name", CRITERIA)
def test_blocks_and_head_run_no_more_than_needed(tiny_model, name, bound):
    model, (criterion, _, threshold) = build(tiny_model), CRITERIA[name]
    generator, full = TextGenerator(model), bound or 4
    runner = generator.runner = Counting(Decoder(model))
    ours = generator.generate(PROMPT, exit_criterion=criterion(threshold), exit_layer=bound, max_new_tokens=NEW)
    assert len(runner.blocks) == full + ours.layers_run  # the prefill, and the counted blocks
    assert len(runner.blocks) + len(runner.filled) == full * NEW and max(runner.blocks + runner.filled) < full
    layers_looked_at = sum(block in (1, 2, 3) for block in runner.blocks) - (full - 1)
    # Saturation decodes the exit taken alone, the others each exit that they look at, and none a state twice.
    assert runner.decoded == 1 + (NEW - 1 if name == "saturation" else layers_looked_at)


@pytest.mark.parametrize("runner", RUNNERS)
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@torch.inference_mode()
def test_fill_writes_what_the_blocks_would(tiny_model, family, runner):
    """Two slots of three rows, blocks 1 and 2: the keys and values that transformers' blocks make of these states."""
    model = tiny_model(family)
    for parameter_name, parameter in model.named_parameters():
        if "bias" in parameter_name or "norm" in parameter_name:  # zeros and ones would hide a part left out
            torch.nn.init.normal_(parameter, mean=float("norm" in parameter_name), std=0.3)
    run = RUNNERS[runner](Decoder(model))
    x, starts = torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(5)), [9, 4]
    given, cache, ran = x.clone(), run.new_cache(3, 16), run.new_cache(3, 16)
    run.fill(x, cache, starts, 1, 3)
    assert torch.equal(x, given) and cache.lengths == [0, 0, 0]
    for block in (1, 2):
        run.run(x, ran, starts, block, block + 1)
    assert torch.equal(cache.kv, ran.kv)  # bit for bit what the block writes when it runs
    written = torch.zeros(4, 3, 16, dtype=torch.bool)
    for slot, start in enumerate(starts):
        positions = torch.arange(start, start + 3)
        written[1:3, slot, positions] = True
        for block in (1, 2):
            keys, values = transformers_states(model, block, x[slot : slot + 1], positions[None])
            if runner != "module":  # FusedRunner holds a key's two halves interleaved
                keys = keys.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)
            assert torch.allclose(cache.kv[block, slot, 0][:, positions].transpose(0, 1), keys, atol=1e-5)
            assert torch.allclose(cache.kv[block, slot, 1][:, positions].transpose(0, 1), values, atol=1e-5)
    assert not cache.kv.movedim(4, 2)[~written].any()


def transformers_states(model, block, x, positions):
    """Return keys and values [n, KV, head_dim] that a block of transformers leaves in its cache for x [1, n, D]."""
    theirs, rotary = DynamicCache(), model.model.rotary_emb(x, positions)
    layer = model.model.layers[block]
    layer(x, position_ids=positions, position_embeddings=rotary, cache=theirs, use_cache=True)
    written = theirs.layers[block]
    return written.keys[0].transpose(0, 1), written.values[0].transpose(0, 1)


BAD_CRITERIA = [
    (lambda: Entropy(-0.1), "threshold: -0.1 is not a number from 0 to 1"),
    (lambda: Margin(1.5), "threshold: 1.5 is not a number from 0 to 1"),
    (lambda: Margin(float("nan")), "threshold: nan"),
    (lambda: LearnedExit(1.01), "threshold: 1.01 is not a number from 0 to 1"),
    (lambda: Saturation(-2), "threshold: -2 is not a number from -1 to 1"),
    (lambda: Saturation(0.9, first=0), "first: 0 is not a whole number from 1 up"),
    (lambda: Margin(0.5, every=0), "every: 0"),
    (lambda: "margin", "exit_criterion: 'margin' is not an ExitCriterion"),
    (lambda: Margin, "exit_criterion: <class .* is not an ExitCriterion"),
    (lambda: Margin(0.5, first=4), "exit_criterion: looks at no layer below 4"),
]


@pytest.mark.parametrize(("criterion", "message"), BAD_CRITERIA)
def test_bad_criteria(criterion, message):
    with pytest.raises(ValueError, match=message):
        GenerationSettings(exit_criterion=criterion()).check_model(Available(4))


def test_a_criterion_does_not_go_with_everything():
    with pytest.raises(ValueError, match="num_speculations: 3 does not go with an exit_criterion"):
        GenerationSettings(exit_criterion=Margin(0.5), num_speculations=3, exit_layer=2)
    with pytest.raises(ValueError, match="exit_criterion: looks at no layer below 2"):
        GenerationSettings(exit_criterion=Margin(0.5), exit_layer=2).check_model(Available(4))
