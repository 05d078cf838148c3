"""Log probabilities of chosen tokens: those of the model's own logits, however a text was drafted and chosen."""

import pytest
import torch

from lskip.inference import Entropy, TextGenerator
from tests.conftest import make_model

PROMPT = [7, 42, 99, 3, 7, 42]


@pytest.fixture(scope="module")
def model():
    return make_model(eos_token_id=5)


@pytest.fixture(scope="module")
def generator(model):
    return TextGenerator(model)


@torch.no_grad()
def by_transformers(model, prompt, tokens):
    """Return the log probabilities of tokens behind a prompt, from one pass of the whole model."""
    logits = model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
    return logits.float().log_softmax(-1)[range(len(tokens)), tokens].tolist()


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"draft": "layers", "exit_layer": 2, "num_speculations": 3},
        {"draft": "ngram", "num_speculations": 4},
        {"temperature": 0.7, "top_p": 0.8, "seed": 3},
        {"temperature": 1.3, "seed": 3, "exit_layer": 2, "num_speculations": 3},
        {"temperature": 1.0, "seed": 3, "exit_layer": 2, "num_speculations": 3, "acceptance": "rejection"},
        {"repetition_penalty": 1.8, "min_new_tokens": 20},
    ],
    ids=str,
)
def test_they_are_those_of_the_model(generator, model, settings):
    """Red for those of penalised or warped logits, for a refused token's, and for those beyond a text's end."""
    settings = {"max_new_tokens": 24, **settings}
    told = generator.generate(PROMPT, logprobs=True, **settings)
    assert told.logprobs == pytest.approx(by_transformers(model, PROMPT, told.token_ids), abs=1e-4)
    untold = generator.generate(PROMPT, **settings)
    assert untold.token_ids == told.token_ids
    assert untold.logprobs == []


def test_texts_of_a_batch_have_their_own(generator, model):
    prompts = [PROMPT, [3, 1, 4, 1, 5, 9, 2, 6], [250], [11, 12, 13]]
    settings = {"max_new_tokens": 15, "draft": "ngram", "num_speculations": 3, "logprobs": True}
    for index, told in generator.generate_batch(prompts, 3, **settings):
        assert told.logprobs == pytest.approx(by_transformers(model, prompts[index], told.token_ids), abs=1e-4)


def test_at_a_fixed_exit_they_are_its_own(model):
    shallow = make_model(eos_token_id=5)
    shallow.model.layers = shallow.model.layers[:2]
    told = TextGenerator(model).generate(PROMPT, exit_layer=2, logprobs=True, max_new_tokens=12)
    assert told.logprobs == pytest.approx(by_transformers(shallow, PROMPT, told.token_ids), abs=1e-4)


def test_with_a_criterion_each_is_of_the_tokens_exit(generator, model):
    """A criterion that is never sure runs all blocks, so that every token is the whole model's."""
    told = generator.generate(PROMPT, exit_criterion=Entropy(1e-9), logprobs=True, max_new_tokens=12)
    assert told.logprobs == pytest.approx(by_transformers(model, PROMPT, told.token_ids), abs=1e-4)


def test_a_value_that_is_neither_true_nor_false(generator):
    with pytest.raises(ValueError, match="logprobs: 5 is not true or false"):
        generator.generate(PROMPT, logprobs=5)
