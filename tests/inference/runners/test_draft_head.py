"""Drafts among few tokens: the head against rows of the model's logits, and texts that do not depend on it."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from lskip.inference import ConfidenceDraft, TextGenerator
from lskip.inference.layers.linear import Plain
from lskip.inference.runners import draft_head as draft_head_module
from lskip.inference.runners.build import build_runner
from lskip.inference.runners.draft_head import DraftHead, DraftHeadRunner
from lskip.models.decoder import Decoder
from tests.conftest import make_config, make_model

FEW = [3, 299, 7, 42, 42, 150]
FAMILIES = {"llama": {}, "qwen3": {"tie_word_embeddings": False}, "gemma2": {"final_logit_softcapping": 3.0}}


@pytest.fixture
def unrounded(monkeypatch):
    monkeypatch.setattr(draft_head_module, "choose_draft_layouts", lambda *_: [Plain])


@pytest.mark.parametrize(("family", "more"), FAMILIES.items())
@torch.inference_mode()
def test_the_logits_are_those_of_the_models_exit(unrounded, family, more):
    """transformers' own norm, head and cap, of which the head has some rows; all other tokens are impossible."""
    config = AutoConfig.for_model(**make_config(family, **more))
    decoder = Decoder(AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval())
    runner = DraftHeadRunner(build_runner(decoder, "plain", False, True, None, lambda: None), DraftHead(decoder, FEW))
    states = torch.randn(2, 3, decoder.hidden_size)
    own = decoder.decode(states)
    expected = torch.full_like(own, -torch.inf)
    expected[..., FEW] = own[..., FEW]
    torch.testing.assert_close(runner.decode(states), expected)
    assert torch.equal(runner.argmax(states), expected.argmax(-1))

    def ban(logits):  # as BatchChooser bans an end token in the first row of each slot
        logits[:, 0, 42] = -torch.inf

    ban(expected)
    assert torch.equal(runner.argmax(states, ban), expected.argmax(-1))


def test_int8_rows_choose_nearly_as_the_whole_head():
    """Rounding must not mix up rows: with a clear winner it is the winner."""
    decoder = Decoder(make_model())
    head = DraftHead(decoder, range(0, 300, 3))
    x = torch.nn.functional.rms_norm(decoder.head_weight[[0, 33, 297]].detach(), (32,))
    assert head.token_ids[head(x).argmax(-1)].tolist() == [0, 33, 297]


PROMPTS = [[7, 42, 99, 3, 250, 18, 77], [5], [9, 8, 9, 8, 9, 8], [200, 11, 12]]


@pytest.fixture(scope="module")
def generators():
    """A generator without draft tokens, and one whose model often says one of them: accepted and refused drafts."""
    model = make_model(eos_token_id=11)
    for layer in model.model.layers[2:]:
        layer.self_attn.o_proj.weight.data *= 0.3
        layer.mlp.down_proj.weight.data *= 0.3
    kept = {"draft_weights": "int8", "weights": "plain"}
    return TextGenerator(model, **kept), TextGenerator(model, **kept, draft_tokens=range(0, 300, 2))


@pytest.mark.parametrize("draft", [{"draft": "layers", "exit_layer": 2}, {"draft": "weights"}])
@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.8, "top_p": 0.9}, {"repetition_penalty": 1.3}])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_texts_are_the_same_with_and_without(generators, draft, sampling, batch_size):
    whole, few = generators
    settings = {"max_new_tokens": 24, "min_new_tokens": 6, "seed": 5, **sampling}
    expected = {index: answer.token_ids for index, answer in whole.generate_batch(PROMPTS, 1, **settings)}
    policy = {"draft_policy": ConfidenceDraft(0.01)} if batch_size == 1 else {}
    answers = dict(few.generate_batch(PROMPTS, batch_size, num_speculations=3, **draft, **settings, **policy))
    assert {index: answer.token_ids for index, answer in answers.items()} == expected
    assert 0 < sum(answer.accepted for answer in answers.values()) < sum(a.drafted for a in answers.values())


def test_end_tokens_are_among_the_draft_tokens(generators):
    whole, few = generators
    assert few.draft_head.token_ids.tolist() == sorted({*range(0, 300, 2), 11})
    assert few.memory()["draft_head"] > 0 and "draft_head" not in whole.memory()
    with pytest.raises(ValueError, match="draft_tokens: 300 is not a token from 0 to 299"):
        TextGenerator(make_model(), draft_tokens=[5, 300])
