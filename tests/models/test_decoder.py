"""The view against transformers' own forward pass: states, logits, masks, positions."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from lskip.models.decoder import Decoder

SLIDING_MISTRAL = ("mistral", {"sliding_window": 5})
SLIDING_QWEN3 = ("qwen3", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2})
MODELS = [
    ("llama", {}),
    ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False}),
    ("mistral", {}),
    SLIDING_MISTRAL,
    ("qwen2", {}),
    ("qwen3", {}),
    SLIDING_QWEN3,
]


def random_ids(rows=3, length=12):
    return torch.randint(0, 300, (rows, length), generator=torch.Generator().manual_seed(1))


def all_states(decoder, x, inputs):
    states = []
    for block in range(decoder.num_layers):
        x = decoder.block(block, x, inputs)
        states.append(x)
    return states


@pytest.mark.parametrize(("family", "overrides"), MODELS)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_every_block_and_the_logits_are_those_of_transformers(tiny_model, family, overrides, attention):
    model = tiny_model(family, **overrides)
    model.set_attn_implementation(attention)
    decoder, ids = Decoder(model), random_ids()
    expected = model(ids, output_hidden_states=True)
    x = decoder.embed(ids)
    torch.testing.assert_close(x, expected.hidden_states[0])
    states = all_states(decoder, x, decoder.block_inputs(x))
    for state, theirs in zip(states[:-1], expected.hidden_states[1:-1], strict=True):
        torch.testing.assert_close(state, theirs, rtol=1e-4, atol=1e-5)
    # transformers' last hidden state is already normed
    torch.testing.assert_close(decoder.norm(states[-1]), expected.hidden_states[-1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(decoder.decode(states[-1]), expected.logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("family", "overrides"), [("llama", {}), SLIDING_MISTRAL, SLIDING_QWEN3])
@torch.no_grad()
def test_in_two_pieces_over_a_cache_the_states_are_those_of_one_pass(tiny_model, family, overrides):
    decoder, ids = Decoder(tiny_model(family, **overrides)), random_ids()
    x = decoder.embed(ids)
    whole = all_states(decoder, x, decoder.block_inputs(x))
    cache = DynamicCache()
    for part in (slice(0, 7), slice(7, 12)):
        positions = torch.arange(12)[part][None]
        held = dict.fromkeys((None, 5), torch.arange(part.stop)[None])
        inputs = decoder.block_inputs(x[:, part], positions, cache, held)
        for state, expected in zip(all_states(decoder, x[:, part], inputs), whole, strict=True):
            torch.testing.assert_close(state, expected[:, part], rtol=1e-4, atol=1e-5)
    assert cache.get_seq_length() == 12


@torch.no_grad()
def test_which_keys_a_query_sees(tiny_model):
    decoder = Decoder(tiny_model("mistral", sliding_window=3))
    x = torch.zeros(1, 4, 32)
    visible = decoder.block_inputs(x).masks[3][0, 0] == 0
    assert visible.tolist() == [
        [True, False, False, False],
        [True, True, False, False],
        [True, True, True, False],
        [False, True, True, True],
    ]
    # A cache of 6 slots, two rows at their own positions: slots after a query's position are never seen.
    positions = torch.tensor([[1], [4]])
    mask = decoder.block_inputs(torch.zeros(2, 1, 32), positions, DynamicCache(), {3: torch.arange(6)[None]}).masks[3]
    assert (mask[:, 0, 0] == 0).int().tolist() == [[1, 1, 0, 0, 0, 0], [0, 0, 1, 1, 1, 0]]


def test_window_by_block(tiny_model):
    def windows(family, overrides):
        decoder = Decoder(tiny_model(family, **overrides))
        return [decoder.window(block) for block in range(4)]

    assert windows("llama", {}) == [None] * 4
    assert windows("mistral", {}) == [None] * 4
    assert windows(*SLIDING_MISTRAL) == [5] * 4
    assert windows(*SLIDING_QWEN3) == [None, None, 5, 5]
    assert windows("qwen2", {"sliding_window": 5}) == [None] * 4  # use_sliding_window is off


def test_numbers_of_the_model(tiny_model):
    decoder = Decoder(tiny_model(tie_word_embeddings=False))
    assert (decoder.num_layers, decoder.hidden_size, decoder.vocab_size, decoder.context_length) == (4, 32, 300, 128)
    assert decoder.head_weight is decoder.model.lm_head.weight and decoder.head_bias is None
    assert decoder.model.to(torch.bfloat16) is decoder.model and decoder.dtype == torch.bfloat16


@pytest.mark.parametrize("exit_layer", [0, 5, -1, 1.0, "2", None, True])
def test_exit_layers_that_do_not_exist_are_refused(tiny_model, exit_layer):
    decoder = Decoder(tiny_model())
    assert [decoder.block_index(1), decoder.block_index(4)] == [0, 3]
    with pytest.raises(ValueError, match=f"exit_layer: {exit_layer!r} is not a whole number from 1 to 4"):
        decoder.block_index(exit_layer)


def test_models_that_it_would_run_wrongly_are_refused(tiny_model):
    other = AutoModelForCausalLM.from_config(AutoConfig.for_model("gptj", n_embd=8, n_layer=1, n_head=1, vocab_size=9))
    with pytest.raises(ValueError, match=r"model: the family 'gptj' is not supported; allowed: llama, mistral"):
        Decoder(other)
    model = tiny_model()
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="attn_implementation: 'flash_attention_2' is not supported; allowed: sdpa"):
        Decoder(model)
