"""Exit criteria against a slow reference: no cache, every position recomputed, the criterion worked by hand."""

import math
from collections import Counter

import numpy as np
import pytest
import torch
from transformers import DynamicCache

from lskip.decoder import Decoder
from lskip.inference import GenerationSettings, TextGenerator
from lskip.inference.exits import Entropy, ExitCriterion, Margin, Saturation
from lskip.inference.lean_step import LeanStep
from lskip.inference.module_step import ModuleStep
from lskip.inference.weights import Packed, Plain, Transposed

PROMPT = [7, 42, 99, 3, 250, 18, 77]
PROMPTS = [PROMPT, [5], [11, 12, 13] * 9, [200, 4, 61], [90] * 15]
NEW = 40
STEPS = {
    "plain": lambda decoder: LeanStep(decoder, Plain),
    "transposed": lambda decoder: LeanStep(decoder, Transposed),
    "packed": lambda decoder: LeanStep(decoder, Packed),
    "exact": lambda decoder: LeanStep(decoder, Packed, width=4),
    "module": ModuleStep,
}


def probabilities(logits):
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


def entropy(logits, before, after):
    return -sum(p * math.log(p) for p in probabilities(logits) if p > 0) / math.log(len(logits))


def margin(logits, before, after):
    *_, second, likeliest = sorted(probabilities(logits))
    return likeliest - second


def cosine(logits, before, after):
    return float(before @ after) / math.sqrt(float(before @ before) * float(after @ after))


# Thresholds in the middle of what the tiny models show, so that tokens differ in depth.
CRITERIA = {
    "entropy": (Entropy, lambda *seen, threshold: entropy(*seen) < threshold, 0.4),
    "margin": (Margin, lambda *seen, threshold: margin(*seen) >= threshold, 0.3),
    "saturation": (Saturation, lambda *seen, threshold: cosine(*seen) >= threshold, 0.8),
}


def build(tiny_model, family="llama", **overrides):
    """A model without an end token, of which texts do not repeat themselves at once."""
    return tiny_model(family, tie_word_embeddings=False, eos_token_id=None, **overrides)


@torch.inference_mode()
def slow_reference(model, prompt, exits, first=2, every=1, full=4, new_tokens=NEW):
    """Tokens and their depths: at each token all positions go through the blocks again, frozen above their exits."""

    def hidden(tokens, depths):
        """States of all positions before block 0 and after each block."""
        states = [model.model.embed_tokens(torch.tensor([tokens]))]
        positions = torch.arange(len(tokens))[None]
        rotary = model.model.rotary_emb(states[0], positions)
        for block, layer in enumerate(model.model.layers[:full]):
            after = layer(states[-1], attention_mask=None, position_ids=positions, position_embeddings=rotary)
            frozen = torch.tensor(depths) <= block
            states.append(torch.where(frozen[None, :, None], states[-1], after))
        return states

    def logits(state):
        return model.lm_head(model.model.norm(state))[0, -1]

    def depth_of(states):
        for exit_layer in range(first, full, every):
            before, after = (state[0, -1].double().numpy() for state in states[exit_layer - 1 : exit_layer + 1])
            if exits(logits(states[exit_layer]).double().numpy(), before, after):
                return exit_layer
        return full

    text, depths = list(prompt), [full] * len(prompt)
    text.append(int(logits(hidden(text, depths)[full]).argmax()))  # a prompt goes through all blocks
    while len(text) < len(prompt) + new_tokens:
        states = hidden(text, [*depths, full])
        depths.append(depth_of(states))
        text.append(int(logits(states[depths[-1]]).argmax()))
    return text[len(prompt) :], depths[len(prompt) :]


@pytest.mark.parametrize("shape", [{}, {"first": 1}, {"first": 1, "every": 2}, {"full": 3}], ids=str)
@pytest.mark.parametrize("name", CRITERIA)
@pytest.mark.parametrize("step", ["plain", "packed", "module"])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_tokens_and_depths_equal_the_slow_reference(tiny_model, family, step, name, shape):
    model, (criterion, exits, threshold) = build(tiny_model, family), CRITERIA[name]
    tokens, depths = slow_reference(model, PROMPT, lambda *seen: exits(*seen, threshold=threshold), **shape)
    generator = TextGenerator(model)
    generator.step = STEPS[step](Decoder(model))
    looks = {key: value for key, value in shape.items() if key != "full"}
    ours = generator.generate(
        PROMPT, exit_criterion=criterion(threshold, **looks), exit_layer=shape.get("full"), max_new_tokens=NEW
    )
    print(family, name, shape, Counter(depths), len(set(tokens)))
    assert ours.token_ids == tokens
    assert ours.layers_run == sum(depths)
    assert ours.mean_exit_layer == pytest.approx(np.mean(depths))
    # The test would see nothing if the text repeated one token, or if all tokens went equally deep.
    assert len(set(tokens)) > 10 and min(Counter(depths).values()) >= 4 and len(Counter(depths)) > 1
