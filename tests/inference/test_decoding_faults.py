"""Texts that join, stop, are cancelled and rolled back in random order, each against its own run alone.

That run has one text, drafts nothing and never ends; its end is worked out here.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from random import Random

import pytest
import torch

from lskip.inference import TextGenerator
from lskip.inference.decoding.batch import Batch
from lskip.inference.decoding.request import Request
from lskip.inference.decoding.sampling import TokenChooser
from lskip.inference.drafting.cost_aware import CostAwareDraft
from lskip.inference.drafting.costs import Costs, RowCosts
from lskip.inference.drafting.draft import DraftPlan
from lskip.inference.drafting.policies import ConfidenceDraft, DraftPolicy
from lskip.inference.generation import Generation, TextRound
from lskip.inference.settings import GenerationSettings
from lskip.inference.stopping import stop_rule
from lskip.inference.text import decode_text
from lskip.models.exit_adapter import AdapterShape, ExitAdapter
from tests.conftest import make_model

INTERLEAVINGS, LAYERS, VOCABULARY, LONGEST = 200, 4, 300, 24
CELLS = 2 * 20 + LONGEST - 1  # for the longest prompt, to the last one
CHOICES = (
    {},
    {"repetition_penalty": 1.3},
    {"temperature": 1.0},
    {"temperature": 0.8, "top_p": 0.9, "top_k": 40},
    {"temperature": 1.5, "min_p": 0.05},
)
CHEAP = RowCosts((1, 64), (0.1, 0.11), (0.1, 0.11))
COSTS = Costs(LAYERS, RowCosts((1, 64), (1.0, 1.01), (0.1, 0.11)), CHEAP, CHEAP, 1)
EXIT = 2  # of the adapter


class Whim(DraftPolicy):
    """Policy of a random draft, number of tokens and stop each round: all that a policy may do."""

    def __init__(self, random: Random):
        self.random = random

    def plan(self, slots, most, without=frozenset()) -> DraftPlan:
        drafts = [None, *(draft for draft in self.drafts if draft not in without)]
        probed = [draft for draft in self.drafts if draft.kind in ("layers", "ngram") and self.random.random() < 0.3]
        count = self.random.randint(0, min(most, self.num_speculations))
        return DraftPlan(self.random.choice(drafts), count, tuple(probed))

    def judge(self, agreed) -> None:
        assert all(draft in self.drafts for draft in agreed)

    def goes_on(self, probabilities) -> bool:
        assert all(0 <= probability <= 1 for probability in probabilities())
        return self.random.random() < 0.8


@dataclass(eq=False)
class Solo:
    """A prompt, its chooser's settings, and the first LONGEST tokens of its run alone."""

    prompt: list[int]
    settings: GenerationSettings
    seed: int
    tokens: list[int]


@dataclass(eq=False)
class Joined:
    """A request in the batch, the run alone that it must equal, and its end conditions."""

    solo: Solo
    request: Request
    eos_ids: tuple[int, ...]
    got: list[int]  # what the rounds reported

    def expected(self, tokenizer) -> tuple[list[int], str]:
        """Return the text and its finish_reason, from the run alone and the definition of each ending."""
        for count in range(1, self.request.stop.max_new_tokens + 1):
            kept = self.solo.tokens[:count]
            if kept[-1] in self.eos_ids:
                return kept, "eos"
            if any(part in tokenizer.decode(kept) for part in self.request.stop.stop_strings):
                return kept, "stop_string"
        return kept, "length"


@pytest.fixture(scope="module")
def generator():
    """Return a generator with int8 draft weights, whose upper blocks add little: drafts are accepted sometimes."""
    model = make_model("llama", 5, eos_token_id=None, tie_word_embeddings=False)
    for layer in model.model.layers[2:]:
        layer.self_attn.o_proj.weight.data *= 0.4
        layer.mlp.down_proj.weight.data *= 0.4
    adapter = ExitAdapter(model, AdapterShape(EXIT))
    return TextGenerator(model, weights="plain", draft_weights="int8", exit_adapter=adapter)


@pytest.fixture(scope="module")
def solos(generator) -> list[Solo]:
    random, solos = Random(0), []
    for index in range(40):
        phrase = [random.randrange(1, VOCABULARY) for _ in range(random.choice((1, 4, 9, 20)))]
        prompt = phrase * random.choice((1, 1, 2)) if len(phrase) > 1 else phrase
        settings = {**CHOICES[index % len(CHOICES)], "max_new_tokens": LONGEST, "seed": index}
        alone = generator.generate(prompt, **settings)
        solos.append(Solo(prompt, GenerationSettings(**settings), index, alone.token_ids))
    return solos


def kept(each: TextRound) -> list[int]:
    """Return the tokens that a round added to the text."""
    return [*each.drafted[: each.accepted], *([] if each.own is None else [each.own])]


def join(solo: Solo, random: Random, tokenizer) -> Joined:
    """Return a request that ends at a length, at a token, at a string of its text, or at the first of these."""
    most = random.choice((random.randint(1, 3), LONGEST, LONGEST, random.randint(1, LONGEST)))
    eos_ids = tuple(random.sample(range(VOCABULARY), 8)) if random.random() < 0.3 else ()
    if random.random() < 0.3:
        eos_ids += (random.choice(solo.tokens),)
    stop_strings, said = (), decode_text(tokenizer, solo.tokens)
    if said and random.random() < 0.4:
        begin = random.randrange(len(said))
        stop_strings = ("never said", said[begin : begin + random.randint(1, 4)])
    stop = stop_rule(eos_ids, len(solo.prompt), most, 128, stop_strings, tokenizer)
    chooser = TokenChooser(solo.settings, solo.seed, eos_ids, solo.prompt)
    request = Request(list(solo.prompt), chooser, stop, Generation(prompt_tokens=len(solo.prompt), seed=solo.seed))
    return Joined(solo, request, eos_ids, [])


def random_settings(random: Random, with_adapter: bool) -> GenerationSettings:
    """Return random settings of the batch's drafts, if any."""
    if random.random() < 0.1:
        return GenerationSettings()
    policy = random.choice((None, Whim(random), Whim(random), ConfidenceDraft(random.random()), CostAwareDraft()))
    draft = random.choice(("adapter" if with_adapter else "layers", "weights", "ngram", None))
    exit_layer = EXIT if with_adapter else random.randint(1, LAYERS - 1)
    return GenerationSettings(
        draft=draft, exit_layer=exit_layer, num_speculations=random.randint(1, 8), draft_policy=policy
    )


class Interleaving:
    """One batch, and random events in it."""

    def __init__(self, generator: TextGenerator, solos: list[Solo], tokenizer, seed: int, with_adapter: bool):
        self.random, self.solos, self.tokenizer = Random(seed), solos, tokenizer
        slots, settings = self.random.randint(1, 5), random_settings(self.random, with_adapter)
        runners = generator.runners if with_adapter else replace(generator.runners, adapter=None)
        self.batch = Batch(runners, settings, slots, CELLS, lambda: COSTS)
        # Keys and values that others have left must not matter.
        self.batch.cache.kv.normal_()
        if self.batch.slots.observer is not None:
            self.batch.slots.observer.cache.kv.normal_()
        self.left = self.random.randint(2, 9)
        self.joined: list[Joined] = []
        self.cancelled: list[Joined] = []

    def run(self) -> None:
        while self.left or self.batch.busy:
            if not self.something_happens():
                self.round()

    def something_happens(self) -> bool:
        """Let a request come or go, perhaps, and return whether one did."""
        happens = self.random.random()
        if self.left and happens < 0.3:
            self.left -= 1
            self.joined.append(join(self.random.choice(self.solos), self.random, self.tokenizer))
            self.batch.add(self.joined[-1].request)
        elif self.joined and happens < 0.36:
            self.cancel(self.random.choice(self.joined))
        else:
            return False
        return True

    def cancel(self, one: Joined) -> None:
        """Cancel a request that waits, runs or is long gone."""
        self.batch.cancel(one.request)
        if not one.request.ended and one not in self.cancelled:
            self.cancelled.append(one)
        assert not any(request is one.request for request in (*self.batch.requests, *self.batch.waiting))

    def round(self) -> None:
        for news in self.batch.steps():
            by_request = {id(one.request): one for one in self.joined}
            for request, tokens in news:
                by_request[id(request)].got += tokens
            if self.random.random() < 0.3:
                self.something_happens()
        for one in self.joined:
            assert one.got == one.request.generation.token_ids == one.solo.tokens[: len(one.got)]
        assert len(self.batch.requests) <= self.batch.cache.kv.shape[1]
        assert not any(request.ended for request in self.batch.requests)

    def check(self) -> Counter[str]:
        """Compare all texts with their runs alone, and return their finish_reasons."""
        for one in self.joined:
            generation = one.request.generation
            if one in self.cancelled:
                assert generation.finish_reason is None
                assert len(one.got) < len(one.expected(self.tokenizer)[0])
            else:
                assert (generation.token_ids, generation.finish_reason) == one.expected(self.tokenizer)
            assert generation.accepted <= generation.drafted
            assert generation.token_ids == [token for each in generation.history for token in kept(each)]
        ends = Counter(str(one.request.generation.finish_reason) for one in self.joined)
        drafted = sum(one.request.generation.drafted for one in self.joined)
        accepted = sum(one.request.generation.accepted for one in self.joined)
        return ends + Counter(drafted=drafted, rolled_back=drafted - accepted)


@pytest.mark.parametrize(("with_adapter", "interleavings"), [(False, INTERLEAVINGS), (True, INTERLEAVINGS // 4)])
def test_every_text_is_what_it_is_alone(generator, solos, tiny_tokenizer, with_adapter, interleavings):
    happened = Counter()
    torch.manual_seed(0)
    for seed in range(interleavings):
        interleaving = Interleaving(generator, solos, tiny_tokenizer, seed, with_adapter)
        try:
            interleaving.run()
            happened += interleaving.check()
        except AssertionError as error:
            raise AssertionError(f"interleaving {seed}, {interleaving.batch.settings}: {error}") from error
    # All of it did happen, often.
    assert min(happened[end] for end in ("eos", "stop_string", "length", "None")) > interleavings / 4, happened
    assert happened["rolled_back"] > 5 * interleavings, happened
    assert happened["drafted"] - happened["rolled_back"] > 5 * interleavings, happened
