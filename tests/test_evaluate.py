"""`lskip evaluate`: the numbers of each exit by a slow reference, the table and the file, and what is refused early."""

import json
import math

import pytest
import torch

from lskip.cli import main
from lskip.evaluation import evaluate as module
from lskip.evaluation.evaluate import results_table
from lskip.pretrained import load_model

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


def test_what_is_scored_is_kept_when_a_later_exit_fails(folder, monkeypatch):
    evaluate_exit, calls = module._evaluate_exit, []

    def fail_the_second_time(*arguments):
        calls.append(1)
        return evaluate_exit(*arguments) if len(calls) == 1 else 1 / 0

    monkeypatch.setattr(module, "_evaluate_exit", fail_the_second_time)
    with pytest.raises(ZeroDivisionError):
        run("--exits=1,4")
    assert list(json.loads((folder / "results.json").read_text())["results"]) == ["1"]


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


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--exits=9"], "exits: 9 is not"),
        (["--exits=middle"], "exits: 'middle' is not"),
        (["--tasks=texts,nothing"], "tasks: nothing is not a task"),
        (["--tasks=,"], "tasks: none is not a task"),
        (["--batch_size=0"], "batch_size: 0 is not"),
        (["--limit=0"], "limit: 0"),
        (["--num_fewshot=-1"], "num_fewshot: -1 is not"),
        (["--include_path=nowhere"], "include_path: there is no folder 'nowhere'"),
        (["--output=nowhere/x.json"], "output: there is no folder 'nowhere'"),
        (["--output=model/config.json"], "output: 'model/config.json' exists"),
        (["--device=abacus"], "device: 'abacus'"),
        (["--model=nowhere/model"], "model:"),
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
    monkeypatch.setattr(module, "load_model", lambda *_: pytest.fail("the model was loaded"))
    assert run(*flags) == 2
    assert sentence in capsys.readouterr().err


def test_without_lm_eval_the_command_says_what_to_install(folder, capsys, monkeypatch):
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    assert run() == 2
    assert "pip install lm-eval accelerate" in capsys.readouterr().err
