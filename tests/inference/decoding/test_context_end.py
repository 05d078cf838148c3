"""Drafts where the context ends: of a batch one text is there, and all draft as many tokens."""

import random

import pytest

from lskip.inference import TextGenerator
from lskip.inference.drafting.draft import DraftPlan
from lskip.inference.drafting.policies import DraftPolicy

DYNAMIC = {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0] * 4,
    "long_factor": [4.0] * 4,
    "original_max_position_embeddings": 64,
    "factor": 4.0,
}
MODELS = {
    "llama": ("llama", {}),
    "angles by the longest position": ("llama", DYNAMIC),
    "longrope": ("phi3", {"original_max_position_embeddings": 64, "rope_parameters": LONGROPE}),
    "learned positions": ("gpt2", {}),
    "learned positions, two on": ("opt", {}),
}


@pytest.mark.parametrize("way", [{"exit_layer": 3, "num_speculations": 12}, {"draft": "ngram", "num_speculations": 12}])
@pytest.mark.parametrize(("family", "settings"), MODELS.values(), ids=MODELS)
def test_no_slot_drafts_beyond_it(tiny_model, family, settings, way):
    """Red where a filler behind one text's end fails, or changes the angles, and so the texts, of all."""
    generator = TextGenerator(tiny_model(family, **settings))
    context, draw = generator.context_length, random.Random(0)
    prompts = [[draw.randrange(1, 60) for _ in range(length)] for length in (context - 8, context - 14, 10, 20)]
    alone = [generator.generate(prompt, max_new_tokens=20).token_ids for prompt in prompts]
    together = dict(generator.generate_batch(prompts, 4, max_new_tokens=20, **way))
    assert len(alone[0]) == 8 and [together[index].token_ids for index in range(4)] == alone


class Obstinate(DraftPolicy):
    """Plans as it likes, whatever has nothing to draft."""

    def __init__(self, num_speculations: int):
        self.num_speculations = num_speculations

    def plan(self, batch_size, most, without=frozenset()):
        return DraftPlan(self.drafts[0], self.num_speculations)

    def begin(self, drafts, costs, num_speculations):
        self.drafts = drafts


@pytest.mark.parametrize(("number", "said"), [(3, "'ngram', which has nothing to draft"), (99, "plans 99 tokens")])
def test_a_policy_that_asks_for_what_cannot_be_is_named(tiny_model, number, said):
    """Red where it is asked for ever."""
    generator = TextGenerator(tiny_model("llama"))
    with pytest.raises(ValueError, match=f"^draft_policy: .*{said}"):
        generator.generate(
            [1, 2, 3], max_new_tokens=20, draft="ngram", draft_policy=Obstinate(number), num_speculations=4
        )
