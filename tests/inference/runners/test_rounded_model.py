"""Weights in 8 bits that decide the text: its own text with and without drafts, and the model that it stands for."""

import copy

import pytest
import torch
from transformers import PreTrainedModel

from lskip.inference import TextGenerator
from lskip.inference.layers.bags import BaggedInt8
from lskip.inference.layers.layout_choice import obstacle_to
from lskip.inference.runners.rounded_model import round_to_int8
from lskip.models.decoder import Decoder

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma3_text")
PROMPTS = [[5, 6, 7], [8, 9] * 6, [3] * 20, [11]]
LENGTHS = {"max_new_tokens": 60, "min_new_tokens": 60}
pytestmark = pytest.mark.skipif(
    obstacle_to(BaggedInt8, torch.ones(16, 16)) is not None, reason="this build has no bags of 8 bits"
)


@pytest.fixture
def model(tiny_model):
    """Return a function that makes a model of a family whose matrices all have a multiple of 8 rows."""
    return lambda family="llama": tiny_model(family, head_dim=8, vocab_size=320)


def rounded(model: PreTrainedModel) -> PreTrainedModel:
    made = copy.deepcopy(model)
    round_to_int8(Decoder(made))
    return made


@pytest.mark.parametrize("family", FAMILIES)
def test_its_text_is_that_of_the_rounded_model(model, family):
    """Which transformers decodes; and it is no longer the model's own."""
    whole = model(family)
    generator = TextGenerator(whole, weights="int8")
    assert generator.runner.layout == "BaggedInt8"
    truth = rounded(whole)
    for ids in PROMPTS:
        expected = truth.generate(
            torch.tensor([ids]), do_sample=False, max_new_tokens=60, min_new_tokens=60, pad_token_id=0
        )
        assert generator.generate(ids, **LENGTHS).token_ids == expected[0, len(ids) :].tolist()
    own = TextGenerator(whole, weights="plain")
    assert any(generator.generate(ids, **LENGTHS) != own.generate(ids, **LENGTHS) for ids in PROMPTS)


@pytest.mark.parametrize("family", FAMILIES)
def test_drafts_and_batches_change_no_token(model, family):
    whole = model(family)
    generator = TextGenerator(whole, weights="int8", draft_weights="int4")
    plain = [generator.generate(ids, **LENGTHS, draft="layers").token_ids for ids in PROMPTS]
    for draft in (
        *({"draft": "layers", "exit_layer": exit_layer} for exit_layer in (1, 2, 3)),
        *({"draft": "weights"}, {"draft": "ngram"}, {"draft": "weights", "exit_layer": 2}),
    ):
        for num_speculations in (1, 4, 9):
            settings = {**LENGTHS, **draft, "num_speculations": num_speculations}
            assert [generator.generate(ids, **settings).token_ids for ids in PROMPTS] == plain, settings
            ended = sorted(generator.generate_batch(PROMPTS, 4, **settings))
            assert [generation.token_ids for _, generation in ended] == plain, settings


def test_rows_up_to_eight_have_the_same_bits_whatever_is_beside_them(model):
    torch.manual_seed(0)
    matrix, rows = BaggedInt8(torch.randn(240, 64)), torch.randn(64, 64)
    for count in range(1, 9):
        assert torch.equal(matrix(rows[:count]), torch.cat([matrix(row[None]) for row in rows[:count]]))
    assert torch.allclose(matrix(rows), rows @ matrix.numbers.T, atol=1e-4)
    assert torch.allclose(matrix(rows[:8]), matrix(rows)[:8], atol=1e-4)


def test_rounding_the_rounded_changes_nothing(model):
    once = rounded(model())
    twice = rounded(once)
    for name, weight in once.named_parameters():
        assert torch.allclose(weight, twice.get_parameter(name), atol=1e-6), name


def test_the_head_stays_as_it_is_and_auto_never_rounds(model):
    whole = model()
    generator = TextGenerator(whole, weights="int8")
    states = torch.randn(1, 3, generator.runner.hidden_size)
    expected = whole.lm_head(whole.model.norm(states))
    assert torch.allclose(generator.runner.decode(states), expected, atol=1e-5)
    assert "Int8" not in TextGenerator(whole).runner.layout
    blocks = sum(each.numel() for each in whole.model.layers.parameters() if each.ndim > 1)
    assert generator.memory()["blocks"] < 1.5 * blocks  # a scale and a zero for each part of a column: small ones here


def test_what_is_refused(tiny_model, model):
    with pytest.raises(ValueError, match=r"weights: 'int8' is not for this model .* use 'auto' or 'plain'"):
        TextGenerator(tiny_model("gpt2"), weights="int8")
    with pytest.raises(ValueError, match="weights: 'int8' does not go with bit_exact"):
        TextGenerator(model(), weights="int8", bit_exact=True)
    with pytest.raises(ValueError, match="weights: 'int8' is not for this model"):
        round_to_int8(Decoder(tiny_model("gpt2")))
    with pytest.raises(ValueError, match="draft_weights: 'int8' is what weights are already"):
        TextGenerator(model(), weights="int8", draft_weights="int8")


def test_drafts_that_suit_are_no_second_copy(model):
    assert TextGenerator(model(), weights="int8", draft_weights="auto").draft_weights is None
    assert TextGenerator(model(), draft_weights="auto").draft_weights == "int8"
