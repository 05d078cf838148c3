"""Greedy text against transformers' `generate`, token by token in float32, for every draft, policy and batch.

More models and prompts: `python -m benchmarks.decoding.correctness equality`.
"""

from __future__ import annotations

from itertools import cycle, islice
from random import Random
from typing import NamedTuple

import pytest
import torch

from lskip.inference import TextGenerator
from lskip.inference.drafting.cost_aware import CostAwareDraft
from lskip.inference.drafting.costs import Costs, RowCosts
from lskip.inference.drafting.policies import ConfidenceDraft, DraftPolicy, FixedDraft
from lskip.inference.layers.bags import BaggedInt8
from lskip.inference.layers.layout_choice import obstacle_to
from lskip.inference.runners.fused_runner import FusedRunner
from lskip.inference.runners.module_runner import ModuleRunner
from lskip.inference.runners.rounded_model import round_to_int8
from lskip.models.decoder import Decoder
from lskip.models.exit_adapter import AdapterShape, ExitAdapter
from tests.conftest import make_model

LAYERS, CONTEXT = 6, 128
FAMILIES = {
    "llama": {},
    "qwen3": {"tie_word_embeddings": False},
    "mistral": {"sliding_window": 11},
    "gemma3_text": {
        "sliding_window": 11,
        "layer_types": ["sliding_attention", "full_attention"] * 3,
        "tie_word_embeddings": False,  # tied, it repeats itself
    },
    "modules": {"family": "llama", "hidden_act": "gelu"},  # the fused runner does not cover it
}
ROUNDING = 2e-5  # an argmax with a lead above this is the same in any order of summation
POLICIES = (FixedDraft, lambda: ConfidenceDraft(threshold=0.3), CostAwareDraft)


class Reference(NamedTuple):
    """Prompts, transformers' text for each, and each token's lead over the second logit."""

    prompts: list[list[int]]
    texts: list[list[int]]
    margins: list[list[float]]

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self.texts))


class Way(NamedTuple):
    """One way to decode: a generator's name, the batch size, settings, and a policy made for it."""

    generator: str
    batch_size: int
    settings: dict
    policy: DraftPolicy


def make_case_model(family: str, seed: int, context: int = CONTEXT):
    """Return a random model whose upper blocks add little, so that drafts are accepted sometimes; no token ends."""
    overrides = {"num_hidden_layers": LAYERS, "max_position_embeddings": context, "eos_token_id": None}
    overrides |= FAMILIES[family]
    model = make_model(overrides.pop("family", family), seed, **overrides)
    for index, layer in enumerate(model.model.layers):
        layer.self_attn.o_proj.weight.data *= 0.75**index
        layer.mlp.down_proj.weight.data *= 0.75**index
        if family == "gemma3_text":  # what they add is normed again, by weights that lack 1
            for norm in (layer.post_attention_layernorm, layer.post_feedforward_layernorm):
                norm.weight.data += 0.75**index - 1
    return model


def make_prompt(length: int, random: Random) -> list[int]:
    """Return random tokens, or a phrase of them over and over for n-grams to find."""
    phrase = [random.randrange(1, 300) for _ in range(random.choice((3, 5, length, length)))]
    return list(islice(cycle(phrase), length))


@torch.inference_mode()
def transformers_texts(model, prompts: list[list[int]], most: int, context: int = CONTEXT) -> Reference:
    """Return up to `most` tokens for each prompt, fewer where the context ends."""
    texts, margins = [], []
    for prompt in prompts:
        room = min(most, context - len(prompt))
        truth = model.generate(
            torch.tensor([prompt]),
            max_new_tokens=room,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        highest, second = torch.cat(truth.logits).topk(2).values.unbind(1)
        texts.append(truth.sequences[0, len(prompt) :].tolist())
        margins.append((highest - second).tolist())
    return Reference(prompts, texts, margins)


def make_generators(model, family: str) -> dict[str, TextGenerator]:
    """Generators with every layout of weights that the family can have, by name."""
    adapter = ExitAdapter(model, AdapterShape(exit_layer=2))
    if family == "modules":
        return {"plain": TextGenerator(model), "adapter": TextGenerator(model, exit_adapter=adapter)}
    generators = {each: TextGenerator(model, weights=each) for each in ("plain", "packed")}
    generators |= {each: TextGenerator(model, weights="plain", draft_weights=each) for each in ("int8", "int4")}
    generators["bit_exact"] = TextGenerator(model, bit_exact=True)
    generators["adapter"] = TextGenerator(model, weights="plain", draft_weights="int8", exit_adapter=adapter)
    for generator in generators.values():
        generator.costs = cheap_drafts(generator)
    return generators


def make_rounded_generators(model, family: str) -> dict[str, TextGenerator]:
    """Generators that hold the model in 8 bits, with what may draft for them; the model is rounded in place then."""
    adapter = ExitAdapter(model, AdapterShape(exit_layer=2))
    given = {"int8": {}, "int8 and int4": {"draft_weights": "int4"}, "int8 and adapter": {"exit_adapter": adapter}}
    generators = {name: TextGenerator(model, weights="int8", **more) for name, more in given.items()}
    for generator in generators.values():
        generator.costs = cheap_drafts(generator)
    round_to_int8(Decoder(model))
    return generators


def cheap_drafts(generator: TextGenerator) -> Costs:
    """Return made-up costs by which every draft is worth a try: more rows are free, and a draft's blocks cheap."""
    times = RowCosts((1, 64), (1.0, 1.01), (0.1, 0.11))
    rounded = RowCosts((1, 64), (0.05, 0.06), (0.1, 0.11))
    adapter = {} if generator.adapter_runner is None else {"adapter": rounded, "adapter_blocks": 1}
    return Costs(generator.num_layers, times, None if generator.draft_runner is None else rounded, **adapter)


def make_way(generators: dict[str, TextGenerator], exit_layer: int, num_speculations: int, random: Random) -> Way:
    """Return a way with this exit and draft length, and random draft, policy and batch size."""
    name = random.choice(list(generators))
    draft = random.choice(("layers", "layers", "ngram", None))
    if generators[name].adapter_runner is not None:
        exit_layer, draft = None, {"layers": "adapter"}.get(draft, draft)
    if draft is None and generators[name].draft_runner is not None and random.random() < 0.5:
        exit_layer = None  # all rounded blocks draft
    settings = {"exit_layer": exit_layer, "num_speculations": num_speculations, "draft": draft}
    return Way(name, random.choice((1, 2, 3, 5, 8)), settings, random.choice(POLICIES)())


def decode(generator: TextGenerator, prompts: list[list[int]], way: Way, most: int) -> list:
    """Return the prompts' generations, in order."""
    settings = {**way.settings, "draft_policy": way.policy, "max_new_tokens": most}
    if way.batch_size == 1:
        return [generator.generate(prompt, **settings) for prompt in prompts]
    outcomes = list(generator.generate_batch(prompts, way.batch_size, **settings))
    assert len(outcomes) == len(prompts)
    return [one for _, one in sorted(outcomes, key=lambda pair: pair[0])]


def mismatches(reference: Reference, texts: list[list[int]]) -> list[dict]:
    """Return the first difference of each text from the reference, and how close the decision was."""
    found = []
    for index, (truth, ours) in enumerate(zip(reference.texts, texts, strict=True)):
        if truth != ours:
            place = next((i for i, pair in enumerate(zip(truth, ours, strict=False)) if pair[0] != pair[1]), None)
            margin = None if place is None else reference.margins[index][place]
            found.append({"prompt_tokens": len(reference.prompts[index]), "token": place, "margin": margin})
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_text_equals_generate(family):
    """Every draft length from 1 to 16, every exit, prompts of 1 token to the last but one position."""
    model, random, most = make_case_model(family, seed=3), Random(family), 26
    prompts = [make_prompt(length, random) for length in (1, 2, 9, 34, 61, 112, CONTEXT - 2, CONTEXT - 1)]
    reference = transformers_texts(model, prompts, most)
    # Rounding must not decide, or the test would depend on the machine: choose another seed.
    assert min(map(min, reference.margins)) > ROUNDING
    assert len({token for text in reference.texts for token in text}) > 40
    generators, drafted, accepted = make_generators(model, family), 0, 0
    assert isinstance(generators["plain"].runner, ModuleRunner if family == "modules" else FusedRunner)
    for num_speculations in range(1, 17, 2 if family == "modules" else 1):
        way = make_way(generators, 1 + num_speculations % (LAYERS - 1), num_speculations, random)
        ours = decode(generators[way.generator], prompts, way, most)
        assert mismatches(reference, [one.token_ids for one in ours]) == [], way
        assert [one.finish_reason for one in ours] == ["length"] * 5 + ["context"] * 3
        drafted += sum(one.drafted for one in ours)
        accepted += sum(one.accepted for one in ours)
    # Nothing would be seen if no draft, or every one, were accepted.
    assert drafted > 1000 and 0.05 < accepted / drafted < 0.95


@pytest.mark.skipif(obstacle_to(BaggedInt8, torch.ones(16, 16)) is not None, reason="no bags of 8 bits here")
@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "modules"])
def test_text_of_a_model_in_8_bits_equals_the_rounded_models(family):
    """With drafts and in batches, from whatever row on a product is rounded otherwise."""
    model, random, most = make_case_model(family, seed=4), Random(family), 26
    prompts = [make_prompt(length, random) for length in (1, 9, 34, 61, CONTEXT - 1)]
    generators = make_rounded_generators(model, family)
    reference = transformers_texts(model, prompts, most)
    assert min(map(min, reference.margins)) > ROUNDING  # or choose another seed
    for num_speculations in range(1, 17, 2):
        way = make_way(generators, 1 + num_speculations % (LAYERS - 1), num_speculations, random)
        ours = decode(generators[way.generator], prompts, way, most)
        assert mismatches(reference, [one.token_ids for one in ours]) == [], way


def test_policies_do_draft_and_change_their_minds():
    """Without this, a policy that never drafts would pass all of the above."""
    model = make_case_model("llama", seed=3)
    generator = make_generators(model, "llama")["int8"]
    for make_policy in POLICIES:
        settings = {"exit_layer": 3, "num_speculations": 6, "draft_policy": make_policy(), "max_new_tokens": 100}
        ours = generator.generate([7, 8, 9], **settings)
        assert ours.drafted > 20
        fixed = make_policy is FixedDraft
        assert (ours.drafted / (ours.rounds - 1) > 5.5) == fixed  # the others draft fewer than they may


def test_a_mismatch_is_found_with_its_margin():
    reference = Reference([[1, 2], [3]], [[5, 6, 7], [8]], [[0.5, 0.25, 2.0], [1.0]])
    assert mismatches(reference, [[5, 6, 7], [8]]) == []
    assert mismatches(reference, [[5, 9, 7], [8]]) == [{"prompt_tokens": 2, "token": 1, "margin": 0.25}]
    assert mismatches(reference, [[5, 6], [8]]) == [{"prompt_tokens": 2, "token": None, "margin": None}]
