"""Checkpoint files: complete tokenizers, detection of damage, and refusal of other files."""

import json
import random

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from lskip.cli import main
from lskip.export.to_hf import export
from lskip.models.checkpoint import pack_model, read_checkpoint, unpack_tokenizer
from lskip.models.pretrained import load_config, load_model, load_tokenizer
from tests.conftest import make_config, make_model
from tests.export.test_to_hf import save

K5 = "K5 tokenizers of more than plain files"
B36 = "B36 damaged and foreign checkpoints"
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
TEMPLATES = {
    "F15 default and tool_use": {"default": TEMPLATE, "tool_use": TEMPLATE + "tools", "rag": TEMPLATE + "documents"},
    "one of a name": {"only": TEMPLATE},
    "plain": TEMPLATE,
    "none": None,
    "with characters": {"default": TEMPLATE + "é🙂", "a b": TEMPLATE},
}


def with_template(tokenizer, template) -> PreTrainedTokenizerFast:
    fresh = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<|endoftext|>")
    fresh.chat_template = template
    return fresh


@pytest.mark.kind(K5)
@pytest.mark.parametrize("template", TEMPLATES.values(), ids=list(TEMPLATES))
def test_all_chat_templates_come_back(tmp_path, tiny_tokenizer, template):
    path = save(tmp_path / "a.ckpt", make_model(), with_template(tiny_tokenizer, template))
    _, loaded = load_model(str(path))
    assert loaded.chat_template == template == load_tokenizer(str(path)).chat_template
    export(str(path), str(tmp_path / "out"))
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == template


@pytest.mark.kind(K5, "F15")
def test_a_run_with_several_chat_templates_saves_and_loads(tmp_path, tiny_tokenizer):
    make_model().save_pretrained(tmp_path / "model")
    with_template(tiny_tokenizer, TEMPLATES["F15 default and tool_use"]).save_pretrained(tmp_path / "model")
    texts = [json.dumps({"text": f"def f{i}(x):\n    return x + {i}\n" * 4}) for i in range(40)]
    (tmp_path / "data.jsonl").write_text("\n".join(texts))
    flags = [
        *("fit", f"--model={tmp_path / 'model'}", f"--data.source={tmp_path / 'data.jsonl'}", "--data.block_size=16"),
        *(f"--data.cache_dir={tmp_path / 'cache'}", f"--run_folder={tmp_path / 'run'}", "--trainer.max_steps=2"),
        *("--data.batch_size=2", "--trainer.limit_val_batches=0", "--trainer.accelerator=cpu"),
        *("--trainer.logger=false", "--trainer.enable_progress_bar=false", "--checkpoint.every_n_train_steps=1"),
    ]
    assert main(flags) == 0
    assert load_tokenizer(str(tmp_path / "run")).chat_template == TEMPLATES["F15 default and tool_use"]


@pytest.mark.kind(K5)
@pytest.mark.parametrize(
    ("name", "content"),
    [("vocab.model", b"\x00\xff\xfe" * 5), ("deep/er/notes.txt", b"text"), ("empty", b""), ("crlf.txt", b"a\r\nb\r")],
    ids=["binary", "in folders", "empty", "line ends"],
)
def test_every_file_of_a_tokenizer_is_kept_byte_by_byte(tmp_path, tiny_tokenizer, monkeypatch, name, content):
    tokenizer = with_template(tiny_tokenizer, None)
    original = tokenizer.save_pretrained

    def save_more(folder):
        original(folder)
        path = tmp_path.__class__(folder) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)

    monkeypatch.setattr(tokenizer, "save_pretrained", save_more)
    torch.save(pack_model(make_model(), tokenizer), tmp_path / "a.pt")
    files = torch.load(tmp_path / "a.pt", weights_only=True)["tokenizer"]
    unpack_tokenizer(files, tmp_path / "out")
    assert (tmp_path / "out" / name).read_bytes() == content


@pytest.mark.kind(B36, "B36")
def test_garbled_bytes_are_found(tmp_path, tiny_tokenizer):
    """A file with 8 changed bytes anywhere is refused, unless they lie between its parts."""
    path = save(tmp_path / "a.ckpt", make_model(), tiny_tokenizer)
    saved, data = torch.load(path, weights_only=True), path.read_bytes()
    places, refused = random.Random(0), 0
    for _ in range(60):
        place = places.randrange(len(data) - 8)
        path.write_bytes(data[:place] + bytes(byte ^ 0x5A for byte in data[place : place + 8]) + data[place + 8 :])
        try:
            model, _ = load_model(str(path))
        except ValueError as error:
            assert str(error).startswith("model: ") and "a.ckpt" in str(error)
            refused += 1
        else:
            weights = model.state_dict()
            assert all(
                torch.equal(part, weights[name.removeprefix("model.")]) for name, part in saved["state_dict"].items()
            )
    assert refused > 50


@pytest.mark.kind(B36)
@pytest.mark.parametrize("part", ["state_dict", "optimizer"])
def test_who_goes_on_with_a_run_has_all_of_it_checked(tmp_path, part):
    path = tmp_path / "a.ckpt"
    tensors = {"state_dict": {"x": torch.arange(5000.0)}, "optimizer": [{"m": torch.arange(5000.0) + 0.5}]}
    torch.save({**tensors, "lskip": {"config": {}}}, path)
    read_checkpoint(path, whole=True)
    data = path.read_bytes()
    place = data.index((torch.arange(5000.0) + (0.5 if part == "optimizer" else 0))[2000:2010].numpy().tobytes())
    path.write_bytes(data[:place] + bytes(8) + data[place + 8 :])
    with pytest.raises(ValueError, match=rf"^ckpt_path: .*a\.ckpt' is damaged \({part}"):
        read_checkpoint(path, "ckpt_path", whole=True)


def torch_file(**entries):
    return lambda path: torch.save(entries, path)


def broken_tokenizer(**files):
    def write(path):
        checkpoint = torch.load(save(path, make_model(), None))
        checkpoint["lskip"]["tokenizer"] = files
        torch.save(checkpoint, path)

    return write


FILES = {
    "B41 empty": (lambda path: path.write_bytes(b""), "it is empty"),
    "B41 broken tokenizer": (broken_tokenizer(**{"tokenizer.json": "{nope"}), "the tokenizer in"),
    "text": (lambda path: path.write_text("nope"), "not a readable checkpoint"),
    "no zip file": (lambda path: path.write_bytes(b"PK\x03\x04 nope"), "not a readable checkpoint"),
    "a list": (lambda path: torch.save([1], path), "no entry 'lskip'"),
    "of another program": (torch_file(state_dict={}), "no entry 'lskip'"),
    "lskip is no mapping": (torch_file(lskip=5, state_dict={}), "'lskip' is no mapping"),
    "no weights": (torch_file(lskip={"config": {}}), "'state_dict' is no mapping"),
    "weights of a text": (torch_file(lskip={"config": {}}, state_dict={"model.x": "y"}), "'model.x' is no weight"),
    "weights of no name": (torch_file(lskip={"config": {}}, state_dict={5: torch.ones(1)}), "5 is no weight"),
    "no config": (torch_file(lskip={}, state_dict={}), "'config' is no mapping"),
    "config without a family": (torch_file(lskip={"config": {}}, state_dict={}), "the family None"),
    "no file": (lambda path: None, "there is no file"),
    "tokenizer of numbers": (broken_tokenizer(**{"tokenizer.json": 5}), "is no file of a tokenizer"),
    "tokenizer without vocabulary": (broken_tokenizer(**{"tokenizer_config.json": "{}"}), "the tokenizer in"),
}


@pytest.mark.kind(B36)
@pytest.mark.parametrize(("write", "words"), FILES.values(), ids=list(FILES))
def test_a_file_that_is_no_checkpoint(tmp_path, write, words):
    path = tmp_path / "a.ckpt"
    write(path)
    loads = [load_model] if words.startswith(("the", "is no")) else [load_model, load_config, load_tokenizer]
    for load in loads:
        with pytest.raises((ValueError, OSError), match=r"^model: ") as caught:
            load(str(path))
        text = str(caught.value)
        assert words in text and "\n" not in text and ("a.ckpt" in text or "family" in text)


@pytest.mark.kind(B36)
@pytest.mark.parametrize(
    "settings", [5, {"max_new_tokens": -4}, {"temperature": "hot"}, {"cache_implementation": "nope"}]
)
def test_settings_in_a_checkpoint_that_are_none(tmp_path, settings):
    path = save(tmp_path / "a.ckpt", make_model(), None)
    checkpoint = torch.load(path)
    checkpoint["lskip"]["generation_config"] = settings
    torch.save(checkpoint, path)
    with pytest.raises(ValueError, match=r"^model: .*a\.ckpt': generation_config"):
        load_model(str(path))


def test_a_checkpoint_from_before_loads(tmp_path, tiny_tokenizer):
    """Flat names of files, no settings for generate, embedding and head under both of their names."""
    path = save(tmp_path / "a.ckpt", make_model(), tiny_tokenizer)
    checkpoint = torch.load(path)
    del checkpoint["lskip"]["generation_config"]
    torch.save(checkpoint, path)
    model, tokenizer = load_model(str(path))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert tokenizer("def")["input_ids"] == tiny_tokenizer("def")["input_ids"]
    assert {"model.lm_head.weight", "model.model.embed_tokens.weight"} <= checkpoint["state_dict"].keys()
    assert make_config()["tie_word_embeddings"]
