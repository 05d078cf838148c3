"""FusedRunner and ModuleRunner against transformers' own forward pass and `generate`."""

import pytest
import torch

from lskip.inference import TextGenerator
from lskip.inference.layers.bags import Bagged
from lskip.inference.layers.linear import Halved, Packed, Plain, Sliced
from lskip.inference.runners.fused_blocks import obstacle
from lskip.inference.runners.fused_runner import FusedRunner
from lskip.inference.runners.module_runner import ModuleRunner
from lskip.models.decoder import Decoder
from tests.conftest import HALVED_WORKS

FAMILIES = {
    "llama": {},
    "mistral": {},
    "qwen2": {},
    "qwen3": {},
    "llama3_rope": {
        "family": "llama",
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    },
    "yarn_rope": {
        "family": "llama",
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    },
    "biased_untied": {"family": "llama", "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False},
    "one_key_head": {"family": "llama", "num_key_value_heads": 1},
    "mistral_window": {"family": "mistral", "sliding_window": 7},
    "qwen3_window": {
        "family": "qwen3",
        "sliding_window": 6,
        "use_sliding_window": True,
        "max_window_layers": 2,
        "layer_types": ["full_attention", "full_attention", "sliding_attention", "sliding_attention"],
    },
    "gemma3": {
        "family": "gemma3_text",
        "sliding_window": 6,
        "query_pre_attn_scalar": 24,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            "full_attention": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0},
        },
    },
    "gemma3_capped": {"family": "gemma3_text", "final_logit_softcapping": 2.0},
}
RUNNERS = {
    "plain": lambda decoder: FusedRunner(decoder, [Plain]),
    "bagged": lambda decoder: FusedRunner(decoder, [Bagged]),
    "packed": lambda decoder: FusedRunner(decoder, [Packed]),
    "sliced_exact": lambda decoder: FusedRunner(decoder, [Sliced], width=4),
    "packed_exact": lambda decoder: FusedRunner(decoder, [Packed], width=4),
    "module": ModuleRunner,
}
if HALVED_WORKS:
    RUNNERS["halved"] = lambda decoder: FusedRunner(decoder, [Halved])


def build(tiny_model, name):
    overrides = dict(FAMILIES[name])
    model = tiny_model(overrides.pop("family", name), **overrides)
    for parameter_name, parameter in model.named_parameters():
        if "bias" in parameter_name or "norm" in parameter_name:  # zeros and ones would hide a part left out
            torch.nn.init.normal_(parameter, mean=float("norm" in parameter_name), std=0.3)
    return model.bfloat16().float()  # numbers that every layout can hold


def prompt_ids(length, seed=1):
    return torch.randint(1, 300, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.mark.parametrize("runner", RUNNERS)
@pytest.mark.parametrize("name", FAMILIES)
@torch.inference_mode()
def test_logits_equal_transformers(tiny_model, name, runner):
    """In uneven pieces (a prompt, a lone row, a draft's worth) as in one transformers pass over all tokens."""
    model = build(tiny_model, name)
    run = RUNNERS[runner](Decoder(model))
    ids = torch.tensor(prompt_ids(24))
    cache, rows, start = run.new_cache(1, 24), [], 0
    for piece in ids[None].split([11, 1, 1, 5, 1, 4, 1], dim=1):
        half = run.run(run.embed(piece), cache, [start], 0, 2)
        rows.append(run.decode(run.run(half, cache, [start], 2, 4)))
        start += piece.shape[1]
    assert torch.allclose(torch.cat(rows, 1), model(ids[None]).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("runner", RUNNERS)
@pytest.mark.parametrize("name", FAMILIES)
@torch.inference_mode()
def test_slots_of_unequal_length_do_not_meet(tiny_model, name, runner):
    """Three texts in slots of a larger cache, prefilled alone, then a pass of 1 and one of 3 rows for all."""
    model = build(tiny_model, name)
    run = RUNNERS[runner](Decoder(model))
    texts = [prompt_ids(length, seed=length) for length in (19, 6, 12)]
    cache, starts = run.new_cache(4, 24), [len(text) - 4 for text in texts]
    for index, (text, start) in enumerate(zip(texts, starts, strict=True)):
        run.run(run.embed(torch.tensor([text[:start]])), cache.slot(index), [0], 0, 4)
    ends = torch.tensor([text[-4:] for text in texts])
    ours = [run.decode(run.run(run.embed(ends[:, :1]), cache, starts, 0, 4))]
    ours.append(run.decode(run.run(run.embed(ends[:, 1:]), cache, [start + 1 for start in starts], 0, 4)))
    for text, logits in zip(texts, torch.cat(ours, 1), strict=True):
        assert torch.allclose(logits, model(torch.tensor([text])).logits[0, -4:], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("runner", RUNNERS)
@pytest.mark.parametrize("name", FAMILIES)
def test_greedy_text_equals_generate(tiny_model, name, runner):
    model = build(tiny_model, name)
    generator = TextGenerator(model)
    generator.runner = RUNNERS[runner](Decoder(model))
    for length in (1, 9):
        ids = prompt_ids(length, seed=length)
        truth = model.generate(torch.tensor([ids]), max_new_tokens=30, min_new_tokens=30, do_sample=False)[0, length:]
        ours = generator.generate(ids, max_new_tokens=30, min_new_tokens=30)
        assert ours.token_ids == truth.tolist()


@pytest.mark.parametrize("runner", RUNNERS)
def test_long_prompt_goes_in_pieces(tiny_model, runner):
    model = tiny_model("llama", max_position_embeddings=700)
    generator = TextGenerator(model)
    generator.runner = RUNNERS[runner](Decoder(model))
    ids = prompt_ids(600)
    truth = model.generate(torch.tensor([ids]), max_new_tokens=8, min_new_tokens=8, do_sample=False)[0, 600:]
    ours = generator.generate(ids, max_new_tokens=8, min_new_tokens=8, exit_layer=2, num_speculations=3)
    assert ours.token_ids == truth.tolist()


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3"])
def test_bfloat16_logits_are_near_transformers(tiny_model, name):
    model = build(tiny_model, name).to(torch.bfloat16)
    exact = build(tiny_model, name)
    exact.load_state_dict({key: value.float() for key, value in model.state_dict().items()})
    ids = torch.tensor(prompt_ids(20))
    with torch.inference_mode():
        truth, theirs = exact(ids[None]).logits[0], model(ids[None]).logits[0].float()
        runner = FusedRunner(Decoder(model), [Plain])
        ours = runner.decode(runner.run(runner.embed(ids[None]), runner.new_cache(1, 20), [0], 0, 4))[0].float()
    # Rounding differs; it must not be worse than transformers' own by more than a little.
    assert (ours - truth).abs().mean() < 1.5 * (theirs - truth).abs().mean()


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        ({"hidden_act": "gelu"}, "activation"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "rotary"),
    ],
)
def test_what_the_fused_runner_does_not_cover_runs_on_modules(tiny_model, overrides, reason):
    model = tiny_model("llama", **overrides)
    assert reason in obstacle(Decoder(model))
    generator = TextGenerator(model)
    assert isinstance(generator.runner, ModuleRunner)
    ids = prompt_ids(8)
    truth = model.generate(torch.tensor([ids]), max_new_tokens=20, min_new_tokens=20, do_sample=False)[0, 8:]
    assert generator.generate(ids, max_new_tokens=20, min_new_tokens=20).token_ids == truth.tolist()
    with pytest.raises(ValueError, match="fused runner does not cover"):
        FusedRunner(Decoder(model), [Plain])
    with pytest.raises(ValueError, match="weights: 'packed' is not for this model"):
        TextGenerator(model, weights="packed")
    with pytest.raises(ValueError, match="bit_exact: is not for this model"):
        TextGenerator(model, bit_exact=True)


def test_a_part_the_fused_runner_does_not_know_is_not_left_out(tiny_model):
    model = tiny_model("llama")
    model.model.layers[0].mlp.extra = torch.nn.Linear(2, 2)
    assert "extra" in obstacle(Decoder(model))
    wrapped = tiny_model("llama")
    projection = wrapped.model.layers[0].self_attn.q_proj
    wrapped.model.layers[0].self_attn.q_proj = torch.nn.Sequential(projection)
    assert "q_proj" in obstacle(Decoder(wrapped))


@pytest.mark.parametrize("weights", ["plain", "packed"])
def test_the_model_stays_as_it_is_unless_released(tiny_model, weights):
    model = tiny_model("llama")
    ids = torch.tensor([prompt_ids(6)])
    before = model(ids).logits
    generator = TextGenerator(model, weights=weights)
    assert torch.equal(model(ids).logits, before)
    tokens = generator.generate(ids, max_new_tokens=12).token_ids
    released = TextGenerator(model, weights=weights, release_model=True)
    assert not any("layers" in name for name, _ in model.named_parameters())
    assert released.generate(ids, max_new_tokens=12).token_ids == tokens
