"""An exported folder is a plain transformers model: the same logits, and `generate` drafts with its early exit."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lskip.checkpoint import pack_model
from lskip.export import export

IDS = torch.tensor([[5, 17, 250, 3, 99, 8]])


@pytest.fixture
def checkpoint(tmp_path, tiny_model, tiny_tokenizer):
    """(path of a checkpoint of a model that samples by default, the model)."""
    model = tiny_model()
    model.generation_config.do_sample = True
    model.generation_config.temperature = 0.7
    weights = {f"model.{key}": value for key, value in model.state_dict().items()}
    path = tmp_path / "last.ckpt"
    torch.save({"state_dict": weights, "lskip": pack_model(model, tiny_tokenizer)}, path)
    return path, model


def test_it_loads_without_lskip_and_computes_the_same(tmp_path, checkpoint, tiny_tokenizer):
    path, model = checkpoint
    export(str(path), str(tmp_path / "out"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    assert loaded.generation_config.temperature == 0.7
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer("def f(x):")["input_ids"] == tiny_tokenizer("def f(x):")["input_ids"]
    assert list(tmp_path.glob("out/*.safetensors")) and not list(tmp_path.glob(".*partial"))


def test_generate_drafts_with_an_early_exit(tmp_path, checkpoint):
    path, _ = checkpoint
    export(str(path), str(tmp_path / "out"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    greedy = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0}
    with torch.no_grad():
        plain = model.generate(IDS, **greedy)
        early = model.generate(IDS, assistant_early_exit=2, **greedy)
    assert torch.equal(plain, early)


def test_dtype(tmp_path, checkpoint):
    path, _ = checkpoint
    export(str(path), str(tmp_path / "out"), dtype="bfloat16")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").dtype == torch.bfloat16


def test_it_replaces_nothing(tmp_path, checkpoint):
    path, _ = checkpoint
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    for output in ("full", "full/notes.txt"):
        with pytest.raises(ValueError, match=r"output: .* exists"):
            export(str(path), str(tmp_path / output))
    assert (tmp_path / "full" / "notes.txt").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    export(str(path), str(tmp_path / "empty"))
    assert (tmp_path / "empty" / "config.json").is_file()


def test_a_failed_export_leaves_nothing(tmp_path):
    with pytest.raises(FileNotFoundError):
        export(str(tmp_path / "missing.ckpt"), str(tmp_path / "out"))
    assert list(tmp_path.iterdir()) == []
