"""Every family: trained, exported, and decoded in every mode as transformers decodes it.

The names of the first tests are the columns of the table in docs/families.md (benchmarks/families/matrix.py). What an
exit says is known without Decoder: it is transformers' own pass through a copy of the model whose upper blocks are
deleted.
"""

import copy
from functools import cache

import pytest
import torch
from lightning.pytorch import Trainer
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from transformers import AutoConfig, AutoModelForCausalLM

from lskip.callbacks import EarlyExitLoss, LayerDropout
from lskip.curricula import AllExits
from lskip.export.to_hf import export
from lskip.inference import TextGenerator
from lskip.inference.decoding import engine
from lskip.inference.exit_criteria import Margin
from lskip.inference.layers.layout_choice import obstacle_to
from lskip.inference.layers.quantized import Int8
from lskip.inference.runners.fused_blocks import obstacle
from lskip.models.decoder import Decoder
from lskip.models.exit_adapter import AdapterShape, ExitAdapter
from lskip.models.families import FAMILIES, family_of
from lskip.models.pretrained import load_model
from lskip.module import LayerSkipModule

SIZES = {
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
    "initializer_range": 0.2,  # with the usual 0.02 random blocks change next to nothing
}
WINDOWS = {"sliding_window": 6}
GEMMA = {**WINDOWS, "query_pre_attn_scalar": 8, "final_logit_softcapping": 4.0}
NOT_IN_THE_OLDEST = ("num_key_value_heads", "head_dim", "intermediate_size")
# What each family's config says besides: its peculiarities so strong that a test would miss none.
PECULIARITIES = {
    "mistral": WINDOWS,
    "phi3": {**WINDOWS, "partial_rotary_factor": 0.5},
    "gemma2": {**GEMMA, "attn_logit_softcapping": 1.0},
    "gemma3_text": {**GEMMA, "layer_types": ["sliding_attention", "full_attention"] * 2},
    "gpt2": {"n_inner": 64, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "gpt_neox": {"intermediate_size": 64, "rope_parameters": {"rope_type": "default", "rope_theta": 100.0}},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32, "dropout": 0.0},
}
every_family = pytest.mark.parametrize("family", FAMILIES)


def make(family: str, **overrides):
    unknown = NOT_IN_THE_OLDEST if family in ("gpt2", "gpt_neox", "opt") else ()
    sizes = {name: size for name, size in SIZES.items() if name not in unknown}
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**sizes, **PECULIARITIES.get(family, {}), **overrides})
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # norms and biases: zeros and ones would hide a part left out
                parameter += 0.3 * torch.randn_like(parameter)
    return model


def random_ids(*shape, seed=1):
    return torch.randint(1, 100, shape, generator=torch.Generator().manual_seed(seed))


BATCH = {"input_ids": random_ids(4, 24)}
PROMPTS = [random_ids(length, seed=length).tolist() for length in (3, 17, 9)]


@cache
def trained(family: str):
    """After four steps of layer dropout and early exit loss."""
    model = make(family)
    module = LayerSkipModule(model, lr_scheduler=None)
    callbacks = [LayerDropout(p_max=0.3), EarlyExitLoss(e_scale=1.0, curriculum=AllExits())]
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(max_steps=4, accelerator="cpu", callbacks=callbacks, enable_model_summary=False, **quiet)
    trainer.fit(module, DataLoader([BATCH] * 4, batch_size=None))
    return model.eval()


def loss_of(model):
    """Return transformers' own mean loss on BATCH."""
    ids = BATCH["input_ids"]
    return cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def cut(model, exit_layer: int):
    """Return a copy whose blocks above `exit_layer` are deleted."""
    copied = copy.deepcopy(model)
    blocks = next(part for part in copied.modules() if isinstance(part, nn.ModuleList) and len(part) == 4)
    del blocks[exit_layer:]
    return copied


def text_of(model, prompt: list[int]) -> list[int]:
    ids = torch.tensor([prompt])
    return model.generate(ids, max_new_tokens=20, min_new_tokens=20, do_sample=False)[0, len(prompt) :].tolist()


@every_family
def test_train(family):
    """Loss and gradients of two exits are those of two models, the deeper one cut to the shallower; training helps."""
    model = make(family)
    module = LayerSkipModule(model)
    module.exit_weights.write("test", [0.0, 0.4, 0.0, 0.6])
    loss, _ = module.early_exit_loss(BATCH, micro_batch=0)
    loss.backward()
    whole, shallow = make(family), cut(make(family), 2)
    expected = 0.4 * loss_of(shallow.train()) + 0.6 * loss_of(whole.train())
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    of_shallow = {name: parameter.grad for name, parameter in shallow.named_parameters()}
    for (name, ours), theirs in zip(model.named_parameters(), whole.parameters(), strict=True):
        grad = theirs.grad if of_shallow.get(name) is None else theirs.grad + of_shallow[name]
        torch.testing.assert_close(ours.grad, grad, rtol=1e-3, atol=1e-5, msg=name)
    for exit_layer in (2, 4):
        assert loss_of(cut(trained(family), exit_layer)) < loss_of(cut(make(family), exit_layer))


@every_family
@torch.no_grad()
def test_fixed_exit(family):
    model, ids = trained(family), BATCH["input_ids"]
    decoder = Decoder(model)
    x = decoder.embed(ids)
    inputs = decoder.block_inputs(x)
    for exit_layer in (1, 2, 3, 4):
        x = decoder.block(exit_layer - 1, x, inputs)
        torch.testing.assert_close(decoder.decode(x), cut(model, exit_layer)(ids).logits, rtol=1e-4, atol=1e-4)
    generator, expected = TextGenerator(model), text_of(cut(model, 2), PROMPTS[1])
    assert generator.generate(PROMPTS[1], max_new_tokens=20, exit_layer=2).token_ids == expected


@every_family
def test_self_speculative(family):
    """Whatever drafts, the text is transformers' greedy text, well past a window of six tokens."""
    model = trained(family)
    generator, expected = TextGenerator(model), text_of(model, PROMPTS[1])
    drafts = [{"exit_layer": 2, "num_speculations": 3}, {"draft": "ngram", "num_speculations": 4}]
    answers = [generator.generate(PROMPTS[1], max_new_tokens=20, **draft) for draft in drafts]
    if obstacle(Decoder(model)) is None:
        if obstacle_to(Int8, Decoder(model).blocks[0].self_attn.q_proj.weight.detach()) is None:
            rounded = TextGenerator(model, draft_weights="int8")
            answers.append(rounded.generate(PROMPTS[1], max_new_tokens=20, num_speculations=3))
    else:
        with pytest.raises(ValueError, match=f"draft_weights: 'int8' is not for this model .its family is {family}"):
            TextGenerator(model, draft_weights="int8")
    assert [answer.token_ids for answer in answers] == [expected] * len(answers)
    assert answers[0].drafted > 0


@every_family
def test_batch(family):
    """Three prompts in two slots: rows of unequal length, and one that joins later."""
    model = trained(family)
    expected = [text_of(model, prompt) for prompt in PROMPTS]
    for settings in ({}, {"exit_layer": 2, "num_speculations": 3}):
        ours = dict(TextGenerator(model).generate_batch(PROMPTS, batch_size=2, max_new_tokens=20, **settings))
        assert [ours[index].token_ids for index in range(3)] == expected


@every_family
@torch.no_grad()
def test_export(family, tmp_path):
    """A folder that transformers reads, with the trained logits; its draft says what the exit says."""
    model, ids = trained(family), BATCH["input_ids"]
    model.save_pretrained(tmp_path / "trained")
    export(str(tmp_path / "trained"), str(tmp_path / "exported"), draft=2)
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "exported")
    torch.testing.assert_close(exported(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-5)
    draft = AutoModelForCausalLM.from_pretrained(tmp_path / "exported" / "draft")
    torch.testing.assert_close(draft(ids).logits, cut(model, 2)(ids).logits, rtol=1e-5, atol=1e-5)
    loaded, _ = load_model(str(tmp_path / "exported"))
    answer = TextGenerator(loaded).generate(PROMPTS[0], max_new_tokens=20)
    assert answer.token_ids == text_of(model, PROMPTS[0])


# What the table does not show


@every_family
@torch.no_grad()
def test_whether_transformers_leaves_at_an_exit(family, tmp_path):
    """`assistant_early_exit` sets num_hidden_layers of the model that drafts."""
    model, ids = make(family), BATCH["input_ids"]
    expected = cut(model, 2)(ids).logits
    model.save_pretrained(tmp_path / "model")
    model.config.num_hidden_layers = 2
    assert torch.allclose(model(ids, use_cache=False).logits, expected) == FAMILIES[family].exits_in_transformers
    if not FAMILIES[family].exits_in_transformers:
        with pytest.raises(ValueError, match=f"exit_layer: transformers cannot leave a {family} at a layer; use draft"):
            export(str(tmp_path / "model"), str(tmp_path / "exported"), exit_layer=2)


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox"])
def test_dropout_of_embeddings_stands_where_transformers_has_it(family):
    model = make(family, **{"gpt2": {"embd_pdrop": 0.5}, "gpt_neox": {"hidden_dropout": 0.5}}[family]).train()
    torch.manual_seed(3)
    expected = model(BATCH["input_ids"], output_hidden_states=True).hidden_states[0]
    torch.manual_seed(3)
    ours = Decoder(model).embed(BATCH["input_ids"])
    assert torch.equal(ours, expected) and 0.3 < (ours == 0).float().mean() < 0.7


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_learned_positions_of_a_prompt_in_pieces_and_of_tokens_that_may_exit(monkeypatch, family):
    monkeypatch.setattr(engine, "PREFILL_ROWS", 4)
    model = trained(family)
    generator, expected = TextGenerator(model), text_of(model, PROMPTS[1])
    assert generator.generate(PROMPTS[1], max_new_tokens=20).token_ids == expected
    never = Margin(1.0)  # no token is as sure as that
    assert generator.generate(PROMPTS[1], max_new_tokens=20, exit_criterion=never).token_ids == expected


@pytest.mark.parametrize("family", ["gpt2", "opt"])
@torch.no_grad()
def test_learned_positions_of_drafts_that_are_all_accepted(family):
    model = copy.deepcopy(trained(family))
    for block in Decoder(model).blocks[2:]:
        for parameter in block.parameters():
            parameter.mul_(0.05)  # so that the second layer mostly says what the last says
    expected = [text_of(model, prompt) for prompt in PROMPTS]
    settings = {"max_new_tokens": 20, "exit_layer": 2, "num_speculations": 3}
    ours = dict(TextGenerator(model).generate_batch(PROMPTS, batch_size=2, **settings))
    assert [ours[index].token_ids for index in range(3)] == expected
    assert sum(answer.accepted_counts[3] for answer in ours.values()) > 3


@pytest.mark.parametrize("normed_before", [True, False])
def test_opt_with_narrow_embeddings_and_without_a_final_norm(normed_before):
    model = make("opt", word_embed_proj_dim=16, do_layer_norm_before=normed_before)
    assert TextGenerator(model).generate(PROMPTS[1], max_new_tokens=20, exit_layer=2, num_speculations=3).token_ids == (
        text_of(model, PROMPTS[1])
    )
    with pytest.raises(ValueError, match="model: an exit adapter reads states with the head itself"):
        ExitAdapter(model, AdapterShape(2))


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in ("llama", "mistral", "qwen2")])
def test_an_exit_adapter_drafts(family):
    model = trained(family)
    generator = TextGenerator(model, exit_adapter=ExitAdapter(model, AdapterShape(2)).eval())
    answer = generator.generate(PROMPTS[1], max_new_tokens=20, num_speculations=3)
    assert answer.token_ids == text_of(model, PROMPTS[1]) and answer.drafted > 0


@every_family
def test_fields_that_a_family_does_not_read_change_nothing(family):
    """transformers keeps any field of a config.json, and no block looks at it."""
    strays = {"sliding_window": 3, "layer_types": ["sliding_attention"] * 4, "head_dim": 4}
    strays |= {"final_logit_softcapping": 1.0, "hidden_activation": "gelu_pytorch_tanh"}
    default, unnamed = AutoConfig.for_model(family), FAMILIES[family].unnamed_fields
    strays = {name: value for name, value in strays.items() if not hasattr(default, name) and name not in unnamed}
    plain, strange = make(family), make(family, **strays)
    with torch.no_grad():
        ids = BATCH["input_ids"]
        logits = [model(ids).logits for model in (plain, strange)]
        decoder = Decoder(strange)
        x, inputs = decoder.enter(ids)
        for index in range(4):
            x = decoder.block(index, x, inputs)
        assert torch.equal(*logits) and torch.allclose(decoder.decode(x), logits[0], atol=1e-4)
    ours = [TextGenerator(model).generate(PROMPTS[1], max_new_tokens=20, logprobs=True) for model in (plain, strange)]
    assert ours[0].token_ids == ours[1].token_ids == text_of(plain, PROMPTS[1])
    assert ours[0].logprobs == pytest.approx(ours[1].logprobs, abs=1e-4)


def test_longrope_is_decoded_up_to_where_its_angles_change():
    factors = {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4, "original_max_position_embeddings": 32}
    rope = {"rope_type": "longrope", "rope_theta": 100.0, "factor": 4.0, **factors}
    model = make("phi3", partial_rotary_factor=1.0, rope_parameters=rope, original_max_position_embeddings=32)
    assert Decoder(model).context_length == 32
    answer = TextGenerator(model).generate(PROMPTS[1], max_new_tokens=40)
    truth = model.generate(torch.tensor([PROMPTS[1]]), max_new_tokens=15, do_sample=False)
    assert answer.token_ids == truth[0, 17:].tolist()


@pytest.mark.parametrize("family", ["mamba", "mixtral", "bert"])
def test_a_family_that_is_not_covered_is_refused_before_its_weights_are_read(family, tmp_path):
    AutoConfig.for_model(family).save_pretrained(tmp_path)  # a folder without weights: reading them would fail
    for source in (str(tmp_path), {"model_type": family}):
        with pytest.raises(ValueError, match=f"model: the family '{family}' is not supported; allowed: llama, mistral"):
            load_model(source)
    with pytest.raises(ValueError, match="gemma3_text has use_bidirectional_attention"):
        family_of(AutoConfig.for_model("gemma3_text", use_bidirectional_attention=True))
