"""An exported folder is a plain transformers model: the same logits, its exit drafts, and so does its draft."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from safetensors import SafetensorError
from torch.utils.tensorboard import SummaryWriter
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from lskip.cli import main
from lskip.export.model_card import layer_table
from lskip.export.to_hf import export
from lskip.inference import load_generator
from lskip.models.checkpoint import pack_model
from lskip.models.decoder import Decoder
from lskip.models.draft_tokens import keep_draft_tokens
from lskip.models.pretrained import load_model

IDS = torch.tensor([[5, 17, 250, 3, 99, 8]])
GREEDY = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0}


def save(path, model, tokenizer) -> Path:
    """A checkpoint as `lskip fit` writes it."""
    weights = {f"model.{key}": value for key, value in model.state_dict().items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"state_dict": weights, "lskip": pack_model(model, tokenizer)}, path)
    return path


@pytest.fixture
def checkpoint(tmp_path, tiny_model, tiny_tokenizer):
    """(path of a checkpoint of a model that samples by default, the model)."""
    model = tiny_model()
    model.generation_config.do_sample = True
    model.generation_config.temperature = 0.7
    return save(tmp_path / "last.ckpt", model, tiny_tokenizer), model


def load(folder, **arguments):
    return AutoModelForCausalLM.from_pretrained(folder, **arguments).eval()


def blocks_run(model, **settings) -> tuple[list[int], list[int]]:
    """(greedy text, how often each block ran)."""
    counts = [0] * len(model.model.layers)

    def count(index):
        def hook(*_):
            counts[index] += 1

        return hook

    hooks = [layer.register_forward_hook(count(index)) for index, layer in enumerate(model.model.layers)]
    with torch.no_grad():
        text = model.generate(IDS, **GREEDY, **settings)[0].tolist()
    for hook in hooks:
        hook.remove()
    return text, counts


def test_it_loads_without_lskip_and_computes_the_same(tmp_path, checkpoint, tiny_tokenizer):
    path, model = checkpoint
    export(str(path), str(tmp_path / "out"))
    loaded = load(tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    assert loaded.generation_config.temperature == 0.7
    assert loaded.generation_config.assistant_early_exit is None
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer("def f(x):")["input_ids"] == tiny_tokenizer("def f(x):")["input_ids"]
    assert list(tmp_path.glob("out/*.safetensors")) and not list(tmp_path.glob(".*partial"))
    assert not (tmp_path / "out" / "draft").exists() and not list(tmp_path.glob("out/*.gguf"))


def test_generate_drafts_with_an_early_exit(tmp_path, checkpoint):
    path, _ = checkpoint
    export(str(path), str(tmp_path / "out"))
    model = load(tmp_path / "out")
    plain, early = blocks_run(model), blocks_run(model, assistant_early_exit=2)
    assert plain[0] == early[0] and plain[1] == [20] * 4
    assert early[1][1] > 20 >= early[1][2] == early[1][3]


def test_the_exit_layer_does_not_draft_unasked(tmp_path, checkpoint):
    """In generation_config.json transformers' draft would read it too and draft for itself."""
    path, _ = checkpoint
    export(str(path), str(tmp_path / "out"), exit_layer=3, num_speculations=2)
    assert blocks_run(load(tmp_path / "out"))[1] == [20] * 4
    saved = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert (saved.get("assistant_early_exit"), saved["num_assistant_tokens"], saved["temperature"]) == (None, 2, 0.7)


@pytest.mark.parametrize(
    ("family", "overrides"),
    [
        ("llama", {}),
        ("llama", {"tie_word_embeddings": False}),
        ("mistral", {}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1}),
        ("qwen3", {}),
    ],
)
def test_the_draft_is_the_models_exit(tmp_path, tiny_model, tiny_tokenizer, family, overrides):
    model = tiny_model(family, **overrides)
    path = save(tmp_path / "last.ckpt", model, tiny_tokenizer)
    export(str(path), str(tmp_path / "out"), exit_layer=2, num_speculations=3, draft=3)
    full, draft = load(tmp_path / "out"), load(tmp_path / "out" / "draft")
    decoder = Decoder(model)
    with torch.no_grad():
        inputs = decoder.block_inputs(x := decoder.embed(IDS))
        for block in range(3):
            x = decoder.block(block, x, inputs)
        assert torch.equal(draft(IDS).logits, decoder.decode(x))
        assert torch.equal(full(IDS).logits, model(IDS).logits)
    assert draft.config.num_hidden_layers == 3 and draft.config.model_type == family
    assert draft.generation_config.assistant_early_exit is None and draft.generation_config.num_assistant_tokens == 3
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out" / "draft")
    assert tokenizer("def f(x):")["input_ids"] == tiny_tokenizer("def f(x):")["input_ids"]
    drafted = []
    draft.model.norm.register_forward_hook(lambda *_: drafted.append(1))
    plain, counts = blocks_run(full)
    assert counts == [20] * 4 and not drafted
    assert blocks_run(full, assistant_model=draft)[0] == plain and len(drafted) > 10


def test_gguf_files_of_both(tmp_path, checkpoint):
    pytest.importorskip("gguf")
    pytest.importorskip("accelerate")
    path, _ = checkpoint
    export(str(path), str(tmp_path / "out"), draft=2, gguf=True)
    for folder in (tmp_path / "out", tmp_path / "out" / "draft"):
        plain, again = load(folder), load(folder, gguf_file="model.gguf")
        with torch.no_grad():
            assert torch.equal(plain(IDS).logits, again(IDS).logits)
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file="model.gguf")
        assert tokenizer("def f(x):")["input_ids"] == AutoTokenizer.from_pretrained(folder)("def f(x):")["input_ids"]
    # A file of GGUF is exported with the tokenizer that it has.
    export(str(tmp_path / "out" / "model.gguf"), str(tmp_path / "again"), dtype="float16", gguf=True)
    from gguf import GGUFReader

    first, second = (GGUFReader(tmp_path / name / "model.gguf").fields for name in ("out", "again"))
    words = [key for key in first if key.startswith("tokenizer.")]
    assert len(words) > 8 and all(first[key].contents() == second[key].contents() for key in words)
    assert second["general.file_type"].contents() == 1


def test_the_card_says_what_the_run_measured(tmp_path, checkpoint, tiny_tokenizer):
    run = tmp_path / "run"
    save(run / "checkpoints" / "last.ckpt", checkpoint[1], tiny_tokenizer)
    (run / "config.yaml").write_text(yaml.safe_dump({"model": "smollm2"}))
    assert layer_table(run) == []
    for step in (10, 20):  # the later validation counts
        with SummaryWriter(run) as writer:
            for layer in range(1, 5):
                writer.add_scalar(f"val/ppl/layer_{layer:02d}", 10000 / layer / step, step)
                writer.add_scalar(f"val/agreement/layer_{layer:02d}", layer / 4, step)
    assert layer_table(run) == [(1, 500, 0.25), (2, 250, 0.5), (3, pytest.approx(500 / 3), 0.75), (4, 125, 1)]
    for source in (run, run / "checkpoints" / "last.ckpt"):
        output = tmp_path / f"out-{source.name}"
        export(str(source), str(output), exit_layer=3, num_speculations=2, draft=2)
        text = (output / "README.md").read_text()
        assert "\n| 1 | 500 | 0.25 |\n| 2 | 250 | 0.50 |\n| 3 | 166.7 | 0.75 |\n| 4 | 125 | 1.00 |\n" in text
        assert "Recommended: exit_layer 3, num_speculations 2." in text and "4 layers" in text
        assert ModelCard.load(output / "README.md").data.base_model == "HuggingFaceTB/SmolLM2-135M-Instruct"


def test_the_card_invents_nothing(tmp_path, checkpoint):
    path, _ = checkpoint
    export(str(path), str(tmp_path / "out"))
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.base_model is None and "lskip" in card.data.tags
    assert all(word not in card.text for word in ("Layers", "Recommended", "gguf", "draft =", "exit_layer"))


def test_the_cards_code_runs(tmp_path, checkpoint, monkeypatch):
    path, _ = checkpoint
    export(str(path), str(tmp_path / "out"), exit_layer=2, draft=3)
    text = (tmp_path / "out" / "README.md").read_text()
    code = text.split("```python\n")[1].split("```")[0].replace('"…"', '"def f(x):"')
    assert "assistant_model=draft" in code and "assistant_early_exit=2" in code
    monkeypatch.chdir(tmp_path)
    exec(code.replace("=100", "=10"), {})


def test_a_tokenizer_that_transformers_reads_otherwise(tmp_path, tiny_model, tiny_tokenizer, monkeypatch, capsys):
    """AutoTokenizer splits the words of any Qwen2 as Qwen does: this is said, and the card reads it as it is."""
    path = save(tmp_path / "qwen2.ckpt", tiny_model("qwen2"), tiny_tokenizer)
    export(str(path), str(tmp_path / "out"))
    assert "AutoTokenizer reads this tokenizer by the rules of Qwen2Tokenizer" in capsys.readouterr().err
    code = (tmp_path / "out" / "README.md").read_text().split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(tmp_path)
    text, names = "don't SAY 2024", {}
    exec(code.replace('"…"', repr(text)).replace("=100", "=10"), names)
    assert names["inputs"]["input_ids"].tolist() == [tiny_tokenizer(text)["input_ids"]]


def test_a_tokenizer_that_transformers_reads_as_it_is(tmp_path, checkpoint, capsys):
    export(str(checkpoint[0]), str(tmp_path / "out"))
    assert "AutoTokenizer" not in capsys.readouterr().err


def test_dtype(tmp_path, checkpoint):
    path, _ = checkpoint
    export(str(path), str(tmp_path / "out"), dtype="bfloat16", draft=2)
    for folder in ("out", "out/draft"):
        assert load(tmp_path / folder, dtype="auto").dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"exit_layer": 4}, r"^exit_layer: 4 is not from 1 to 3; the model has 4 layers"),
        ({"exit_layer": 0}, r"^exit_layer: 0 is not"),
        ({"draft": 9}, r"^draft: 9 is not"),
        ({"num_speculations": 2}, r"^num_speculations: 2 is given, but neither"),
        ({"num_speculations": 0, "draft": 2}, r"^num_speculations: 0"),
    ],
)
def test_what_is_wrong_is_said_before_the_model_is_loaded(tmp_path, checkpoint, monkeypatch, asked, message):
    monkeypatch.setattr("lskip.export.to_hf.load_model", None)
    with pytest.raises(ValueError, match=message):
        export(str(checkpoint[0]), str(tmp_path / "out"), **asked)
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]


def test_gguf_of_other_models_is_refused(tmp_path, tiny_model, tiny_tokenizer, monkeypatch):
    monkeypatch.setattr("lskip.export.to_hf.load_model", None)
    pytest.importorskip("gguf")
    path = save(tmp_path / "last.ckpt", tiny_model("phi3"), tiny_tokenizer)
    with pytest.raises(ValueError, match=r"^gguf: .*its family is phi3, only llama, qwen2, qwen3 are covered"):
        export(str(path), str(tmp_path / "out"), gguf=True)
    path = save(tmp_path / "last.ckpt", tiny_model(), None)
    with pytest.raises(ValueError, match="has no tokenizer"):
        export(str(path), str(tmp_path / "out"), gguf=True)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install gguf"):
        export(str(path), str(tmp_path / "out"), gguf=True)


def test_an_early_exit_of_the_source_stays_with_the_model(tmp_path, checkpoint):
    path, _ = checkpoint
    export(str(path), str(tmp_path / "first"))
    settings = GenerationConfig.from_pretrained(tmp_path / "first")
    settings.assistant_early_exit = 3
    settings.save_pretrained(tmp_path / "first")
    export(str(tmp_path / "first"), str(tmp_path / "second"), draft=2)
    assert load(tmp_path / "second").generation_config.assistant_early_exit == 3
    assert load(tmp_path / "second" / "draft").generation_config.assistant_early_exit is None


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


# What must not cost a trained model its export.


SETTINGS = {
    "F36 base model": {"temperature": 0.7, "top_p": 0.9},
    "greedy with a temperature": {"do_sample": False, "temperature": 0.7},
    "beams": {"num_beams": 1, "early_stopping": True},
    "top_k of vLLM": {"top_k": -1},
    "length_penalty": {"length_penalty": 2.0},
    "pad_token_id": {"pad_token_id": -1},
}


@pytest.mark.kind("K11 generation_config.json")
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=list(SETTINGS))
def test_settings_that_a_model_came_with_are_exported_again(tmp_path, tiny_model, tiny_tokenizer, settings):
    tiny_model().save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "generation_config.json").write_text(json.dumps(settings))
    loaded, _ = load_model(str(tmp_path / "base"))
    path = save(tmp_path / "run" / "last.ckpt", loaded, tiny_tokenizer)
    for source, name in ((path, "of_run"), (tmp_path / "base", "of_folder")):
        export(str(source), str(tmp_path / name), exit_layer=2)
        written = json.loads((tmp_path / name / "generation_config.json").read_text())
        assert written.items() >= settings.items() and written["num_assistant_tokens"] == 4
    again = load_model(str(tmp_path / "of_run"))[0].generation_config.to_dict()
    assert again == load_model(str(tmp_path / "of_folder"))[0].generation_config.to_dict()


SAVE = "transformers.modeling_utils.PreTrainedModel.save_pretrained"
FULL = OSError(28, "No space left on device")


@pytest.mark.kind("B11 B27 full disks, and places that cannot be written")
@pytest.mark.parametrize(
    ("place", "error"),
    [
        (SAVE, SafetensorError("I/O error: No space left on device")),
        (SAVE, FULL),
        ("transformers.PreTrainedTokenizerBase.save_pretrained", FULL),
        ("lskip.export.to_gguf.write_gguf", FULL),
        ("lskip.export.to_hf.os.replace", FULL),
        ("pathlib.Path.write_text", FULL),
    ],
    ids=["B27 safetensors", "weights", "tokenizer", "gguf", "last step", "model card"],
)
def test_a_full_disk_is_one_sentence_and_leaves_nothing(tmp_path, checkpoint, monkeypatch, capsys, place, error):
    path, _ = checkpoint
    (tmp_path / "here").mkdir()

    def fail(*_, **__):
        raise error

    monkeypatch.setattr(place, fail)
    status = main(["export", f"--model={path}", f"--output={tmp_path / 'here' / 'out'}", "--gguf=true"])
    monkeypatch.undo()
    sentence = capsys.readouterr().err.strip().rpartition("\n")[2]
    assert status == 2 and sentence.startswith("lskip export: error: output: could not write")
    assert "No space left on device" in sentence
    assert not list((tmp_path / "here").iterdir())


@pytest.mark.kind("B11 B27 full disks, and places that cannot be written")
@pytest.mark.parametrize("kind", ["read-only", "file", "link", "full folder"])
def test_the_place_is_tried_before_the_model_is_read(tmp_path, monkeypatch, kind):
    monkeypatch.setattr("lskip.export.to_hf.load_config", lambda *_: pytest.fail("the model was read first"))
    out = tmp_path / "out"
    if kind == "read-only":
        monkeypatch.setattr(
            "lskip.export.to_hf.TemporaryFile", lambda **_: (_ for _ in ()).throw(OSError(30, "Read-only"))
        )
    elif kind == "file":
        out.write_text("")
    elif kind == "link":
        out.symlink_to(tmp_path / "nowhere")
    else:
        (out / "more").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"^output: .*out'"):
        export("smollm2", str(out))


def test_it_says_what_it_wrote(tmp_path, checkpoint, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    export(str(checkpoint[0]), "mine")
    line = capsys.readouterr().out
    assert line.count("\n") == 1 and f"lskip generate --model {tmp_path / 'mine'}" in line and " MB" in line


@pytest.mark.kind("B34 names and words of strangers")
def test_a_folder_with_escapes_in_its_name_moves_no_cursor(tmp_path, checkpoint, capsys):
    export(str(checkpoint[0]), str(tmp_path / "d\x1b[2Je"))
    printed = capsys.readouterr().out
    assert "\x1b" not in printed and "d\\x1b[2Je" in printed


def test_the_tokens_of_drafts_go_along(tmp_path, checkpoint):
    """Kept beside the checkpoint, they are what drafts of the exported folder choose among."""
    keep_draft_tokens(tmp_path, [7, 5])
    export(str(checkpoint[0]), str(tmp_path / "exported"))
    assert load_generator(str(tmp_path / "exported")).draft_head.token_ids.tolist() == [0, 5, 7]  # 0 ends a text
