"""Settings of a tuned task: the file that keeps them, and the user's own, which go before them."""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from lskip.cli import main
from lskip.evaluation.sweep import tuned
from lskip.evaluation.sweep.tuned import read_tuned, save_tuned, tuned_options, tuned_path
from lskip.inference import CriterionDraft, Entropy, FixedDraft, Margin
from lskip.inference import options as command_options
from lskip.inference.options import DecodingOptions, LoadingOptions
from tests.conftest import make_model

ON_CPU = {"speedup": 1.2, "device": "cpu"}
LAYERS = {"exit_layer": 2, "num_speculations": 4, "draft": "layers", "draft_weights": None, "exit_adapter": None}
WEIGHTS = {"exit_layer": None, "num_speculations": 5, "draft": "weights", "draft_weights": "int4", "exit_adapter": None}
NOTHING = {"exit_layer": None, "num_speculations": 0, "draft": None, "draft_weights": None, "exit_adapter": None}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_tokenizer) -> Path:
    folder = tmp_path_factory.mktemp("tuned") / "model"
    make_model().save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    for task, found in {"code": LAYERS, "chat": WEIGHTS, "prose": NOTHING}.items():
        save_tuned(folder / "tuned.json", task, found | ON_CPU)
    return folder


def options_of(folder: Path, task: str | None, loading: dict | None = None, **decoding) -> dict:
    """Return all options that a task may set, after it has."""
    loading = {"device": "cpu", **(loading or {})}
    both = tuned_options(task, DecodingOptions(**decoding), LoadingOptions(model=str(folder), **loading))
    return {name: getattr(options, name) for options in both for name in LAYERS if hasattr(options, name)}


def test_a_task_fills_what_is_left_open(folder):
    assert options_of(folder, "code") == LAYERS
    assert options_of(folder, "chat") == WEIGHTS
    assert options_of(folder, "prose") == NOTHING
    assert options_of(folder, None) == NOTHING | {"num_speculations": None}


def test_the_users_values_win(folder):
    assert options_of(folder, "code", exit_layer=3) == LAYERS | {"exit_layer": 3}
    assert options_of(folder, "code", num_speculations=7) == LAYERS | {"num_speculations": 7}
    assert options_of(folder, "chat", draft="weights", num_speculations=2) == WEIGHTS | {"num_speculations": 2}


def test_a_user_who_drafts_otherwise_or_not_at_all_gets_no_draft_of_the_task(folder):
    nothing = dict.fromkeys(LAYERS)
    assert options_of(folder, "code", num_speculations=0) == NOTHING
    assert options_of(folder, "code", exit_criterion=Margin(0.5)) == nothing
    assert options_of(folder, "code", draft="ngram") == nothing | {"draft": "ngram", "num_speculations": 4}
    for task in ("code", "prose"):  # how much a fixed draft may draft, if at all, is no bound on what pays
        assert options_of(folder, task, draft="auto") == nothing | {"draft": "auto"}
    rounded = {"draft_weights": "int8"}
    assert options_of(folder, "chat", rounded) == nothing | rounded | {"num_speculations": 5}


def test_a_criterion_is_used_at_its_own_exit_alone_and_not_in_place_of_the_users_policy(folder, tmp_path, monkeypatch):
    path = tmp_path / "tuned.json"
    monkeypatch.setattr("lskip.evaluation.sweep.tuned.tuned_path", lambda model: path)
    save_tuned(path, "sure", LAYERS | ON_CPU | {"criterion": {"name": "Entropy", "threshold": 0.3}})

    def policy(**decoding):
        loading = LoadingOptions(model=str(folder), device="cpu")
        return tuned_options("sure", DecodingOptions(**decoding), loading)[0].draft_policy

    found = policy()
    assert isinstance(found, CriterionDraft) and isinstance(found.criterion, Entropy)
    assert found.criterion.threshold == 0.3
    assert policy(exit_layer=3) is None and policy(draft="ngram") is None and policy(num_speculations=0) is None
    mine = FixedDraft()
    assert policy(draft_policy=mine) is mine


def test_a_task_that_drafts_in_what_the_weights_are_is_told(tmp_path, folder):
    shutil.copytree(folder, tmp_path / "model")
    save_tuned(tmp_path / "model" / "tuned.json", "code", LAYERS | ON_CPU | {"draft_weights": "int8"})
    with pytest.raises(ValueError, match=r"task: 'code' drafts in 'int8', which weights are already; tune it with --w"):
        options_of(tmp_path / "model", "code", {"weights": "int8"})
    assert options_of(tmp_path / "model", "code", {"weights": "int8"}, num_speculations=0) == NOTHING
    assert options_of(tmp_path / "model", "chat", {"weights": "int8"}) == WEIGHTS


def test_what_was_found_on_another_kind_of_device_is_not_used(folder):
    with pytest.raises(ValueError, match="task: 'chat' was tuned on 'cpu', not on 'meta'; tune it there"):
        options_of(folder, "chat", {"device": "meta"})


def test_tokens_of_drafts_are_the_tasks_unless_the_user_names_others(folder, tmp_path):
    """Files of before name none; a user who drafts otherwise, or names `all`, does not get the task's."""
    folder, kept = Path(shutil.copytree(folder, tmp_path / "model")), tmp_path / "tokens.json"
    kept.write_text("[1, 2]")
    save_tuned(folder / "tuned.json", "few", LAYERS | ON_CPU | {"draft_tokens": str(kept)})

    def tokens(task: str, named: str | None = None, **decoding) -> str | None:
        loading = LoadingOptions(model=str(folder), device="cpu", draft_tokens=named)
        return tuned_options(task, DecodingOptions(**decoding), loading)[1].draft_tokens

    assert [tokens("few"), tokens("few", "all"), tokens("few", draft="ngram")] == [str(kept), "all", None]
    assert tokens("code") is None
    kept.unlink()
    with pytest.raises(FileNotFoundError, match=r"task: 'few' was tuned with draft_tokens '.*', and there is no"):
        tokens("few")


def test_generate_goes_by_it(folder, capsys, monkeypatch):
    base = ["generate", "--prompt=def f", f"--model={folder}", "--max_new_tokens=20"]
    monkeypatch.setenv("LSKIP_TRACEBACK", "1")
    assert main([*base, "--exit_layer=2", "--num_speculations=4", "--draft=layers"]) == 0
    named = capsys.readouterr()
    assert main([*base, "--task=code"]) == 0
    tuned_run = capsys.readouterr()
    assert tuned_run.out == named.out
    assert counts_in(tuned_run.err) == counts_in(named.err) and "acceptance_rate" in tuned_run.err
    assert main([*base, "--task=code", "--num_speculations=0"]) == 0
    assert "acceptance_rate" not in capsys.readouterr().err


def counts_in(summary: str) -> str:
    return summary[summary.index("acceptance_rate") :]


def test_predict_goes_by_it_too(folder, tmp_path, monkeypatch):
    asked = {}
    monkeypatch.setattr(command_options, "load_generator", lambda **options: asked.update(options) or 1 / 0)
    (tmp_path / "prompts.txt").write_text("def f\nclass A\nimport\n")
    paths = [f"--prompts={tmp_path}/prompts.txt", f"--output={tmp_path}/out.jsonl"]
    with pytest.raises(ZeroDivisionError):
        main(["predict", *paths, f"--model={folder}", "--task=chat"])
    assert (asked["draft_weights"], asked["batch_size"]) == ("int4", 3)  # there are no more prompts


def test_an_unknown_task_is_told_those_there_are(folder, capsys):
    assert main(["generate", "--prompt=x", f"--model={folder}", "--task=poems"]) == 2
    assert f"task: 'poems' is not tuned for {folder} (tuned are code, chat, prose)" in capsys.readouterr().err


def test_where_tuned_tasks_are_kept(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(tuned, "CACHE", str(tmp_path / "cache"))
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "checkpoints" / "last.ckpt").touch()
    (tmp_path / "m.gguf").touch()
    assert tuned_path(str(folder)) == folder / "tuned.json"
    assert tuned_path(str(tmp_path / "run")) == tmp_path / "run" / "checkpoints" / "last.tuned.json"
    assert tuned_path(str(tmp_path / "m.gguf")) == tmp_path / "m.tuned.json"
    assert tuned_path("owner/name") == tmp_path / "cache" / "owner--name.json"


def test_saving_keeps_the_other_tasks(tmp_path):
    path = tmp_path / "new" / "tuned.json"
    assert read_tuned(path) == {}
    save_tuned(path, "a", LAYERS | ON_CPU)
    save_tuned(path, "b", WEIGHTS | ON_CPU)
    save_tuned(path, "a", NOTHING | ON_CPU)
    assert read_tuned(path) == {"a": NOTHING | ON_CPU, "b": WEIGHTS | ON_CPU}
    assert [each.name for each in path.parent.iterdir()] == ["tuned.json"]


DAMAGED = {
    "B18 cut": "{",
    "a list": "[]",
    "a number for a task": '{"a": 5}',
    "a task without its fields": json.dumps({"a": {"exit_layer": 3}}),
    "NaN": json.dumps({"a": LAYERS | ON_CPU | {"exit_layer": float("nan")}}),
    "a negative number": json.dumps({"a": LAYERS | ON_CPU | {"num_speculations": -1}}),
    "a text for a number": json.dumps({"a": LAYERS | ON_CPU | {"num_speculations": "4"}}),
    "null": json.dumps({"a": LAYERS | ON_CPU | {"num_speculations": None}}),
    "a draft that is a number": json.dumps({"a": LAYERS | ON_CPU | {"draft": 5}}),
    "weights that are a number": json.dumps({"a": WEIGHTS | ON_CPU | {"draft_weights": 8}}),
    "an adapter that is a list": json.dumps({"a": LAYERS | ON_CPU | {"exit_adapter": ["x"]}}),
    "an adapter's draft without one": json.dumps({"a": LAYERS | ON_CPU | {"draft": "adapter"}}),
    "a draft of weights without any": json.dumps({"a": WEIGHTS | ON_CPU | {"draft_weights": None}}),
    "a criterion that is a text": json.dumps({"a": LAYERS | ON_CPU | {"criterion": "Entropy"}}),
    "a criterion that is not known": json.dumps(
        {"a": LAYERS | ON_CPU | {"criterion": {"name": "X", "threshold": 0.5}}}
    ),
    "a threshold of 7": json.dumps({"a": LAYERS | ON_CPU | {"criterion": {"name": "Entropy", "threshold": 7}}}),
    "a criterion without a threshold": json.dumps({"a": LAYERS | ON_CPU | {"criterion": {"name": "Entropy"}}}),
    "5000 digits": '{"a": ' + "9" * 5000 + "}",
    "garbage": b"\x80\x02\xff",
}


@pytest.mark.kind("B18 damaged caches and files")
@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_a_file_of_something_else_is_told(tmp_path, content):
    (tmp_path / "tuned.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=r"task: '.*tuned.json' .*remove it, and tune again"):
        read_tuned(tmp_path / "tuned.json")


def test_a_task_tuned_with_weights_that_are_gone_is_told_when_it_is_asked_for(tmp_path, monkeypatch):
    path = tmp_path / "tuned.json"
    monkeypatch.setattr("lskip.evaluation.sweep.tuned.tuned_path", lambda model: path)
    old = WEIGHTS | ON_CPU | {"draft_weights": "int8_dynamic"}
    save_tuned(path, "old", old)
    save_tuned(path, "new", WEIGHTS | ON_CPU)
    assert read_tuned(path)["old"] == old
    loading = LoadingOptions(device="cpu")
    assert tuned_options("new", DecodingOptions(), loading)[1].draft_weights == "int4"
    gone = r"task: 'old' was tuned with draft_weights 'int8_dynamic', which is not one of int8, int4; tune again"
    with pytest.raises(ValueError, match=gone):
        tuned_options("old", DecodingOptions(), loading)
    assert tuned_options("old", DecodingOptions(draft="ngram"), loading)[1].draft_weights is None


@pytest.mark.kind("B18 damaged caches and files")
def test_a_folder_in_its_place_is_told(tmp_path):
    with pytest.raises(ValueError, match="Is a directory; remove it, and tune again"):
        read_tuned(tmp_path)


@pytest.mark.kind("B18 damaged caches and files")
def test_what_was_tuned_for_another_model_or_with_an_adapter_that_is_gone_is_told(folder, tmp_path):
    save_tuned(folder / "tuned.json", "deep", LAYERS | ON_CPU | {"exit_layer": 9})
    save_tuned(folder / "tuned.json", "gone", LAYERS | ON_CPU | {"exit_adapter": str(tmp_path / "gone")})
    with pytest.raises(ValueError, match="task: 'deep' was tuned for another model: exit_layer 9 of 4; tune again"):
        options_of(folder, "deep")
    with pytest.raises(FileNotFoundError, match=r"task: 'gone' was tuned with an exit_adapter: there is no folder"):
        options_of(folder, "gone")
    assert options_of(folder, "gone", draft="ngram")["exit_adapter"] is None
    (tmp_path / "gone").mkdir()  # what it held is gone
    with pytest.raises(FileNotFoundError, match=r"task: 'gone' was tuned with an exit_adapter: .* holds no adapter"):
        options_of(folder, "gone")


def test_an_adapter_is_the_same_by_every_name(tmp_path, monkeypatch, folder):
    (tmp_path / "mine").mkdir()
    for name in ("adapter.json", "adapter.safetensors"):
        (tmp_path / "mine" / name).touch()
    save_tuned(folder / "tuned.json", "adapted", LAYERS | ON_CPU | {"exit_adapter": str(tmp_path / "mine")})
    monkeypatch.chdir(tmp_path)
    assert options_of(folder, "adapted", {"exit_adapter": "mine"})["num_speculations"] == 4
    assert options_of(folder, "adapted", {"exit_adapter": "mine"})["draft"] == "layers"


@pytest.mark.kind("B5 B13 two writers")
def test_two_that_save_at_once_keep_each_others_tasks(tmp_path):
    path = tmp_path / "tuned.json"
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda number: save_tuned(path, f"task{number}", LAYERS | ON_CPU), range(24)))
    assert len(read_tuned(path)) == 24 and [each.name for each in tmp_path.iterdir()] == ["tuned.json"]
