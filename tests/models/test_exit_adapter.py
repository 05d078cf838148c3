"""Exit adapters: initial outputs, saving and loading, and refusal of other models."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lskip.models.decoder import Decoder
from lskip.models.exit_adapter import SHAPE_FILE, WEIGHTS_FILE, AdapterShape, ExitAdapter, fingerprint, load_adapter

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma3_text")
WORDS = torch.tensor([0, 7, 8, 150, 299])


def logits(adapter: ExitAdapter, exit_states: torch.Tensor, last_states: torch.Tensor | None) -> torch.Tensor:
    x = adapter.joined(exit_states, last_states)
    return adapter.body.lm_head(adapter.norm(adapter.run(x, Decoder(adapter.body).block_inputs(x))))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("num_blocks", "joins"), [(1, True), (2, False)])
def test_it_loads_as_it_was_saved(tmp_path, tiny_model, family, num_blocks, joins):
    model = tiny_model(family).to(torch.bfloat16)
    adapter = ExitAdapter(model, AdapterShape(2, num_blocks, joins), WORDS).eval()
    with torch.no_grad():
        for parameter in adapter.trained_parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    adapter.save(tmp_path / "adapter")
    loaded = load_adapter(tmp_path / "adapter", model)
    assert (loaded.shape, loaded.token_ids.tolist()) == (adapter.shape, WORDS.tolist())
    exit_states, last_states = torch.randn(2, 1, 6, 32).to(torch.bfloat16)
    last_states = last_states if joins else None
    with torch.no_grad():
        expected = logits(adapter, exit_states, last_states)
        assert expected.shape == (1, 6, len(WORDS))
        assert torch.equal(logits(loaded, exit_states, last_states), expected)
        wide = load_adapter(tmp_path / "adapter", tiny_model(family))  # the same model in float32
        torch.testing.assert_close(
            logits(wide, exit_states.float(), None if last_states is None else last_states.float()),
            expected.float(),
            rtol=0.1,
            atol=0.1,
        )


def test_its_positions_are_the_models_in_any_type(tmp_path, tiny_model):
    tiny_model().save_pretrained(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.bfloat16)
    body = ExitAdapter(model, AdapterShape(2), WORDS).body
    assert model.model.rotary_emb.inv_freq.dtype is torch.float32  # bfloat16 would turn far positions by other angles
    assert torch.equal(body.model.rotary_emb.inv_freq, model.model.rotary_emb.inv_freq)
    assert {parameter.dtype for parameter in body.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("family", FAMILIES)
def test_at_first_it_is_the_models_top(tiny_model, family):
    """Without a second input it is the model's own last blocks, norm and head on a rescaled state."""
    model = tiny_model(family)
    adapter = ExitAdapter(model, AdapterShape(2, 2, joins_last_state=False)).eval()
    states = torch.randn(1, 6, 32)
    x = torch.nn.functional.rms_norm(states, (32,))
    decoder = Decoder(model)
    with torch.no_grad():
        inputs = decoder.block_inputs(x)
        expected = decoder.decode(decoder.block(3, decoder.block(2, x, inputs), inputs))
        torch.testing.assert_close(logits(adapter, states, None), expected)
        joining = ExitAdapter(model, AdapterShape(2, 2)).eval()
        torch.testing.assert_close(logits(joining, states, torch.randn(1, 6, 32)), expected)


def test_the_head_is_neither_trained_nor_saved(tmp_path, tiny_model):
    adapter = ExitAdapter(tiny_model(), AdapterShape(2), WORDS)
    trained = {id(parameter) for parameter in adapter.trained_parameters()}
    assert id(adapter.body.lm_head.weight) not in trained
    adapter.save(tmp_path)
    saved = load_file(tmp_path / WEIGHTS_FILE)
    assert sum(part.numel() for part in saved.values()) - len(WORDS) == sum(
        p.numel() for p in adapter.trained_parameters()
    )


def test_another_model_is_refused(tmp_path, tiny_model):
    ExitAdapter(tiny_model(), AdapterShape(2), WORDS).save(tmp_path)
    for other in (tiny_model(seed=1), tiny_model(num_hidden_layers=5), tiny_model(vocab_size=301)):
        with pytest.raises(ValueError, match="was made for another model"):
            load_adapter(tmp_path, other)
    assert fingerprint(Decoder(tiny_model())) == fingerprint(Decoder(tiny_model().to(torch.bfloat16)))


def test_damaged_files_are_refused(tmp_path, tiny_model):
    model = tiny_model()
    with pytest.raises(FileNotFoundError, match=r"holds no adapter\.json"):
        load_adapter(tmp_path, model)
    ExitAdapter(model, AdapterShape(2), WORDS).save(tmp_path)
    description = json.loads((tmp_path / SHAPE_FILE).read_text())
    (tmp_path / SHAPE_FILE).write_text(json.dumps({**description, "num_blocks": 2}))
    with pytest.raises(ValueError, match="do not fit its shape"):
        load_adapter(tmp_path, model)
    (tmp_path / SHAPE_FILE).write_text(json.dumps(description))
    (tmp_path / WEIGHTS_FILE).write_bytes(b"nothing")
    with pytest.raises(ValueError, match="could not be read"):
        load_adapter(tmp_path, model)


def test_shapes_that_no_model_has(tiny_model):
    for field in ("exit_layer", "num_blocks"):
        with pytest.raises(ValueError, match=f"{field}: 0 is not a whole number"):
            replace(AdapterShape(2), **{field: 0})
    with pytest.raises(ValueError, match="exit_layer: 4 is not from 1 to 3"):
        ExitAdapter(tiny_model(), AdapterShape(4))
    with pytest.raises(ValueError, match="num_blocks: 5 is more than"):
        ExitAdapter(tiny_model(), AdapterShape(2, 5))
