"""Measurement of one cell of a sweep: drafting timed in turns with autoregressive decoding of the same prompts."""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from statistics import median
from typing import Any, NamedTuple

from lskip.evaluation.sweep.grid import Cell, CriterionCell
from lskip.evaluation.tasks.prompts import Prompt
from lskip.inference import ConfidenceDraft, CostAwareDraft, CriterionDraft, FixedDraft, Generation, TextGenerator
from lskip.inference.drafting.costs import Costs
from lskip.inference.drafting.draft import DraftPlan
from lskip.inference.drafting.policies import DraftPolicy
from lskip.inference.drafting.registry import round_seconds
from lskip.inference.exit_criteria import MEASURED
from lskip.inference.options import LoadingOptions

POLICIES = {kind.__name__: kind for kind in (FixedDraft, ConfidenceDraft, CostAwareDraft)}
WARM_UP_TOKENS = 16


class Generators:
    """Generators of a sweep: one that decodes autoregressively and at most one more, which has what a draft needs.

    Drafts that need nothing loaded use the first.
    """

    def __init__(self, loading: LoadingOptions):
        self.loading = replace(loading, exit_adapter=None, costs_file=None)  # costs are measured anew
        self.exit_adapter = loading.exit_adapter
        self.plain = self.loading.load()
        self._loaded: tuple[str, TextGenerator] | None = None

    def drafting(self, cell: Cell) -> TextGenerator:
        """Return the generator for a cell; ValueError where its draft does not work on this machine."""
        if cell.drafter.needs is None:
            self._loaded = None
            return self.plain
        if self._loaded is None or self._loaded[0] != cell.draft:
            self._loaded = None  # first, so that its memory is free for the next
            adapter = self.exit_adapter if cell.drafter.needs == "exit_adapter" else None
            loading = replace(self.loading, draft_weights=cell.draft_weights, exit_adapter=adapter)
            if adapter is not None:  # which has tokens of its own
                loading = replace(loading, draft_tokens=None)
            self._loaded = cell.draft, loading.load()
        return self._loaded[1]


class Pair(NamedTuple):
    """Outcomes of one prompt's turn: the first token alone, the autoregressive answer, the drafted one."""

    first_token: Generation
    plain: Generation
    drafted: Generation


def measure_cell(generators: Generators, cell: Cell, prompts: Sequence[Prompt], rounds: int) -> dict[str, Any]:
    """Return a cell's record, in which with FixedDraft nothing but "times" depends on the clock.

    Args:
        rounds: how often each prompt is answered, each time by both ways, which take turns in going first.

    Returns:
        The cell's fields; "tokens"; "acceptance_rate"; "tokens_per_round", where the prefill counts as a round;
        "accepted_counts"; "mismatches": prompts whose text is not the autoregressive one; "times", of `times_of`.
    """
    generator, policy = generators.drafting(cell), policy_of(cell)
    planned: list[tuple[DraftPlan, int]] = []
    remember_rounds(policy, planned)
    drafting = {**cell.settings(), "draft_policy": policy}
    _warm_up(generators.plain, generator, prompts[0], drafting)
    planned.clear()
    pairs = [
        _pair(generators.plain, generator, prompt, drafting, drafted_first=(turn + number) % 2 == 1)
        for turn in range(rounds)
        for number, prompt in enumerate(prompts)
    ]
    texts = [pair.drafted for pair in pairs]
    drafted = sum(text.drafted for text in texts)
    differ = {number % len(prompts) for number, p in enumerate(pairs) if p.plain.token_ids != p.drafted.token_ids}
    counts = sum((text.accepted_counts for text in texts), Counter())
    return {
        **asdict(cell),
        "tokens": sum(len(text.token_ids) for text in texts),
        "acceptance_rate": sum(text.accepted for text in texts) / drafted if drafted else None,
        "tokens_per_round": sum(len(text.token_ids) for text in texts) / sum(text.rounds for text in texts),
        "accepted_counts": {str(count): number for count, number in sorted(counts.items())},
        "mismatches": len(differ),
        "times": times_of(pairs, generators.plain.costs, generator.costs, planned),
    }


def policy_of(cell: Cell) -> DraftPolicy:
    """Return a new policy, as the cell names it."""
    if isinstance(cell, CriterionCell):
        return CriterionDraft(MEASURED[cell.criterion](cell.threshold))
    return POLICIES[cell.policy]()


def _warm_up(plain: TextGenerator, drafting: TextGenerator, prompt: Prompt, settings: dict[str, Any]) -> None:
    """Decode a few tokens both ways, since the first passes pay for what is made on demand."""
    few = {**prompt.settings, "max_new_tokens": min(WARM_UP_TOKENS, prompt.settings["max_new_tokens"])}
    plain.generate(prompt.ids, **few)
    drafting.generate(prompt.ids, **few, **settings)


def _pair(
    plain: TextGenerator, drafting: TextGenerator, prompt: Prompt, settings: dict[str, Any], drafted_first: bool
) -> Pair:
    runs: list[Callable[[], Generation]] = [
        lambda: plain.generate(prompt.ids, **prompt.settings),
        lambda: drafting.generate(prompt.ids, **prompt.settings, **settings),
    ]
    first_token = plain.generate(prompt.ids, **{**prompt.settings, "max_new_tokens": 1})
    if drafted_first:
        drafted, own = runs[1](), runs[0]()
        return Pair(first_token, own, drafted)
    return Pair(first_token, runs[0](), runs[1]())


def times_of(
    pairs: Sequence[Pair], plain: Costs, drafting: Costs, planned: list[tuple[DraftPlan, int]]
) -> dict[str, Any]:
    """Return all of a record that depends on the clock.

    Args:
        plain, drafting: costs of either generator, whose weights may be packed in different layouts.
        planned: each round's plan and number of slots.

    Returns:
        "speedup": the autoregressive over the drafted seconds of all turns together, prefill included, since who
        waits pays for the slow texts too; "speedups": of each turn, NaN where the clock stood still;
        "tokens_per_second", "autoregressive_tokens_per_second"; "share_of_ideal": the speed-up over the cost model's
        for the planned rounds, prefill left out in both; None where a text has one token.
    """
    speedups = [pair.plain.seconds / (pair.drafted.seconds or math.nan) for pair in pairs]
    gained = [
        (pair.plain.seconds - pair.first_token.seconds) / (pair.drafted.seconds - pair.first_token.seconds)
        for pair in pairs
        if min(pair.plain.seconds, pair.drafted.seconds) > pair.first_token.seconds
    ]
    tokens = sum(len(pair.plain.token_ids) - 1 for pair in pairs)
    predicted = sum(round_seconds(drafting, plan, slots) for plan, slots in planned)
    ideal = tokens * plain.plain(1) / predicted if predicted else None
    return {
        "speedup": sum(pair.plain.seconds for pair in pairs)
        / (sum(pair.drafted.seconds for pair in pairs) or math.nan),
        "tokens_per_second": median(pair.drafted.tokens_per_second for pair in pairs),
        "autoregressive_tokens_per_second": median(pair.plain.tokens_per_second for pair in pairs),
        "share_of_ideal": median(gained) / ideal if gained and ideal else None,
        "speedups": [round(speedup, 4) for speedup in speedups],
    }


def remember_rounds(policy: DraftPolicy, rounds: list[tuple[DraftPlan, int]]) -> None:
    """Make `policy` append each round's plan, as drafted, and its number of slots to `rounds` when it learns."""
    learn = policy.learn

    def learn_and_remember(plan: DraftPlan, drafted: int, accepted: list[int], *more) -> None:
        rounds.append((DraftPlan(plan.draft, drafted), len(accepted)))
        learn(plan, drafted, accepted, *more)

    policy.learn = learn_and_remember
