"""Texts that follow a grammar: valid by another library's judgement, and the same with and without drafts."""

import json
import random
import re
import sys

import jsonschema
import pytest
import torch
from transformers import LogitsProcessor

from lskip.inference import TextGenerator
from lskip.inference.decoding.batch import Batch
from lskip.inference.decoding.batch_chooser import BatchChooser
from lskip.inference.decoding.grammar_mask import GrammarError, GrammarMask, grammar_tokenizer
from lskip.inference.drafting.draft import PLAIN, Draft
from lskip.inference.drafting.policies import FixedDraft
from lskip.inference.grammar import LONGEST_STRING, compile_grammar
from lskip.models.exit_adapter import AdapterShape, ExitAdapter

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "kind": {"enum": ["a", "b\n", 3, None]},
        "sizes": {"type": "array", "items": {"type": "integer", "minimum": -20, "maximum": 3000}, "maxItems": 3},
        "on": {"type": "boolean"},
    },
    "required": ["name", "sizes"],
    "additionalProperties": False,
}
PROMPTS = [[7, 42, 99], [5] * 12, [250, 18, 77, 3], [9, 8, 9, 8, 9, 8]]
WAYS = {
    "layers": {"exit_layer": 2, "num_speculations": 3},
    "ngram": {"draft": "ngram", "num_speculations": 4},
    "adapter": {"draft": "adapter", "num_speculations": 3},
    "auto": {"draft": "auto"},
}


@pytest.fixture
def generator(tiny_model, tiny_tokenizer):
    return TextGenerator(tiny_model("llama", max_position_embeddings=512), tiny_tokenizer)


@pytest.mark.parametrize("sampled", [{}, {"temperature": 1.2, "seed": 3}], ids=["greedy", "sampled"])
@pytest.mark.parametrize("way", WAYS)
def test_texts_are_valid_and_the_same_with_drafts(generator, tiny_model, tiny_tokenizer, quick_costs, way, sampled):
    settings = {"json_schema": SCHEMA, "max_new_tokens": 120, **sampled}
    expected = [generator.generate(ids, **{**settings, "seed": 3 + at}) for at, ids in enumerate(PROMPTS)]
    for outcome in expected:
        assert outcome.finish_reason == "eos"
        jsonschema.validate(json.loads(outcome.text), SCHEMA)
        assert json.dumps(json.loads(outcome.text), separators=(",", ":"), ensure_ascii=False) == outcome.text
    if way == "adapter":
        model = tiny_model("llama", max_position_embeddings=512)
        some = torch.tensor(sorted(random.Random(0).sample(range(300), 100)))
        adapter = ExitAdapter(model, AdapterShape(exit_layer=2), some)
        generator = TextGenerator(model, tiny_tokenizer, exit_adapter=adapter)
    for batch_size in (1, 3):
        found = dict(generator.generate_batch(PROMPTS, batch_size, **settings, **WAYS[way]))
        assert [found[at].token_ids for at in range(len(PROMPTS))] == [each.token_ids for each in expected]
        assert way == "auto" or sum(each.drafted for each in found.values()) > 0


def test_rejection_sampling_follows_it_too(generator):
    settings = {"json_schema": SCHEMA, "max_new_tokens": 120, "temperature": 1.2, "acceptance": "rejection"}
    for seed in range(4):
        outcome = generator.generate(PROMPTS[0], exit_layer=2, num_speculations=3, seed=seed, **settings)
        jsonschema.validate(json.loads(outcome.text), SCHEMA)


def test_grammars_and_free_texts_share_a_batch(generator):
    """Each slot has its own; the free text is what it is alone."""
    requests = []
    for at, more in enumerate(({}, {"json_schema": SCHEMA}, {"regex": "(ab){1,9}c"}, {})):
        settings = generator.settings(max_new_tokens=60, **more)
        requests.append(generator.prepare(PROMPTS[at], settings))
    run(generator, generator.settings(exit_layer=2, num_speculations=3), requests)
    texts = [generator.tokenizer.decode(each.generation.token_ids, skip_special_tokens=True) for each in requests]
    jsonschema.validate(json.loads(texts[1]), SCHEMA)
    assert re.fullmatch("(ab){1,9}c", texts[2])
    for at in (0, 3):
        assert requests[at].generation.token_ids == generator.generate(PROMPTS[at], max_new_tokens=60).token_ids


def run(generator, settings, requests) -> list:
    """Decode requests in one batch; return those that failed."""
    batch, failed = Batch(generator.runners, settings, len(requests), 200, lambda: None), []
    for request in requests:
        batch.add(request)
    while batch.busy:
        try:
            list(batch.steps())
        except ValueError as error:
            failed.append(error.request)
    return failed


WORDS = ("yes", "yellow", "no", "nobody")


def mask_of(tokenizer, regex: str) -> GrammarMask:
    return GrammarMask(grammar_tokenizer(tokenizer, 300, (0,)), compile_grammar(None, regex), 2)


def allowed_by(mask: GrammarMask, text: list[int]) -> set[int]:
    scores = mask(torch.tensor([[7, 7, *text]]), torch.zeros(1, 300))
    return set(torch.nonzero(scores[0].isfinite())[:, 0].tolist())


def test_what_is_allowed_is_what_can_still_become_a_word(tiny_tokenizer):
    """By hand, from the words; asked for in any order, also behind tokens that no word has."""
    mask = mask_of(tiny_tokenizer, "|".join(WORDS))
    spelled = [tiny_tokenizer.decode([token]) for token in range(len(tiny_tokenizer))]
    texts = [[]]
    for length in range(1, 5):
        texts += [tiny_tokenizer(word[:length])["input_ids"] for word in (*WORDS, "zz")]
    random.Random(0).shuffle(texts)
    for text in texts * 2:
        before = tiny_tokenizer.decode(text)
        if not any(word.startswith(before) for word in WORDS):
            assert len(allowed_by(mask, text)) == 300  # is refused anyway
            continue
        longer = {token: before + spelled[token] for token in range(1, len(spelled))}
        goes_on = {token for token, text in longer.items() if any(word.startswith(text) for word in WORDS)}
        assert allowed_by(mask, text) == goes_on | ({0} if before in WORDS else set())


def test_the_grammar_wins_over_what_leaves_nothing(tiny_tokenizer):
    """Tokens that another rule has banned, or that a draft's head lacks."""
    mask = mask_of(tiny_tokenizer, "ab")
    scores = mask(torch.tensor([[7, 7]]), torch.full((1, 300), float("-inf")))
    assert tiny_tokenizer.decode(scores.argmax(-1)) in ("a", "ab")


def test_a_grammar_that_takes_too_much_ends_its_own_text_alone(generator):
    expected = generator.generate(PROMPTS[0], max_new_tokens=40)
    settings = generator.settings(max_new_tokens=40)
    free, strict = (
        generator.prepare(PROMPTS[0], settings),
        generator.prepare(PROMPTS[1], generator.settings(max_new_tokens=40, regex="a{30}")),
    )
    strict.chooser.by_text[0] = TakesTooMuch(strict.chooser.by_text[0], len(PROMPTS[1]) + 5)
    assert run(generator, settings, [free, strict]) == [strict]
    assert free.generation.token_ids == expected.token_ids


class TakesTooMuch(LogitsProcessor):
    """A mask that fails behind so many tokens."""

    def __init__(self, mask: GrammarMask, most: int):
        self.mask, self.most = mask, most

    def __call__(self, input_ids, scores):
        if input_ids.shape[1] > self.most:
            raise GrammarError(self, "too much")
        return self.mask(input_ids, scores)


class Foreseen(FixedDraft):
    """A policy that drafts nothing, and asks what n-grams would have said."""

    def __init__(self):
        self.agreed = []

    def plan(self, slots, most, without=frozenset()):
        return PLAIN._replace(probed=self.drafts)

    def judge(self, agreed):
        self.agreed += agreed[Draft("ngram", 0)]


def letters(tokenizer, text: str) -> list[int]:
    """Return one token a letter, "$" the end of a text."""
    return [0 if letter == "$" else tokenizer.convert_tokens_to_ids(letter) for letter in text]


def test_a_guess_is_cut_before_the_first_token_that_the_grammar_forbids(tiny_tokenizer):
    """By hand, in any order: a wrong letter, one repetition too many, an end too early, what is behind an end."""
    cases = [
        ("", "abac", "aba"),
        ("ab", "ababab", "abab"),
        ("aba", "a", ""),
        ("ab", "ab", "ab"),
        ("", "a$", "a"),
        ("a", "bab$ab", "bab$"),
        ("abab", "", ""),
    ]
    mask = mask_of(tiny_tokenizer, "(ab){1,3}")
    for before, guess, possible in cases * 2:
        text = letters(tiny_tokenizer, before)
        assert mask.possible([7, 7, *text], letters(tiny_tokenizer, guess)) == letters(tiny_tokenizer, possible)
        assert allowed_by(mask, text) == allowed_by(mask_of(tiny_tokenizer, "(ab){1,3}"), text)


def test_ngrams_guess_only_what_the_grammar_allows(generator):
    """By hand: behind xy the prompt goes on with z, which may not come; behind aa may come as many as are left."""
    prompt = letters(generator.tokenizer, "xyzx")
    settings = {"regex": "ya{5}", "max_new_tokens": 20, "draft": "ngram", "num_speculations": 4}
    outcome = generator.generate(prompt, **settings)
    assert outcome.token_ids == letters(generator.tokenizer, "yaaaaa$")
    a = letters(generator.tokenizer, "a")[0]
    rounds = [(each.drafted, each.accepted, each.own) for each in outcome.history]
    assert rounds[1:] == [((), 0, a)] * 3 + [((a, a), 2, 0)]
    policy = Foreseen()
    outcome = generator.generate(prompt, draft_policy=policy, **settings)
    assert outcome.token_ids == letters(generator.tokenizer, "yaaaaa$")
    # What a round brings, and so what it tells of, is one token. Of the end behind the last letter none is foreseen.
    assert policy.agreed == [[], [], [], [True], [True], []]


@pytest.mark.parametrize("sampled", [{}, {"temperature": 1.2, "seed": 3}], ids=["greedy", "sampled"])
def test_cut_guesses_leave_the_texts_and_draft_less(generator, monkeypatch, sampled):
    """In a batch of texts with and without a grammar."""
    drafting = generator.settings(draft="ngram", num_speculations=6)

    own = ({"json_schema": SCHEMA}, {}, {"regex": "(ab){1,9}c[ab]{20}"}, {"json_schema": SCHEMA})

    def texts(settings):
        requests = []
        for at, more in enumerate(own):
            asked = generator.settings(max_new_tokens=100, **more, **sampled)
            requests.append(generator.prepare(PROMPTS[at], asked, at))
        assert run(generator, settings, requests) == []
        outcomes = [request.generation for request in requests]
        return [each.token_ids for each in outcomes], [(each.drafted, each.accepted) for each in outcomes]

    expected, _ = texts(generator.settings(num_speculations=0))
    found, counts = texts(drafting)
    monkeypatch.setattr(BatchChooser, "possible", lambda self, guesses: guesses)
    uncut, more = texts(drafting)
    assert found == uncut == expected
    assert sum(drafted for drafted, _ in counts) < sum(drafted for drafted, _ in more)
    assert [accepted for _, accepted in counts] == [accepted for _, accepted in more] != [0] * 4
    assert counts[1] == more[1]  # the free text's


@pytest.mark.parametrize("policy", [FixedDraft, Foreseen])
def test_a_grammar_that_takes_too_much_while_cutting_ends_its_own_text_alone(generator, monkeypatch, policy):
    expected = generator.generate(PROMPTS[0], max_new_tokens=40)
    settings = generator.settings(max_new_tokens=40, draft="ngram", num_speculations=4, draft_policy=policy())
    free = generator.prepare(PROMPTS[0], settings)
    strict = generator.prepare(PROMPTS[1], generator.settings(max_new_tokens=40, regex="a{30}"))
    (mask,) = strict.chooser.by_text
    outside = [len(generator.tokenizer) + 100]  # of the vocabulary: the matcher gives up
    possible = mask.possible
    monkeypatch.setattr(mask, "possible", lambda text, guess: possible(text, outside if len(text) > 16 else guess))
    assert run(generator, settings, [strict, free]) == [strict]
    assert 4 <= len(strict.generation.token_ids) < 30 and free.generation.token_ids == expected.token_ids


def test_a_matcher_that_has_given_up_is_an_error_and_no_leave_to_write_anything(tiny_tokenizer):
    mask = mask_of(tiny_tokenizer, "a{9}")
    with pytest.raises(GrammarError, match="json_schema, regex: token id 400 out of range"):
        allowed_by(mask, [400])
    with pytest.raises(GrammarError, match="out of range"):
        mask.possible([7, 7], letters(tiny_tokenizer, "a"))
    with pytest.raises(GrammarError, match="out of range"):
        mask_of(tiny_tokenizer, "a{9}").possible([7, 7], [400])


def test_strings_and_arrays_get_a_bound_and_keep_their_own(tiny_tokenizer):
    def is_whole(schema: dict, value) -> bool:
        mask = GrammarMask(grammar_tokenizer(tiny_tokenizer, 300, (0,)), compile_grammar(schema, None), 2)
        allowed = allowed_by(mask, tiny_tokenizer(json.dumps(value, separators=(",", ":")))["input_ids"])
        return 0 in allowed and len(allowed) < 300  # all: behind what may not be there

    plain = {"type": "object", "properties": {"a": {"anyOf": [{"type": "string"}, {"type": "null"}]}}}
    longer = {"type": "object", "properties": {"a": {"type": "string", "maxLength": LONGEST_STRING + 9}}}
    for schema, extra, allowed in ((plain, 0, True), (plain, 1, False), (longer, 9, True), (longer, 10, False)):
        text = {"a": "x" * (LONGEST_STRING + extra)}
        mask = GrammarMask(grammar_tokenizer(tiny_tokenizer, 300, (0,)), compile_grammar(schema, None), 2)
        ids = tiny_tokenizer(json.dumps(text, separators=(",", ":")))["input_ids"]
        assert (allowed_by(mask, ids) == {0}) == allowed
    assert is_whole({"type": "array", "items": {"type": "integer"}}, list(range(9)))
    assert is_whole({"type": "string", "minLength": 300}, "y" * 300)
    assert is_whole({"type": "integer"}, -(2**53) + 1) and not is_whole({"type": "integer"}, 2**53)
    assert is_whole({"type": "integer", "maximum": 10**18}, 10**18)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"json_schema": {"type": "objct"}}, "json_schema: Invalid type: objct"),
        ({"json_schema": {"dependentSchemas": {}}}, "json_schema: Unimplemented keys"),
        ({"json_schema": [1]}, r"json_schema: \[1\] is not an object"),
        ({"regex": ""}, "regex: is empty"),
        ({"regex": "a("}, "regex: unclosed group"),
        ({"regex": 5}, "regex: 5 is not a text"),
        ({"regex": "a", "json_schema": {}}, "regex: does not go with json_schema"),
        ({"regex": "a", "min_new_tokens": 3}, "min_new_tokens: does not go with"),
    ],
)
def test_bad_grammars_are_named(generator, settings, words):
    with pytest.raises(ValueError, match=words):
        generator.generate(PROMPTS[0], **settings)


def test_models_that_cannot_end_a_text_are_refused(tiny_model, tiny_tokenizer):
    with pytest.raises(ValueError, match="need a tokenizer"):
        TextGenerator(tiny_model("llama")).generate(PROMPTS[0], regex="a")
    generator = TextGenerator(tiny_model("llama"), tiny_tokenizer)
    generator.eos_ids = ()
    with pytest.raises(ValueError, match="a token that ends a text"):
        generator.generate(PROMPTS[0], regex="a")


def test_without_llguidance_one_sentence_says_what_to_install(generator, monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(ValueError, match=r"regex: needs llguidance, .*; pip install llguidance"):
        generator.generate(PROMPTS[0], regex="not compiled before")
