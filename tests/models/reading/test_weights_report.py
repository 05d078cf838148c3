"""Weights that are missing, left over or of another shape: one sentence by name, never random numbers."""

import json
import logging

import pytest
import torch
from safetensors.torch import load_file, save_file

from lskip.cli import main
from lskip.models.pretrained import load_model
from tests.conftest import make_model

K3 = "K3 missing weights become random numbers"
IDS = torch.tensor([[5, 17, 250, 3, 99, 8]])


def without(*parts):
    return lambda weights: {name: part for name, part in weights.items() if not any(each in name for each in parts)}


def prefixed(prefix):
    return lambda weights: {prefix + name: part for name, part in weights.items()}


def also(**more):
    return lambda weights: {**weights, **{name.replace("__", "."): part for name, part in more.items()}}


# changes of the weights, of the config -> words of the sentence
INPUTS = {
    "F9 mlp of a layer": (without("layers.2.mlp"), {}, "lack 'model.layers.2.mlp.down_proj.weight' and 2 more"),
    "F9 config of more layers": (dict, {"num_hidden_layers": 6}, "lack 'model.layers.4.input_layernorm.weight'"),
    "F10 torch.compile": (prefixed("_orig_mod."), {}, "begin with '_orig_mod.'"),
    "F10 DataParallel": (prefixed("module."), {}, "begin with 'module.'"),
    "another wrapper": (prefixed("base_model.model."), {}, "lack 'lm_head.weight' and 38 more"),
    "one norm": (without("layers.1.input_layernorm"), {}, "lack 'model.layers.1.input_layernorm.weight'"),
    "the embedding": (without("embed_tokens"), {}, "lack"),
    "head of an untied model": (dict, {"tie_word_embeddings": False}, "lack 'lm_head.weight'"),
    "config of fewer layers": (dict, {"num_hidden_layers": 2}, "hold 'model.layers.2.input_layernorm.weight' and 17"),
    "bias of a layer": (
        also(model__layers__0__mlp__up_proj__bias=torch.ones(64)), {}, "hold 'model.layers.0.mlp.up_proj.bias'"
    ),
    "config with biases": (dict, {"attention_bias": True}, "lack 'model.layers.0.self_attn.k_proj.bias'"),
    "shape of a norm": (also(model__norm__weight=torch.ones(16)), {}, "model.norm.weight is (16,), not (32,)"),
    "config of another width": (dict, {"intermediate_size": 60}, "down_proj.weight is (32, 64), not (32, 60)"),
    "whole numbers": (lambda weights: {name: part.int() for name, part in weights.items()}, {}, "weight is int32"),
    "bytes": (also(model__norm__weight=torch.ones(32, dtype=torch.uint8)), {}, "model.norm.weight is uint8"),
    "config of another vocabulary": (dict, {"vocab_size": 299}, "embed_tokens.weight is (300, 32), not (299, 32)"),
}  # fmt: skip


def changed(folder, weights, config):
    """Return a model's folder with changed weights and config."""
    make_model().save_pretrained(folder)
    save_file(weights(load_file(folder / "model.safetensors")), folder / "model.safetensors", metadata={"format": "pt"})
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, **config}))
    return folder


@pytest.mark.kind(K3)
@pytest.mark.parametrize(("weights", "config", "words"), INPUTS.values(), ids=list(INPUTS))
def test_weights_that_are_not_the_models(tmp_path, capsys, weights, config, words):
    folder = changed(tmp_path / "model", weights, config)
    with pytest.raises(ValueError, match=r"^model: ") as caught:
        load_model(str(folder))
    assert words in str(caught.value) and str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert capsys.readouterr().err.count("LOAD REPORT") == 0  # the sentence says it


@pytest.mark.kind(K3, "F9")
def test_the_command_ends_with_2(tmp_path, capsys):
    folder = changed(tmp_path / "model", without("layers.2.mlp"), {})
    assert main(["generate", f"--model={folder}", "--prompt=x", "--max_new_tokens=2"]) == 2
    assert "error: model: the weights in" in capsys.readouterr().err


FINE = {
    "as saved": dict,
    "without the model's prefix": lambda weights: {name.removeprefix("model."): part for name, part in weights.items()},
    "buffers that models once saved": also(model__layers__0__self_attn__rotary_emb__inv_freq=torch.ones(4)),
    "the tied head too": lambda weights: {**weights, "lm_head.weight": weights["model.embed_tokens.weight"].clone()},
    "a head of values": also(v_head__weight=torch.ones(1, 32)),
}


@pytest.mark.kind(K3)
@pytest.mark.parametrize("weights", FINE.values(), ids=list(FINE))
def test_what_is_the_same_model_loads(tmp_path, weights, caplog):
    folder = changed(tmp_path / "model", weights, {})
    with caplog.at_level(logging.WARNING, "lskip.models.reading.weights_report"), torch.no_grad():
        model, _ = load_model(str(folder))
        assert torch.equal(model(IDS).logits, make_model()(IDS).logits)
    assert ("v_head" in caplog.text) == (weights is FINE["a head of values"])


DAMAGES = {
    "a shard that lacks": lambda folder: sorted(folder.glob("model-*"))[1].unlink(),
    "a shard that is cut": lambda folder: cut(sorted(folder.glob("model-*"))[1]),
    "an index that is none": lambda folder: (folder / "model.safetensors.index.json").write_text("{"),
    "no weights": lambda folder: [path.unlink() for path in folder.glob("model*")],
    "another shard in its place": lambda folder: swap(sorted(folder.glob("model-*"))),
}


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


def swap(shards):
    shards[1].write_bytes(shards[2].read_bytes())


@pytest.mark.kind(K3)
@pytest.mark.parametrize("damage", DAMAGES.values(), ids=list(DAMAGES))
def test_shards(tmp_path, damage):
    make_model().save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("model-*"))) > 3
    damage(tmp_path)
    with pytest.raises((ValueError, OSError), match=r"^model: ") as caught:
        load_model(str(tmp_path))
    assert "\n" not in str(caught.value)


@pytest.mark.kind(K3)
@pytest.mark.parametrize("legacy", [False, True], ids=["safetensors", "a .bin of before torch 1.6"])
def test_what_a_trainer_leaves_beside_the_weights_is_not_read(tmp_path, legacy):
    model = make_model()
    model.save_pretrained(tmp_path)
    torch.save({"arguments": KeyError}, tmp_path / "training_args.bin")  # as transformers' Trainer writes: no weights
    if legacy:
        (tmp_path / "model.safetensors").unlink()
        torch.save(model.state_dict(), tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    with torch.no_grad():
        assert torch.equal(load_model(str(tmp_path))[0](IDS).logits, model(IDS).logits)
