"""Resolution of model names: hints for misspelled ones, and no waiting for a network."""

import json
import math
import time

import pytest

from lskip.models.pretrained import load_config, load_model, load_tokenizer
from tests.conftest import make_model

K18 = "K18 messages that point elsewhere"


@pytest.mark.kind(K18, "F63")
@pytest.mark.parametrize("files", [["tokenizer.json"], ["tokenizer.json", "tokenizer_config.json"]])
def test_a_folder_of_a_tokenizer_alone(tmp_path, tiny_tokenizer, files):
    tiny_tokenizer.save_pretrained(tmp_path / "all")
    (tmp_path / "part").mkdir()
    for name in files:
        (tmp_path / "part" / name).write_bytes((tmp_path / "all" / name).read_bytes())
    loaded = load_tokenizer(str(tmp_path / "part"), "tokenizer")
    assert loaded("def f(x):")["input_ids"] == tiny_tokenizer("def f(x):")["input_ids"]
    with pytest.raises(FileNotFoundError, match=r"^model: in folder .* neither"):
        load_model(str(tmp_path / "part"))


@pytest.mark.kind(K18)
@pytest.mark.parametrize("name", ["empty", "weights", "none.ckpt", "nothing/at/all", "5", "", "a\0b", "~nobody/x y"])
def test_a_tokenizer_that_is_none_names_the_field(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    make_model().save_pretrained(tmp_path / "weights")
    with pytest.raises((ValueError, OSError), match=r"^tokenizer: ") as caught:
        load_tokenizer(name, "tokenizer")
    assert "\n" not in str(caught.value)


@pytest.mark.kind(K18)
@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("smolm2", "smollm2"),
        ("smollm", "smollm2"),
        ("my_modl", "my_model"),
        ("runs/fitt", "runs/fit"),
        ("a.gguff", "a.gguf"),
    ],
)
def test_what_was_meant(tmp_path, monkeypatch, name, meant):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_model").mkdir()
    (tmp_path / "my_model" / "config.json").write_text("{}")
    (tmp_path / "runs" / "fit" / "checkpoints").mkdir(parents=True)
    (tmp_path / "runs" / "fit" / "checkpoints" / "last.ckpt").write_text("")
    (tmp_path / "a.gguf").write_text("")
    with pytest.raises((ValueError, OSError), match=rf"^model: .*did you mean '{meant}'"):
        load_config(name)


@pytest.mark.kind(K18)
@pytest.mark.parametrize("name", ["gpt2", "owner/name", "no_such_model"])
@pytest.mark.parametrize("offline", [True, False])
def test_the_hub_is_asked_once_and_not_for_long(monkeypatch, name, offline):
    import huggingface_hub

    asked = []
    unreachable = type("ConnectError", (Exception,), {"__module__": "httpx2"})  # as the hub's client raises it

    def refuse(self, repo, timeout=None, **_):
        asked.append((repo, timeout))
        raise unreachable("no network")

    if not offline:
        monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", refuse)
    started = time.monotonic()
    with pytest.raises(ValueError, match=rf"^model: '{name}' is not here and not on the hub.*allowed are smollm2"):
        load_config(name)
    assert time.monotonic() - started < 2
    assert asked == ([] if offline else [(name, 5)])


@pytest.mark.kind("K11 generation_config.json")
@pytest.mark.parametrize(
    "text",
    ["nope", "[1]", "5", "", '{"max_new_tokens": -4}', '{"num_return_sequences": 3}', "{" * 5000],
    ids=["B40 no JSON", "list", "number", "empty", "max_new_tokens", "num_return_sequences", "deep"],
)
def test_settings_for_generate_that_are_none_are_not_passed_over(tmp_path, text):
    make_model().save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text(text)
    with pytest.raises(ValueError, match=r"^model: '.*generation_config\.json' is not") as caught:
        load_model(str(tmp_path))
    assert "\n" not in str(caught.value)


NO_SETTINGS = [
    ("temperature", math.nan),
    ("temperature", "hot"),
    ("top_p", "x"),
    ("top_k", []),
    ("top_k", 1.5),
    ("max_new_tokens", math.nan),
    ("eos_token_id", [[0]]),
    ("top_k", 10**400),
    ("temperature", 10**400),
    ("eos_token_id", "x"),
    ("stop_strings", [5]),
    ("do_sample", "yes"),
]


@pytest.mark.kind("K11 generation_config.json")
@pytest.mark.parametrize(("field", "value"), NO_SETTINGS, ids=str)
def test_a_setting_that_no_model_can_mean_is_named(tmp_path, field, value):
    """Also where nothing is generated: a training would end in a model that nobody can use."""
    make_model().save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({field: value}))
    with pytest.raises(ValueError, match=rf"^model: '.*generation_config\.json': {field}: .* is not "):
        load_model(str(tmp_path))


@pytest.mark.kind("K11 generation_config.json")
def test_settings_that_mean_something_elsewhere_are_left_to_whoever_decodes(tmp_path):
    make_model().save_pretrained(tmp_path)
    settings = {"top_k": -1, "temperature": 1, "max_new_tokens": 20, "eos_token_id": [0, 299], "stop_strings": "x"}
    (tmp_path / "generation_config.json").write_text(json.dumps({**settings, "do_sample": None}))
    assert load_model(str(tmp_path))[0].generation_config.top_k == -1
