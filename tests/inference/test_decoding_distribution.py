"""Sampled tokens against exact enumeration: the first four of a model of five words, for every draft and acceptance.

More draws: `python -m benchmarks.decoding.correctness sampling`.
"""

from __future__ import annotations

from copy import copy
from itertools import product
from math import exp
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopPLogitsWarper

from lskip.inference import TextGenerator
from lskip.inference.decoding import rejection
from lskip.inference.runners.adapter_runner import AdapterRunner
from lskip.inference.runners.build import build_draft_runner
from lskip.inference.runners.draft_head import DraftHead
from lskip.models.decoder import Decoder
from lskip.models.exit_adapter import AdapterShape, ExitAdapter
from tests.conftest import make_model

WORDS, TOKENS, LAYERS, EXIT = 5, 4, 3, 1
# Every pair of words but one stands here, so that n-grams nearly always have something to say.
PROMPT = [0, 0, 1, 0, 2, 0, 3, 0, 4, 1, 1, 2, 1, 3, 1, 4, 2, 2, 3, 2, 4, 3, 3, 4, 4, 0, 1]
SAMPLING = {"temperature": 0.8, "top_p": 0.9, "max_new_tokens": TOKENS}
DRAFTS = {
    "layers": {"draft": "layers", "exit_layer": EXIT},
    "weights": {"draft": "weights"},
    "ngram": {"draft": "ngram"},
    "adapter": {"draft": "adapter"},
    "layers of few tokens": {"draft": "layers", "exit_layer": EXIT},
    "weights of few tokens": {"draft": "weights"},
}
LEAST_P = 1e-4


class Setup(NamedTuple):
    """Settings of the draws: draft, number of tokens, acceptance and batch size."""

    draft: str
    num_speculations: int
    acceptance: str
    batch_size: int


ALL_SETUPS = [Setup(*choice) for choice in product(DRAFTS, (1, 2), ("rejection", "shared_noise"), (1, 8))]
# What the tests have time for: with rejection, where drafts shape the text, each of them at both lengths.
TESTED = [
    Setup("layers", 1, "rejection", 8),
    Setup("layers", 2, "rejection", 1),
    Setup("weights", 1, "rejection", 8),
    Setup("weights", 2, "rejection", 8),
    Setup("ngram", 1, "rejection", 8),
    Setup("ngram", 2, "rejection", 8),
    Setup("layers", 2, "shared_noise", 8),
    Setup("weights", 1, "shared_noise", 8),
    Setup("ngram", 2, "shared_noise", 1),
    Setup("adapter", 2, "rejection", 8),
    Setup("layers of few tokens", 2, "rejection", 8),
    Setup("weights of few tokens", 1, "rejection", 1),
    Setup("layers of few tokens", 1, "shared_noise", 8),
]


def five_words(seed: int):
    """Return a random model, peaked but not degenerate, whose first exit predicts something else."""
    sizes = {"vocab_size": WORDS, "num_hidden_layers": LAYERS, "eos_token_id": None, "bos_token_id": None}
    return make_model("llama", seed, initializer_range=0.3, tie_word_embeddings=False, **sizes)


def make_generator() -> TextGenerator:
    """Return a generator whose draft weights are another model's, in int8: they agree with it by chance alone."""
    generator = TextGenerator(five_words(5), weights="plain", draft_weights="int8")
    generator.draft_runner = build_draft_runner(Decoder(five_words(9)), "int8")
    return generator


def with_adapter(generator: TextGenerator) -> TextGenerator:
    """Return the same with an untrained exit adapter whose vocabulary is three of the words."""
    made = copy(generator)
    adapter = ExitAdapter(five_words(5), AdapterShape(EXIT), torch.tensor([0, 2, 3]))
    made.adapter_runner = AdapterRunner(adapter)
    return made


def with_few_tokens(generator: TextGenerator) -> TextGenerator:
    """Return the same, its drafts of layers and of weights among three of the words."""
    made = copy(generator)
    made.draft_head = DraftHead(Decoder(five_words(5)), [0, 2, 3])
    return made


@torch.inference_mode()
def next_word_probabilities(exit_layer: int) -> list[Tensor]:
    """Return [words^n, words] for n = 0, 1, 2, 3 words after the prompt, from transformers' model and warpers alone."""
    model = five_words(5)
    warpers = LogitsProcessorList([TemperatureLogitsWarper(0.8), TopPLogitsWarper(0.9)])
    tables = []
    for count in range(TOKENS):
        ids = torch.tensor([PROMPT + list(words) for words in product(range(WORDS), repeat=count)])
        states = model.model(ids, output_hidden_states=True).hidden_states[exit_layer][:, -1]
        last = states if exit_layer == LAYERS else model.model.norm(states)
        tables.append(warpers(ids, model.lm_head(last)).double().softmax(-1))
    return tables


def joint(tables: list[Tensor]) -> Tensor:
    """Return the probability of each text: [words^4]."""
    probabilities = torch.ones(1, dtype=torch.float64)
    for table in tables:
        probabilities = (probabilities[:, None] * table).flatten()
    return probabilities


def draw(generator: TextGenerator, setup: Setup, draws: int, seed: int) -> Tensor:
    """Return how often each text was drawn: [words^4]."""
    settings = {**SAMPLING, **DRAFTS[setup.draft], "num_speculations": setup.num_speculations}
    if setup.draft == "adapter":
        generator = with_adapter(generator)
    if setup.draft.endswith("of few tokens"):
        generator = with_few_tokens(generator)
    outcomes = generator.generate_batch(
        [PROMPT] * draws, setup.batch_size, seed=seed, acceptance=setup.acceptance, **settings
    )
    counts = torch.zeros(WORDS**TOKENS, dtype=torch.float64)
    for _, outcome in outcomes:
        place = 0
        for word in outcome.token_ids:
            place = place * WORDS + word
        counts[place] += 1
    assert counts.sum() == draws
    return counts


def chi_square_p(counts: Tensor, probabilities: Tensor) -> float:
    """Return the p-value of Pearson's test of counts; categories with expectations below 5 are pooled."""
    if counts[probabilities == 0].any():
        return 0.0
    expected = probabilities * counts.sum()
    order = expected.argsort(descending=True)
    counts, expected = counts[order], expected[order]
    cells = int((expected >= 5).sum())
    if expected[cells:].sum() < 5:
        cells -= 1
    observed = torch.cat([counts[:cells], counts[cells:].sum()[None]])
    expected = torch.cat([expected[:cells], expected[cells:].sum()[None]])
    statistic = ((observed - expected) ** 2 / expected).sum()
    # The statistic follows a chi-square distribution with `cells` degrees of freedom; its survival function:
    return float(torch.special.gammaincc(torch.tensor(cells / 2, dtype=torch.float64), statistic / 2))


@pytest.fixture(scope="module")
def generator():
    return make_generator()


@pytest.fixture(scope="module")
def truth():
    return joint(next_word_probabilities(LAYERS))


def test_chi_square_by_hand():
    thirds = torch.full((3,), 1 / 3, dtype=torch.float64)
    # ((20-10)^2 + 0 + (20-30)^2) / 20 = 10; with 2 degrees of freedom the survival function is exp(-x/2).
    assert chi_square_p(torch.tensor([10.0, 20.0, 30.0]), thirds) == pytest.approx(exp(-5))
    assert chi_square_p(torch.tensor([20.0, 20.0, 20.0]), thirds) == 1.0
    assert chi_square_p(torch.tensor([30.0, 30.0, 1.0]), torch.tensor([0.5, 0.5, 0.0])) == 0.0
    # Cells of 60, 36, 3.6 and .4 expected become 60, 36 and 4, too small as well, then 60 and 40: 25/60 + 25/40.
    small = torch.tensor([0.6, 0.36, 0.036, 0.004], dtype=torch.float64)
    one_degree = torch.special.erfc(torch.tensor((25 / 60 + 25 / 40) / 2).sqrt())
    assert chi_square_p(torch.tensor([65.0, 30.0, 3.0, 2.0]), small) == pytest.approx(float(one_degree))


def test_the_model_is_peaked_and_its_exit_far_from_it(truth):
    assert truth.sum() == pytest.approx(1)
    assert (truth == 0).any() and truth.max() < 0.1 and (truth * 1000 >= 5).sum() > 40
    own, exits = next_word_probabilities(LAYERS), next_word_probabilities(EXIT)
    for count in range(1, TOKENS):  # where drafts are: after the first word
        reached = joint(own[:count])
        distance = (own[count] - exits[count]).abs().sum(1) / 2
        assert reached @ distance >= 0.2


@pytest.mark.parametrize("setup", TESTED, ids=lambda setup: "-".join(map(str, setup)))
def test_texts_are_drawn_from_the_models_distribution(generator, truth, setup):
    counts = draw(generator, setup, 1500 if setup.acceptance == "rejection" else 700, seed=100)
    assert chi_square_p(counts, truth) > LEAST_P


def accept_all(p, q, drafted, uniforms):
    return torch.tensor([len(drafted)])


def draw_from_p(p, q, accepted):
    return p.index_select(0, accepted)


right_remainder = rejection.remainder


def bonus_of_the_token_before(p, q, accepted):
    return right_remainder(torch.cat([p[:-1], p[-2:-1]]) if len(q) else p, q, accepted)


WRONG = [
    ("layers", "accepted_prefix", accept_all),
    ("layers", "remainder", draw_from_p),
    ("layers", "remainder", bonus_of_the_token_before),
    ("ngram", "accepted_prefix", accept_all),
    ("ngram", "remainder", draw_from_p),
]


@pytest.mark.parametrize(("draft", "part", "wrong"), WRONG)
def test_the_same_test_rejects_wrong_rejection_sampling(generator, truth, monkeypatch, draft, part, wrong):
    monkeypatch.setattr(rejection, part, wrong)
    counts = draw(generator, Setup(draft, 2, "rejection", 8), 700, seed=100)
    assert chi_square_p(counts, truth) < LEAST_P


def test_the_same_test_rejects_shared_noise_that_accepts_all(generator, truth, monkeypatch):
    def keep_all(own, drafted):
        return torch.full((len(own),), drafted.shape[1]), own[:, -1]

    monkeypatch.setattr("lskip.inference.decoding.sampling.keep_agreeing", keep_all)
    assert chi_square_p(draw(generator, Setup("layers", 2, "shared_noise", 8), 700, seed=100), truth) < LEAST_P


@pytest.mark.parametrize("batch_size", [1, 8])
@pytest.mark.parametrize("draft", DRAFTS)
def test_a_seeds_text_is_the_same_with_and_without_speculation(generator, draft, batch_size):
    """The texts are long enough for drafts far from the model to hit some tokens and miss others."""
    settings = {**SAMPLING, "max_new_tokens": 24, "seed": 3}
    prompts = [PROMPT[:length] for length in (27, 3, 1, 20, 8, 15)]
    if draft == "adapter":
        generator = with_adapter(generator)
    if draft.endswith("of few tokens"):
        generator = with_few_tokens(generator)
    plain = dict(generator.generate_batch(prompts, 1, **settings))
    for num_speculations in (2, 7):
        drafted = dict(
            generator.generate_batch(
                prompts, batch_size, num_speculations=num_speculations, **settings, **DRAFTS[draft]
            )
        )
        assert [drafted[i].token_ids for i in range(6)] == [plain[i].token_ids for i in range(6)]
        accepted, tried = (sum(getattr(one, name) for one in drafted.values()) for name in ("accepted", "drafted"))
        assert 0 < accepted < tried
