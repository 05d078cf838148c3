"""`lskip evaluate`: the numbers of each exit by a slow reference, the table and the file, and what is refused early."""

import copy
import errno
import json
import math
from datetime import datetime
from unittest.mock import patch

import pytest
import torch

from lskip.cli import main
from lskip.evaluation.lm_eval import evaluate as module
from lskip.evaluation.lm_eval import models
from lskip.evaluation.lm_eval.evaluate import results_table
from lskip.inference.runners.rounded_model import round_to_int8
from lskip.models.decoder import Decoder
from lskip.models.exit_adapter import AdapterShape, ExitAdapter
from lskip.models.pretrained import load_model
from lskip.utils.console import plain_console
from lskip.utils.output_files import only_writer

TEXTS = [
    ("for i in range(9):\n    print(i)\n" * i).strip() for i in (1, 2, 4, 3)
]  # lm-eval counts a last space as a word


@pytest.fixture
def folder(tmp_path, tiny_model, tiny_tokenizer, monkeypatch):
    """The current folder: a model, and tasks/ with a task of texts to score and one of questions."""
    monkeypatch.chdir(tmp_path)
    tiny_model().save_pretrained("model")
    tiny_tokenizer.save_pretrained("model")
    (tmp_path / "tasks").mkdir()
    (tmp_path / "clip").mkdir()
    (tmp_path / "clip" / "config.json").write_text('{"model_type": "clip"}')
    rows = [{"text": text, "question": f"def f{i}():", "answer": i % 2} for i, text in enumerate(TEXTS)]
    (tmp_path / "tasks" / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    files = {"data_files": {"test": str(tmp_path / "tasks/rows.jsonl")}, "cache_dir": str(tmp_path / "cache")}
    common = {"dataset_path": "json", "dataset_kwargs": files, "test_split": "test"}
    texts = {"task": "texts", "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}"}
    texts["metric_list"] = [{"metric": "word_perplexity"}]
    questions = {"task": "questions", "output_type": "multiple_choice", "doc_to_text": "{{question}}"}
    questions |= {"doc_to_target": "{{answer}}", "doc_to_choice": ["return 1", "x"], "metric_list": [{"metric": "acc"}]}
    for task in (texts, questions):
        (tmp_path / "tasks" / f"{task['task']}.yaml").write_text(json.dumps(common | task))
    return tmp_path


def run(*more: str) -> int:
    return main(["evaluate", "--model=model", "--include_path=tasks", "--tasks=texts,questions", *more])


@torch.no_grad()
def slow_perplexity(model, tokenizer, exit_layer):
    """exp of minus the log-likelihood a word, over all texts."""
    total, words = 0.0, 0
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert len(ids) <= 128
        hidden = model.model(torch.tensor([[tokenizer.eos_token_id, *ids]]), output_hidden_states=True).hidden_states
        state = hidden[exit_layer][0, :-1]
        rows = model.lm_head(state if exit_layer == 4 else model.model.norm(state)).log_softmax(-1)
        total += sum(row[token].item() for row, token in zip(rows, ids, strict=True))
        words += len(text.split())
    return math.exp(-total / words)


def test_every_exits_perplexity_by_a_slow_reference(folder, capsys):
    assert run("--exits=2,last,1", "--output=scores.json") == 0
    written = json.loads((folder / "scores.json").read_text())
    assert list(written["results"]) == ["1", "2", "4"]
    assert written["tasks"] == ["texts", "questions"] and written["num_fewshot"] is None
    model, tokenizer = load_model("model")
    table = capsys.readouterr().out
    for exit_layer in (1, 2, 4):
        scores = written["results"][str(exit_layer)]
        found = scores["texts"]["word_perplexity,none"]
        assert found == pytest.approx(slow_perplexity(model, tokenizer, exit_layer), rel=1e-4)
        assert f"exit {exit_layer}" in table and f"{found:.4g}" in table
        assert 0 <= scores["questions"]["acc,none"] <= 1


def test_the_rounded_model_is_scored_beside_it(folder, capsys, tiny_model):
    tiny_model(vocab_size=304).save_pretrained("model")  # a multiple of 8, as rows of matrices have it
    assert run("--exits=2,last", "--output=scores.json", "--weights=int8") == 0
    results = json.loads((folder / "scores.json").read_text())["results"]
    assert list(results) == ["2", "4", "2 int8", "4 int8"] and "exit 4 int8" in capsys.readouterr().out
    model, tokenizer = load_model("model")
    own = {exit_layer: slow_perplexity(model, tokenizer, exit_layer) for exit_layer in (2, 4)}
    round_to_int8(Decoder(model))
    for exit_layer in (2, 4):
        found = [results[name]["texts"]["word_perplexity,none"] for name in (f"{exit_layer}", f"{exit_layer} int8")]
        assert found == pytest.approx([own[exit_layer], slow_perplexity(model, tokenizer, exit_layer)], rel=1e-4)
        assert found[0] != pytest.approx(found[1], rel=1e-6)


def test_what_cannot_be_rounded_is_refused_before_scoring(folder, capsys, tiny_model):
    tiny_model("gpt2").save_pretrained("model")
    assert run("--output=scores.json", "--weights=int8") == 2
    assert "weights: 'int8' is not for this model" in capsys.readouterr().err and not (folder / "scores.json").exists()


def test_numbers_that_another_dtype_would_round_again_are_refused(folder, capsys, tiny_model):
    tiny_model(vocab_size=304).save_pretrained("model")
    assert run("--output=scores.json", "--weights=int8", "--dtype=bfloat16") == 2
    assert "dtype: 'bfloat16' is not for weights int8" in capsys.readouterr().err


def save_adapter(folder, model, joins=False, tokens=None):
    torch.manual_seed(3)
    adapter = ExitAdapter(model, AdapterShape(2, 1, joins), tokens)
    for parameter in adapter.trained_parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    adapter.save(folder / "adapter", torch.float32)
    return adapter.eval()


@torch.no_grad()
def test_an_exit_through_its_adapter_by_a_slow_reference(folder, tiny_model):
    """Other exits' scores are as without; the adapter's come of its modules, text by text."""
    model, tokenizer = load_model("model")
    adapter = save_adapter(folder, model)
    assert run("--exits=1,2,last", "--exit_adapter=adapter", "--output=scores.json") == 0
    scores = json.loads((folder / "scores.json").read_text())["results"]
    for other in (1, 4):
        found = scores[str(other)]["texts"]["word_perplexity,none"]
        assert found == pytest.approx(slow_perplexity(model, tokenizer, other), rel=1e-4)
    total, words, body = 0.0, 0, Decoder(adapter.body)
    for text in TEXTS:
        ids = torch.tensor([[tokenizer.eos_token_id, *tokenizer.encode(text)]])
        x = adapter.joined(model.model(ids, output_hidden_states=True).hidden_states[2], None)
        logits = adapter.body.lm_head(adapter.body.model.norm(adapter.run(x, body.block_inputs(x))))
        total -= torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="sum").item()
        words += len(text.split())
    assert scores["2"]["texts"]["word_perplexity,none"] == pytest.approx(math.exp(-total / words), rel=1e-4)


@pytest.mark.parametrize(
    ("options", "joins", "tokens", "message"),
    [
        (["--exits=1,last"], False, None, "exits: 2, for which the exit_adapter was made, is none of them"),
        (["--exits=2"], True, None, "exit_layer: 2 alone does not go with this exit_adapter, which joins"),
        (["--exits=2"], False, [1, 2], "exit_adapter: knows 2 of 300 tokens"),
    ],
)
def test_adapters_that_cannot_be_scored_are_refused(folder, capsys, options, joins, tokens, message):
    save_adapter(folder, load_model("model")[0], joins, None if tokens is None else torch.tensor(tokens))
    assert run(*options, "--exit_adapter=adapter") == 2
    assert message in capsys.readouterr().err and not list(folder.glob("results*"))


def test_what_is_scored_is_kept_when_a_later_exit_fails(folder, monkeypatch):
    evaluate_exit, calls = module._evaluate_exit, []

    def fail_the_second_time(*arguments):
        calls.append(1)
        return evaluate_exit(*arguments) if len(calls) == 1 else 1 / 0

    monkeypatch.setattr(module, "_evaluate_exit", fail_the_second_time)
    with pytest.raises(ZeroDivisionError):
        run("--exits=1,4")
    (written,) = folder.glob("results_model_*.json")
    assert list(json.loads(written.read_text())["results"]) == ["1"]


def test_a_second_call_does_not_stumble_over_the_first(folder, capsys):
    with patch.object(module, "datetime") as clock:
        for second in (1, 2):
            clock.now.return_value = datetime(2026, 1, 1, 0, 0, second)
            assert run() == 0
    assert sorted(path.name for path in folder.glob("results*")) == [
        f"results_model_2026-01-01_00-00-0{second}.json" for second in (1, 2)
    ]
    assert "results: results_model_2026-01-01_00-00-02.json" in capsys.readouterr().out


LOST = "B11 B27 full disks, and places that cannot be written"


@pytest.mark.kind(LOST, "B27")
def test_on_a_full_disk_what_is_scored_is_shown(folder, capsys, monkeypatch):
    def refuse(path, content):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(module, "write_bytes", refuse)
    assert run("--exits=1,4") == 2
    printed = capsys.readouterr()
    assert "word_perplexity" in printed.out and "exit 1" in printed.out
    assert "output: could not be written" in printed.err and "stands above" in printed.err


@pytest.mark.kind(LOST)
def test_ctrl_c_says_which_exits_are_kept(folder, capsys, monkeypatch):
    evaluate_exit, calls = module._evaluate_exit, []

    def interrupt_the_second_time(*arguments):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return evaluate_exit(*arguments)

    monkeypatch.setattr(module, "_evaluate_exit", interrupt_the_second_time)
    assert run("--exits=1,4", "--output=kept.json") == 130
    assert "interrupted; exits 1 are in 'kept.json'" in capsys.readouterr().err
    assert list(json.loads((folder / "kept.json").read_text())["results"]) == ["1"]


@pytest.mark.kind("B5 B13 two writers")
def test_two_evaluations_are_kept_apart(folder, capsys, monkeypatch):
    monkeypatch.setattr(models, "load_model", None)
    with only_writer(folder / "o.json", "output"):
        assert run("--output=o.json") == 2
    assert "is being written by another process" in capsys.readouterr().err


@pytest.mark.kind("K8 what is not finite", "B1")
@pytest.mark.parametrize("command", ["evaluate", "inspect"])
def test_a_model_that_says_no_numbers_is_refused_with_the_layer(folder, tiny_model, capsys, command):
    model = tiny_model()
    model.model.layers[2].mlp.down_proj.weight.data.fill_(float("nan"))
    model.save_pretrained("model")
    more = {"evaluate": ["--include_path=tasks", "--tasks=texts", "--exits=2,last"]}
    more["inspect"] = ["--output=out", "--block_size=16", "--num_blocks=1", "--data=tasks/rows.jsonl"]
    assert main([command, "--model=model", *more[command]]) == 2
    said = capsys.readouterr().err
    assert "model:" in said and not list(folder.glob("results*")) and not (folder / "out").exists()


BROKEN = {
    "an unknown variable": ({"doc_to_text": "{{nothing.x.y}}"}, "tasks: broken cannot be read by lm-eval"),
    "a template's syntax": ({"doc_to_text": "{% for %}"}, "tasks: broken cannot be read by lm-eval"),
    "no such split": ({"test_split": "nope"}, "tasks: broken cannot be read by lm-eval (KeyError"),
    "no such metric": ({"metric_list": [{"metric": "nope"}]}, "tasks: broken cannot be read by lm-eval"),
    "no such data": ({"dataset_kwargs": {"data_files": "/no.jsonl"}}, "tasks: broken cannot be read by lm-eval"),
    "no such kind": ({"output_type": "nope"}, "tasks: broken cannot be read by lm-eval"),
    "no kind": ({"output_type": None}, "tasks: broken cannot be read by lm-eval (UnboundLocalError"),
    "a number for a name": ({"task": 5}, "tasks: broken cannot be read by lm-eval (TypeError"),
    "worked examples below 0": ({"num_fewshot": -1}, "tasks: broken: num_fewshot: -1 is not a whole number"),
    "worked examples that there are not": ({"num_fewshot": 10**6}, "tasks: num_fewshot: is more than"),
    "no such hub data set": ({"dataset_path": "no_owner/none"}, "tasks: broken cannot be read by lm-eval"),
    "a temperature in words": (
        {
            "output_type": "generate_until",
            "generation_kwargs": {"until": ["x"], "do_sample": True, "temperature": "hot"},
        },
        "tasks: broken cannot be read by lm-eval",
    ),
}


@pytest.mark.kind("B41 sentences that name field, value and what is allowed")
@pytest.mark.parametrize(("fields", "said"), BROKEN.values(), ids=BROKEN)
def test_a_broken_task_of_your_own_is_told_in_a_sentence(folder, capsys, fields, said):
    task = json.loads((folder / "tasks" / "questions.yaml").read_text()) | {"task": "broken"} | fields
    (folder / "tasks" / "broken.yaml").write_text(json.dumps(task))
    assert run("--tasks=broken") == 2
    assert f"error: {said}" in capsys.readouterr().err
    assert not list(folder.glob("results*"))


@pytest.mark.kind("B41 sentences that name field, value and what is allowed", "B9")
def test_a_chat_template_that_refuses_is_told(folder, tiny_tokenizer, capsys):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = "{{ raise_exception('no users here') }}"
    tokenizer.save_pretrained("model")
    assert run("--chat=true") == 2
    assert "tasks: a template cannot be filled in (no users here)" in capsys.readouterr().err


@pytest.mark.kind("B41 sentences that name field, value and what is allowed")
def test_more_worked_examples_than_there_are(folder, capsys):
    assert run("--num_fewshot=1000") == 2
    assert "num_fewshot: is more than a task has worked examples" in capsys.readouterr().err


@pytest.mark.kind("B41 sentences that name field, value and what is allowed")
def test_a_perplexity_beyond_a_float_is_told(folder, tiny_model, capsys):
    model = tiny_model()
    model.model.norm.weight.data.mul_(3e4)
    model.save_pretrained("model")
    assert run("--tasks=texts") == 2
    assert "exits: the perplexity of exit 4 is more than a float holds" in capsys.readouterr().err


@pytest.mark.kind("B34 names and words of strangers")
@pytest.mark.parametrize("name", ["[red]x[/red]", "[/]", ":smile:", "a\x1b[2J", "</script>"])
def test_a_table_shows_any_name(capsys, name):
    plain_console().print(results_table({"8": {name: {"acc,none": 0.5}}}))
    printed = capsys.readouterr().out
    assert "\x1b" not in printed and name.replace("\x1b", "\\x1b") in printed


def test_fewer_documents_and_worked_examples(folder):
    assert run("--limit=2", "--num_fewshot=1", "--output=few.json") == 0
    assert run("--limit=0.5", "--output=half.json") == 0
    few, half = (json.loads((folder / name).read_text())["results"]["4"] for name in ("few.json", "half.json"))
    assert few["texts"]["sample_len"] == half["texts"]["sample_len"] == 2


def test_results_table_by_hand(capsys):
    from rich.console import Console

    scores = [{"acc,none": 0.25, "acc_stderr,none": 0.05, "alias": "x", "f1,strict": "N/A"}, {"acc,none": 0.5}]
    scores[1] |= {"acc_stderr,none": "N/A", "alias": "x", "f1,strict": 0.125}
    Console(width=100).print(results_table({"8": {"x": scores[0]}, "30": {"x": scores[1]}}))
    lines = [line.replace("│", " ").split() for line in capsys.readouterr().out.splitlines()]
    assert ["x", "acc", "0.25", "±", "0.05", "0.5"] in lines
    assert ["x", "f1,strict", "N/A", "0.125"] in lines
    assert not any("alias" in line for line in lines)


@pytest.mark.kind("B41 sentences that name field, value and what is allowed")
@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--exits=9"], "exits: 9 is not"),
        (["--exits=middle"], "exits: 'middle' is not"),
        (["--tasks=texts,nothing"], "tasks: nothing is not a task"),
        (["--tasks=,"], "tasks: none is not a task"),
        (["--batch_size=0"], "batch_size: 0 is not"),
        (["--limit=0"], "limit: 0"),
        (["--limit=1.5"], "limit: 1.5 is not"),
        (["--limit=nan"], "limit: 'nan' is not"),
        (["--limit=1e300"], "limit: 1e+300 is not"),
        (["--exits="], "exits: '' is not"),
        (["--dtype=int3"], "dtype: 'int3' is not one of"),
        (["--tasks=text"], "tasks: text is not a task of lm-eval-harness or of include_path; did you mean texts"),
        (["--output=model"], "output: 'model' is a folder"),
        (["--num_fewshot=-1"], "num_fewshot: -1 is not"),
        (["--include_path=nowhere"], "include_path: there is no folder 'nowhere'"),
        (["--output=nowhere/x.json"], "output: there is no folder 'nowhere'"),
        (["--output=model/config.json"], "output: 'model/config.json' exists"),
        (["--device=abacus"], "device: 'abacus'"),
        (["--model=nowhere/model"], "model:"),
        (["--model=clip"], "model: "),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_mistake_is_told_before_the_model_is_loaded(folder, capsys, monkeypatch, flags, sentence):
    from lm_eval import tasks

    # Whether lm-eval itself has a task of that name takes a minute to find out.
    monkeypatch.setattr(
        tasks,
        "TaskManager",
        lambda include_path, include_defaults=True: tasks.manager.TaskManager(
            include_path=include_path, include_defaults=False
        ),
    )
    monkeypatch.setattr(models, "load_model", lambda *_: pytest.fail("the model was loaded"))
    assert run(*flags) == 2
    assert sentence in capsys.readouterr().err


def test_without_lm_eval_the_command_says_what_to_install(folder, capsys, monkeypatch):
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    assert run() == 2
    assert "pip install lm-eval accelerate" in capsys.readouterr().err
