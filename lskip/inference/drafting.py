"""Who drafts a round, and how many tokens: policies that decide it round by round. None changes the text."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from lskip.inference.costs import Costs


class Draft(NamedTuple):
    """A source of drafted tokens.

    Attributes:
        kind: "layers" (the model's first blocks), "weights" (blocks in rounded weights), or "ngram" (the text).
        exit_layer: how many blocks draft; 0 for "ngram".
    """

    kind: str
    exit_layer: int

    def __str__(self) -> str:
        return f"{self.kind} {self.exit_layer}" if self.exit_layer else self.kind


class DraftPlan(NamedTuple):
    """What a round drafts: `num_speculations` tokens in each lane, from `draft`."""

    draft: Draft | None
    num_speculations: int


PLAIN = DraftPlan(None, 0)  # a round that drafts nothing


class DraftPolicy(ABC):
    """Decides what each round drafts, and learns from what came of it. Subclass it for a policy of your own.

    It may live on over many prompts. Under shared noise the text does not depend on it, only the time does.
    """

    drafts: tuple[Draft, ...] = ()
    num_speculations = 0

    def begin(self, drafts: Sequence[Draft], costs: Callable[[], Costs], num_speculations: int) -> None:
        """At the start of a generation, or of a batch.

        Args:
            drafts: what there is to choose from; the first is what the user named.
            costs: measures the model where that has not been done: call it only if they matter.
            num_speculations: tokens that a round may draft in each lane at most.
        """
        self.drafts, self.num_speculations = tuple(drafts), num_speculations

    @abstractmethod
    def plan(self, lanes: int, most: int, without: frozenset[Draft] = frozenset()) -> DraftPlan:
        """What the next round drafts. It changes nothing, so that it may be asked again for the same round.

        Args:
            lanes: texts decoded together, all of which draft the same number of tokens.
            most: a bound on num_speculations for this round.
            without: drafts that have nothing to offer in this round: n-grams that do not occur in the text.
        """

    def goes_on(self, probabilities: Callable[[], list[float]]) -> bool:
        """Whether to draft another token; asked after each drafted token but the plan's last.

        Args:
            probabilities: by lane, the draft's probability of the token that it has just drafted. Calling it waits
                for the device.
        """
        return True

    def learn(self, plan: DraftPlan, drafted: int, accepted: list[int], seconds: float | None = None) -> None:
        """After each round.

        Args:
            plan: what was planned; drafted: tokens drafted in each lane, possibly fewer.
            accepted: how many of them were accepted, by lane.
            seconds: what the round took, where it was timed.
        """
        return

    def summary(self) -> dict[str, Any]:
        """What was learnt, in plain types, for printing."""
        return {}


class FixedDraft(DraftPolicy):
    """The draft that the user named, the same number of tokens every round."""

    def plan(self, lanes: int, most: int, without: frozenset[Draft] = frozenset()) -> DraftPlan:
        count = min(most, self.num_speculations)
        if count < 1 or not self.drafts or self.drafts[0] in without:
            return PLAIN
        return DraftPlan(self.drafts[0], count)


class ConfidenceDraft(FixedDraft):
    """The draft that the user named, stopped when it gives the token it has just drafted too little probability.

    Of several lanes at least half must be under the threshold. It adapts after each round as in Draft & Verify
    (Zhang et al., arXiv 2309.08168, "adaptive draft-exiting"; transformers' assistant_confidence_threshold stays
    where it is, or moves by a ROC curve over all tokens so far). With A the mean of the round's acceptance_rate
    and the previous A: the threshold rises by `step` where A < target, and falls by `step` otherwise, unless the
    round drafted all it might: then the threshold stopped nothing. (There a step is .001, a tenth of .01.)
    """

    def __init__(self, threshold: float = 0.6, target: float = 0.9, step: float = 0.01):
        """Where the threshold begins, the acceptance_rate it aims at, and how fast it moves.

        Raises:
            ValueError: a number that is not between 0 and 1.
        """
        self.threshold = _share("threshold", threshold)
        self.target = _share("target", target)
        self.step = _share("step", step)
        self.acceptance_rate: float | None = None

    def goes_on(self, probabilities: Callable[[], list[float]]) -> bool:
        given = probabilities()
        return 2 * sum(probability < self.threshold for probability in given) < len(given)

    def learn(self, plan: DraftPlan, drafted: int, accepted: list[int], seconds: float | None = None) -> None:
        if drafted == 0:
            return
        rate = sum(accepted) / (drafted * len(accepted))
        self.acceptance_rate = rate if self.acceptance_rate is None else (self.acceptance_rate + rate) / 2
        if self.acceptance_rate < self.target:
            self.threshold = min(1.0, self.threshold + self.step)
        elif drafted < plan.num_speculations:
            self.threshold = max(0.0, self.threshold - self.step)

    def summary(self) -> dict[str, Any]:
        return {"threshold": self.threshold, "acceptance_rate": self.acceptance_rate}


@dataclass
class Record:
    """What is known of one draft: accepted and refused tokens, older ones counting less, and rounds by tokens drafted.

    A token is tried until the first refusal of its lane's round; what follows it was never put to the test.
    """

    accepted: float = 0.0
    refused: float = 0.0
    rounds: Counter[int] = field(default_factory=Counter)

    @property
    def chance(self) -> float:
        """That a token is accepted, one imaginary refusal included: what is hardly known is not relied on."""
        return self.accepted / (self.accepted + self.refused + 1)

    @property
    def hope(self) -> float:
        """The same with two imaginary acceptances: 1 for an untried draft."""
        return (self.accepted + 2) / (self.accepted + self.refused + 2)

    @property
    def middle(self) -> float:
        """Between the two: Laplace's rule of succession."""
        return (self.accepted + 1) / (self.accepted + self.refused + 2)

    def fade(self, factor: float) -> None:
        self.accepted *= factor
        self.refused *= factor


class CostAwareDraft(DraftPolicy):
    """Each round the draft and number of tokens with the most expected tokens per second; none where none pays.

    A round of d tokens, each accepted with chance q, brings 1 + q + … + q^d tokens (design, section 1). q is a
    running count for each draft; the cost is that of `Costs`, corrected by what rounds took where they are timed.
    Drafts that are not in use are tried again where even a hopeful count makes them the fastest, as seldom as a budget allows.

    All is reckoned in plain steps, and two allowances bound what may be lost: `_patience` against plain decoding,
    whatever the reason, `_curiosity` against the best plan known, by trying others. Both begin at ALLOWANCE and
    grow by `budget`; a round that could cost more than is left of them, if all its tokens were refused, is not
    planned. So by the table of costs, N tokens a lane take at most (1 + budget) N + ALLOWANCE plain steps,
    whatever is accepted: at the default budget, N >= 300 tokens are never slower than 0.97 x plain decoding.
    """

    ALLOWANCE = 3.0
    MOST_PATIENCE = 10.0  # what long success may save up: a good draft that turns bad loses no more than this
    MARGIN = 1.02  # a draft pays if it promises this much over plain decoding, or over the draft in use
    PLAIN_EVERY = 100  # rounds, at most, until a plain one is timed again

    def __init__(self, budget: float = 0.02, memory: int = 40):
        """The share of time that may be lost, and how many tokens put to the test a draft's count remembers.

        Raises:
            ValueError: a budget that is not between 0 and 1, or a memory that is not a whole number from 1 up.
        """
        self.budget = _share("budget", budget)
        if not isinstance(memory, int) or isinstance(memory, bool) or memory < 1:
            raise ValueError(f"memory: {memory!r} is not a whole number from 1 up")
        self.memory = memory
        self._records: dict[Draft, Record] = {}
        self._plain_rounds = 0
        self._patience = self._curiosity = self.ALLOWANCE
        self._tried_against: float | None = None  # the best plan's speed, while the round under way tries another
        self._ratios: dict[str, float] = {"plain": 1.0}  # kind -> seconds measured / predicted
        self._timed, self._since_plain = False, self.PLAIN_EVERY

    def begin(self, drafts: Sequence[Draft], costs: Callable[[], Costs], num_speculations: int) -> None:
        super().begin(drafts, costs, num_speculations)
        self._tables: dict[tuple[Draft, int], list[float]] = {}
        if self.drafts and num_speculations:
            self._costs = costs()
        for draft in self.drafts:
            self._records.setdefault(draft, Record())

    def plan(self, lanes: int, most: int, without: frozenset[Draft] = frozenset()) -> DraftPlan:
        self._tried_against = None
        most = min(most, self.num_speculations)
        drafts = [draft for draft in self.drafts if draft not in without]
        if most < 1 or not drafts or (self._timed and self._since_plain >= self.PLAIN_EVERY):
            return PLAIN
        offers = [
            (*self._best(draft, lanes, most, self._records[draft].chance, self._patience), draft) for draft in drafts
        ]
        speed, count, draft = max(offers)
        if speed < self.MARGIN:
            speed, count, draft = 1.0, 0, None
        trial = self._trial([other for other in drafts if other != draft], lanes, most, speed)
        if trial is not None:
            self._tried_against = speed
            return trial
        return DraftPlan(draft, count)

    def _trial(self, drafts: list[Draft], lanes: int, most: int, speed: float) -> DraftPlan | None:
        """The most promising draft of which a hopeful count says that it beats `speed`, if a try can be afforded."""
        hopes = [(self._best(draft, lanes, most, self._records[draft].hope)[0], draft) for draft in drafts]
        # If all is refused, the round brings one token, for which the best plan takes 1 / speed.
        affordable = min(self._patience, self._curiosity - 1 + 1 / speed)
        for hope, draft in sorted(hopes, reverse=True):
            if hope < speed * self.MARGIN:
                return None
            count = self._best(draft, lanes, most, self._records[draft].middle, affordable)[1]
            if count:
                return DraftPlan(draft, count)
        return None

    def _best(
        self, draft: Draft, lanes: int, most: int, chance: float, affordable: float = float("inf")
    ) -> tuple[float, int]:
        """The highest speed over plain decoding that this draft promises, and with how many tokens (0: none can be afforded)."""
        speed, best, reached, tokens = 0.0, 0, 1.0, 1.0
        ratio = self._ratio(draft.kind) / self._ratio("plain")
        for count, steps in enumerate(self._steps(draft, lanes), 1):
            if count > most: break
            reached *= chance
            tokens += reached
            steps *= ratio
            if steps - 1 <= affordable and tokens > speed * steps:
                speed, best = tokens / steps, count
        return speed, best

    def _steps(self, draft: Draft, lanes: int) -> list[float]:
        """Cost in plain steps of a round with 1, 2, … num_speculations tokens."""
        if (draft, lanes) not in self._tables:
            rounds = [self._costs.round(DraftPlan(draft, d), lanes) for d in range(1, self.num_speculations + 1)]
            self._tables[draft, lanes] = [cost / self._costs.plain(lanes) for cost in rounds]
        return self._tables[draft, lanes]

    def _ratio(self, kind):
        return self._ratios.get(kind, self._ratios["plain"])

    def learn(self, plan: DraftPlan, drafted: int, accepted: list[int], seconds: float | None = None) -> None:
        lanes = len(accepted)
        for record in self._records.values():
            record.fade(1 - 1 / (self.memory * 5))
        steps = 1.0
        if drafted and plan.draft:
            steps = self._steps(plan.draft, lanes)[drafted - 1]
            refused = sum(count < drafted for count in accepted)
            record = self._records[plan.draft]
            record.fade((1 - 1 / self.memory) ** (sum(accepted) + refused))
            record.accepted += sum(accepted)
            record.refused += refused
            record.rounds[drafted] += 1
        else:
            self._plain_rounds += 1
        gained = 1 + sum(accepted) / lanes
        self._patience = min(self.MOST_PATIENCE, self._patience + (1 + self.budget) * gained - steps)
        lost = 0.0 if self._tried_against is None else steps - gained / self._tried_against
        self._curiosity = min(self.ALLOWANCE, self._curiosity + self.budget * steps - lost)


def _share(name: str, value: Any) -> float:
    if not isinstance(value, Real) or isinstance(value, bool) or not 0 <= value <= 1:
        raise ValueError(f"{name}: {value!r} is not a number between 0 and 1")
    return float(value)
