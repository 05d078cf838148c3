"""Code that comes with a model never runs, whatever stdin answers; a tokenizer that panics is one sentence."""

import io
import json
import shutil

import pytest
import torch

from lskip.cli import main
from lskip.models.pretrained import load_model, load_tokenizer
from tests.conftest import make_config, make_model
from tests.export.test_to_hf import save

B3 = "B3 code that comes with a model"
EVIL = "import pathlib\n\npathlib.Path({mark!r}).touch()\n\n\nclass Evil:\n    pass\n"


@pytest.fixture
def evil(tmp_path, tiny_tokenizer, monkeypatch):
    """Return a model's folder with evil.py, a function (file, **entries) that adds to JSON, and the mark of evil.py."""
    folder, mark = tmp_path / "model", tmp_path / "ran"
    make_model().save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    for name in ("evil.py", "custom_generate/generate.py"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(EVIL.format(mark=str(mark)))
    # A home of its own, where transformers would copy the code to.
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))

    def name_it(file, **entries):
        values = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps({**values, **entries}))

    return folder, name_it, mark


TOKENIZER = {
    "tokenizer_class": "Evil",
    "auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]},
}
CODE = {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil", "AutoTokenizer": ["evil.Evil", "evil.Evil"]}
INPUTS = {
    "B3 tokenizer": ("tokenizer_config.json", TOKENIZER),
    "B3 unknown family": ("config.json", {"model_type": "evil", "auto_map": CODE}),
    "known tokenizer class": ("tokenizer_config.json", {**TOKENIZER, "tokenizer_class": "PreTrainedTokenizerFast"}),
    "known family": ("config.json", {"auto_map": CODE}),
    "another's code": ("tokenizer_config.json", {**TOKENIZER, "auto_map": {"AutoTokenizer": ["a/b--evil.Evil", None]}}),
    "legacy list": ("tokenizer_config.json", {**TOKENIZER, "auto_map": ["evil.Evil", "evil.Evil"]}),
    "own generate": ("generation_config.json", {"custom_generate": "custom_generate"}),
    "kernel of the hub": ("config.json", {"attn_implementation": "evil/kernel"}),
}
ASK = ("--prompt=x", "--max_new_tokens=2")
TASK = ("--task=LocalTask", "--task.path={place}/tasks.jsonl")
FIT = (
    "fit",
    "--data.source={place}/data.jsonl",
    "--run_folder={place}/run",
    "--trainer.max_steps=1",
    "--data.block_size=16",
)
WAYS = {
    "generate": ("generate", *ASK),
    "predict": ("predict", "--prompts={place}/prompts.txt", "--output={place}/out.jsonl", "--max_new_tokens=2"),
    "sweep": ("sweep", *TASK, "--output={place}/sweep", "--device=cpu"),
    "inspect": ("inspect", "--data={place}/data.jsonl", "--output={place}/inspect", "--block_size=16"),
    "export": ("export", "--output={place}/exported"),
    "tune": ("tune", *TASK, "--drafts=[layers]", "--exit_layers=[2]", "--num_speculations=[2]"),
    "fit": FIT,
    "data.tokenizer": (*FIT, "--model=" + json.dumps(make_config()), "--data.tokenizer={place}/model"),
    "adapt": ("adapt", "--exit_layer=2", "--prompts={place}/prompts.txt", "--output={place}/adapt"),
}


@pytest.mark.kind(B3)
@pytest.mark.parametrize(("file", "entries"), INPUTS.values(), ids=list(INPUTS))
def test_nothing_is_run_and_nobody_is_asked(evil, monkeypatch, file, entries):
    folder, name_it, mark = evil
    name_it(file, **entries)
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("somebody was asked"))
    for load in (load_model, load_tokenizer):
        try:
            load(str(folder))
        except (ValueError, OSError) as error:
            assert str(error).startswith("model: ") and "\n" not in str(error)
    assert not mark.exists()


@pytest.mark.kind(B3)
@pytest.mark.parametrize("way", list(WAYS), ids=[f"B3 {way}" for way in WAYS])
def test_every_command_leaves_it_alone(evil, tmp_path, monkeypatch, capsys, way):
    folder, name_it, mark = evil
    name_it("tokenizer_config.json", **TOKENIZER)
    (tmp_path / "prompts.txt").write_text("".join(f"def f{i}\n" for i in range(200)))  # enough for adapt
    (tmp_path / "tasks.jsonl").write_text('{"prompt": "def f", "reference": "x"}\n')
    (tmp_path / "data.jsonl").write_text('{"text": "def f(x): return x"}\n')
    monkeypatch.setattr("sys.stdin", io.StringIO("y\ny\ny\n"))
    name, *options = WAYS[way]
    options = [f"--model={folder}", *options]
    status = main([name, *(option.replace("{place}", str(tmp_path)) for option in options)])
    errors = capsys.readouterr().err
    assert not mark.exists() and "Traceback" not in errors
    sentence = errors.strip().rpartition("\n")[2]
    assert status == 2 and ": error: " in sentence and f"the tokenizer in '{folder}'" in sentence


@pytest.mark.kind(B3, "B3")
def test_a_checkpoint_that_brings_code(evil, tmp_path, tiny_tokenizer, monkeypatch):
    _, _, mark = evil
    path = save(tmp_path / "a.ckpt", make_model(), tiny_tokenizer)
    checkpoint = torch.load(path)
    files = checkpoint["lskip"]["tokenizer"]
    files["evil.py"] = EVIL.format(mark=str(mark))
    files["tokenizer_config.json"] = json.dumps({**json.loads(files["tokenizer_config.json"]), **TOKENIZER})
    checkpoint["lskip"]["config"]["auto_map"] = CODE
    torch.save(checkpoint, path)
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("somebody was asked"))
    with pytest.raises(ValueError, match=r"^model: the tokenizer in .*a\.ckpt"):
        load_model(str(path))
    assert not mark.exists()


@pytest.mark.kind(B3)
@pytest.mark.parametrize("name", ["../out.json", "/tmp/out.json", "a/../../out.json", "", 5])
def test_a_checkpoint_writes_its_tokenizer_nowhere_else(tmp_path, tiny_tokenizer, name):
    path = save(tmp_path / "a.ckpt", make_model(), tiny_tokenizer)
    checkpoint = torch.load(path)
    checkpoint["lskip"]["tokenizer"][name] = "{}"
    torch.save(checkpoint, path)
    with pytest.raises(ValueError, match="is no file of a tokenizer"):
        load_model(str(path))
    assert not (tmp_path / "out.json").exists()


def test_an_adapter_of_peft_is_refused(evil):
    folder, _, _ = evil
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "a/b", "peft_type": "LORA"}))
    with pytest.raises(ValueError, match="adapter of peft"):
        load_model(str(folder))
    (folder / "config.json").unlink()
    shutil.rmtree(folder / "custom_generate")
    with pytest.raises(ValueError, match="adapter of peft"):
        load_model(str(folder))


@pytest.mark.kind("B38 templates and tokenizers that do not end", "B38")
def test_what_tokenizers_panics_with_is_one_sentence(tmp_path, tiny_tokenizer):
    class PanicException(BaseException):  # pyo3's: what Rust panics with is no Exception
        pass

    from lskip.utils.foreign import foreign

    with pytest.raises(ValueError, match=r"^model: 'x' could not be read \(unreachable"), foreign("model: 'x'"):
        raise PanicException("unreachable")
    with pytest.raises(KeyboardInterrupt), foreign("model: 'x'"):
        raise KeyboardInterrupt


BOMBS = {
    "no JSON": "{",
    "deep": '{"a":' * 100_000,
    "regular expression that is none": {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "("}}},
    "unknown kind": {"model": {"type": "Evil"}},
    "no model": {"model": None},
    "merges of nothing": {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["x y"]}},
}


@pytest.mark.kind("B38 templates and tokenizers that do not end")
@pytest.mark.parametrize("content", BOMBS.values(), ids=list(BOMBS))
def test_a_tokenizer_that_cannot_be_read_is_one_sentence(evil, content):
    folder, name_it, _ = evil
    if isinstance(content, str):
        (folder / "tokenizer.json").write_text(content)
    else:
        name_it("tokenizer.json", **content)
    with pytest.raises(ValueError, match=r"^tokenizer: the tokenizer in .* could not be read") as caught:
        load_tokenizer(str(folder), "tokenizer")
    assert "\n" not in str(caught.value)
