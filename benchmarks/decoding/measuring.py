"""Interleaved runs of settings, and the records made from them."""

from __future__ import annotations

import random
import statistics
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from typing import NamedTuple, Protocol

from benchmarks.decoding.settings import Setting


class Run(NamedTuple):
    """One setting on one group of prompts.

    Attributes:
        texts: the new tokens of each prompt.
        seconds: from the prompts' tokens to the last new one.
        rounds: passes of the whole model, over all texts.
        drafted, accepted: tokens, over all texts.
        accepted_counts: accepted tokens of a drafting round -> rounds; None: not known.
        planned: returns the cost model's seconds for the rounds, without prompts; None: it does not model them.
        compared: tokens of a text that can be compared with other methods'; None: all.
    """

    texts: list[list[int]]
    seconds: float
    rounds: int
    drafted: int = 0
    accepted: int = 0
    accepted_counts: Counter[int] | None = None
    planned: Callable[[], float] | None = None
    compared: int | None = None

    @property
    def tokens(self) -> int:
        return sum(map(len, self.texts))


class Contestant(Protocol):
    """A method with its setting, ready to run."""

    setting: Setting

    def run(self, prompts: list[list[int]], max_new_tokens: int) -> Run: ...


Groups = list[list[list[int]]]  # prompts (token ids) that are given to a setting together
PROMPT = "prompt"  # method of the contestant that measures the prompts' own passes: no record


class Measured:
    """All runs so far, run i of each setting on group i.

    Attributes:
        groups: prompts by run.
        runs: setting -> its runs.
    """

    def __init__(self, groups: Groups, settings: list[Setting]):
        self.groups = groups
        self.runs: dict[Setting, list[Run]] = {setting: [] for setting in settings}

    def base(self, method: str, batch: int) -> list[Run] | None:
        """The runs that a setting of this batch is compared with."""
        for setting, runs in self.runs.items():
            if setting.method == method and setting.batch == batch:
                return runs
        return None

    def after_prompt(self, setting: Setting) -> list[float]:
        """Seconds of each run without the prompts' own passes.

        These cost the same whatever drafts, and the cost model is about what follows them.
        """
        runs, prompts = self.runs[setting], self.base(PROMPT, setting.batch) or []
        return [run.seconds - prompt.seconds for run, prompt in zip(runs, prompts, strict=False)]


def measure(
    contestants: list[Contestant], groups: Groups, max_new_tokens: int, after_group: Callable[[Measured], None]
) -> Measured:
    """Run every contestant on every group, after one group to warm up.

    The order is shuffled for each group by a fixed seed: in a fixed order each would always follow the same one, which
    made autoregressive decoding after `generate` 4 % slower. `after_group` is called with the results so far.
    """
    measured = Measured(groups, [contestant.setting for contestant in contestants])
    for contestant in contestants:
        contestant.run(groups[0], min(max_new_tokens, 16))
    for number, group in enumerate(groups):
        for contestant in random.Random(number).sample(contestants, len(contestants)):
            measured.runs[contestant.setting].append(contestant.run(group, max_new_tokens))
        after_group(measured)
    return measured


def references(measured: Measured) -> dict[tuple[int, ...], list[int]]:
    """Prompt -> the text that transformers' `generate` gives it."""
    runs = measured.base("hf_generate", 1) or []
    return {
        tuple(prompt): text
        for group, run in zip(measured.groups, runs, strict=False)
        for prompt, text in zip(group, run.texts, strict=True)
    }


def first_differences(measured: Measured, setting: Setting, reference: dict) -> dict[tuple[int, ...], int]:
    """Prompt -> the first token that is not the reference's, for the prompts whose texts differ."""
    found = {}
    for group, run in zip(measured.groups, measured.runs[setting], strict=False):
        for prompt, text in zip(group, run.texts, strict=True):
            mine, theirs = text[: run.compared], reference[tuple(prompt)][: run.compared]
            if mine != theirs:
                pairs = enumerate(zip(mine, theirs, strict=False))
                found[tuple(prompt)] = next((i for i, (a, b) in pairs if a != b), min(len(mine), len(theirs)))
    return found


def records(measured: Measured, model: str, reference: dict, precision: str) -> list[dict]:
    """A record for each setting that has run.

    Args:
        model: its name.
        reference: of `references`, made in `precision`: other precisions are not compared with it.
    """
    return [
        record(measured, setting, model, reference if setting.precision == precision else None)
        for setting, runs in measured.runs.items()
        if runs and setting.method != PROMPT
    ]


def record(measured: Measured, setting: Setting, model: str, reference: dict | None) -> dict:
    runs = measured.runs[setting]
    drafted, rounds = sum(run.drafted for run in runs), sum(run.rounds for run in runs)
    counts = [run.accepted_counts for run in runs if run.accepted_counts is not None]
    gained = ratios(measured.base("autoregressive", setting.batch), runs)
    return {
        "model": model,
        **asdict(setting),
        "tokens_per_second": statistics.median(run.tokens / run.seconds for run in runs),
        "over_autoregressive": median(gained),
        "over_autoregressive_quartiles": quartiles(gained),
        "over_generate": median(ratios(measured.base("hf_generate", setting.batch), runs)),
        "acceptance_rate": sum(run.accepted for run in runs) / drafted if drafted else None,
        "tokens_per_round": sum(run.tokens for run in runs) / rounds,
        "share_of_ideal": share_of_ideal(measured, setting),
        "peak_mib": None,
        "mismatches": None if reference is None else len(first_differences(measured, setting, reference)),
        "accepted_counts": {str(count): n for count, n in sorted(sum(counts, Counter()).items())} if counts else None,
    }


def ratios(base: list[Run] | None, runs: list[Run]) -> list[float]:
    """How many times as fast, group by group, each against the base's run beside it; empty where there is no base."""
    if base is None:
        return []
    return [before.seconds / run.seconds for before, run in zip(base, runs, strict=True)]


def median(values: list[float]) -> float | None:
    return statistics.median(values) if values else None


def quartiles(values: list[float]) -> tuple[float, float] | None:
    """What the middle half of the values lies between; None for fewer than two."""
    if len(values) < 2:
        return None
    low, _, high = statistics.quantiles(values, method="inclusive")
    return low, high


def share_of_ideal(measured: Measured, setting: Setting) -> float | None:
    """Measured over predicted speed-up against autoregressive decoding of the same batch, prompts left out."""
    runs, base = measured.runs[setting], measured.base("autoregressive", setting.batch)
    if setting.method == "autoregressive" or base is None or any(run.planned is None for run in runs):
        return None
    plain = measured.after_prompt(next(s for s, r in measured.runs.items() if r is base))
    pairs = zip(plain, measured.after_prompt(setting), strict=True)
    # Texts of a few tokens are within the noise of their prompts' time.
    gained = [before / after for before, after in pairs if before > 0 and after > 0]
    if not gained:
        return None
    # Each by the costs of its own weights: their layouts may differ, and with them what a plain round takes.
    ideal = sum(run.planned() for run in base) / sum(run.planned() for run in runs)
    return statistics.median(gained) / ideal
