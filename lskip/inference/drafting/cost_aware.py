"""The policy that drafts what pays, by the costs of passes on this machine and the acceptance so far."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import reduce
from typing import Any, NamedTuple

from lskip.inference.drafting.acceptance import Acceptance, Prior, expected_tokens
from lskip.inference.drafting.costs import Costs
from lskip.inference.drafting.draft import PLAIN, Draft, DraftPlan
from lskip.inference.drafting.learnt import check_learnt
from lskip.inference.drafting.policies import DraftPolicy
from lskip.inference.drafting.registry import DRAFTERS
from lskip.inference.drafting.round_times import RoundTimes, power_of
from lskip.utils.checks import check_real, check_whole


class Offer(NamedTuple):
    """What a draft promises at its best number of tokens: tokens in the time of a plain round, and what it costs."""

    speed: float
    count: int
    cost: float
    draft: Draft


class CostAwareDraft(DraftPolicy):
    """The draft and the number of tokens that promise most tokens per second, each round; none where none pays.

    What a round brings follows from the draft's `Acceptance`, what it takes from `RoundTimes`. A draft is rated by an
    upper confidence bound on its acceptance, so that an untested one is worth a try, and counts fade, so that one that
    was long unused is worth another. An exit in rounded weights is taken to agree about as often as in the model's own.

    Now and then a probe reads what other exits, the least known first, say of the same positions in verification's own
    states. Where none can be read, a deeper exit is taken to agree at least as often as an earlier one. N-grams are
    judged by what came, without a pass.

    The loss against plain decoding is bounded by accounts, in times of a plain round: each round adds `budget` of a
    plain round for each token and what it gained. All together may owe ALLOWANCE, and a round that would owe more if
    all its tokens were refused is not planned. So N tokens a slot take at most (1 + budget) N + ALLOWANCE plain rounds,
    whatever is accepted: by default never less than 0.97 x plain decoding's speed from 300 tokens on. What was gained,
    SAVINGS at most, a later stretch may lose. Each number of slots has its own account (up to the next power of two):
    what drafts gain for a text alone is not lost in a batch.
    """

    ALLOWANCE = 6.0
    SAVINGS = 14.0
    MIN_SPEEDUP = 1.02  # over plain decoding, for a draft to be used; over the best plan, for an exit to be probed
    FADING = 4  # counts of a draft fade in `memory` tokens of its own, or in so many times as many rounds without any
    HELD = 4  # rounds that a ranking holds at most: one takes a twentieth of a small model's round
    HOPED, TRUSTED = 1.5, 0.3  # standard errors, for an exit to be probed and to be used: a probe costs less than a try
    LONG = 8  # tokens that the round of a probe drafts at least: how long runs are is seen by long drafts alone
    PROBED = 4  # exits that a probe reads at most
    ALIKE = 32.0  # tested tokens of an exit that count for the same exit in rounded weights, at most
    LOOKING = 0.05  # of the time, at most, goes to probes, and no more than a quarter of what drafts gain
    SELDOM = 128  # rounds between two probes at most
    WHOLE_STACK = Prior(0.8, 4.0)  # acceptance of all blocks in rounded weights

    chooses_draft = True

    def __init__(self, budget: float = 0.01, memory: int = 400):
        """Set what the policy may lose and remember.

        Args:
            budget: share of the time that may be lost.
            memory: tested tokens, of one draft at like positions, that its counts go back.

        Raises:
            ValueError: a budget that is not from 0 to 1, or a memory that is not a whole number from 2 up.
        """
        check_real("budget", budget, "from 0 to 1", lambda number: 0 <= number <= 1)
        check_whole("memory", memory, 2)
        self.budget, self.memory = budget, memory
        self._accounts: dict[int, float] = defaultdict(float)  # by power_of slots
        self._records: dict[Draft, Acceptance] = {}
        self._foretold: dict[tuple[Draft, int], Acceptance] = defaultdict(Acceptance)  # of n-grams, by power_of slots
        self._recalled: dict[str, Any] = {}
        self._times = RoundTimes()
        self._rounds: dict[Draft | None, Counter[int]] = {}
        self._ranking: list[Offer] = []
        self._speed = 1.0  # of the best of them
        self._ranked_for, self._held, self._unfaded = 0, 0, 0  # slots; rounds left; rounds since counts have faded
        self._used: Draft | None = None  # what drafted last
        self._hopes: list[Draft] | None = None  # exits that may be faster than what is in use
        self._until_probe, self._probe_wait, self._probed_at = 0, 1, 1.0
        self._looks = False  # whether the round that is planned is to show more than it brings
        self.probes = 0

    def begin(self, drafts: Sequence[Draft], costs: Callable[[], Costs], num_speculations: int) -> None:
        begun = self.drafts, self.num_speculations
        super().begin(drafts, costs, num_speculations)
        table = costs()
        if self._times.begin(table, num_speculations) or (self.drafts, num_speculations) != begun:
            self._prepare(table.num_layers)

    def _prepare(self, num_layers: int) -> None:
        """Prepare for drafts and costs that are not those of the texts before."""
        self._held = 0
        for draft in self.drafts:
            counts = self._recalled.get("drafts", {}).get(str(draft), {})
            self._records.setdefault(draft, Acceptance(**{name: list(each) for name, each in counts.items()}))
        self._times.known = {name: tuple(pair) for name, pair in self._recalled.get("extra", {}).items()}
        # The deepest first: of exits that no probe reads, none is taken to agree more often than those below it.
        self._by_depth = sorted(self.drafts, key=lambda draft: -draft.exit_layer)
        self._foreseen = [draft for draft in self.drafts if DRAFTERS[draft.kind].foresees]
        # The record of the same exit in the model's other weights, rounded or its own.
        twins = {draft: Draft(DRAFTERS[draft.kind].resembles, draft.exit_layer) for draft in self.drafts}
        pairs = [(draft, twin) for draft, twin in twins.items() if twin in self._records]
        self._alike = {one: self._records[other] for pair in pairs for one, other in (pair, pair[::-1])}
        # Drafts of which probes tell how often they are accepted, or one that resembles them.
        self._read = {draft for draft in self.drafts if DRAFTERS[draft.kind].reads_exit or draft in self._alike}
        whole = {draft for draft, twin in twins.items() if twin.kind and twin.exit_layer == num_layers}
        self._priors = {draft: self.WHOLE_STACK if draft in whole else Prior() for draft in self.drafts}

    def reach(self, positions: int) -> None:
        if self.drafts and self._times.reach(positions):
            self._held = 0

    def plan(self, slots: int, most: int, without: frozenset[Draft] = frozenset()) -> DraftPlan:
        most, self._looks = min(most, self.num_speculations), False
        if most < 1 or not self.drafts or self._times.plain_is_due(self._speed, slots):
            return PLAIN
        if self._held < 1 or slots != self._ranked_for:
            self._rank(slots)
        if not self._rounds and self._exits_to_read(slots):
            return self._looking(PLAIN, most, slots, without)  # what a probe says of exits costs less than to try them
        for offer in self._ranking:
            if offer.draft in without:
                continue
            if offer.cost <= self._limit(slots):
                return self._looking(DraftPlan(offer.draft, min(offer.count, most)), most, slots, without)
        return self._looking(PLAIN, most, slots, without)

    def _looking(self, plan: DraftPlan, most: int, slots: int, without: frozenset[Draft]) -> DraftPlan:
        """Return the plan with what else is to be judged: n-grams, and where it is time, exits, and a longer draft."""
        foreseen = tuple(draft for draft in self._foreseen if draft != plan.draft and draft not in without)
        if self._until_probe < 1:
            others = [draft for draft in self._exits_to_read(slots) if draft != plan.draft]
            exits = tuple(sorted(others, key=lambda draft: self._records[draft].tested)[: self.PROBED])
            for count in self._counts(plan, most, slots):
                longer = plan._replace(num_speculations=count)
                cost = self._times.expected(longer, slots) + self._times.probe(longer, len(exits), slots)
                if cost <= self._limit(slots):
                    self._looks = bool(exits) or count > plan.num_speculations
                    return longer._replace(probed=foreseen + exits)
        return plan._replace(probed=foreseen)

    def _counts(self, plan: DraftPlan, most: int, slots: int) -> list[int]:
        """Return the plan's number of tokens, behind a larger one where nobody knows how long the draft's runs are."""
        count = plan.num_speculations
        if plan.draft and count < self.LONG and self._record(plan.draft, slots).is_short(self.LONG):
            return [max(count, min(most, self.LONG)), count]
        return [count]

    def _rank(self, slots: int) -> None:
        """Rank the drafts that pay, the fastest first."""
        self._fade()
        offers = [
            self._offer(draft, record.chances(prior, more * (self.TRUSTED if draft in self._read else 1)), slots)
            for draft, record, prior, more in self._hoped(slots)
        ]
        offers.sort(reverse=True)
        self._ranking = [offer for offer in offers if offer.speed >= self.MIN_SPEEDUP]
        self._speed, self._held, self._ranked_for = 1.0, self.HELD, slots
        if self._ranking:
            best = self._ranking[0].draft
            self._speed = max(1.0, self._offer(best, self._known(best, slots).chances(self._priors[best]), slots).speed)
            # What is in use is what a round tells of; the first of the ranking may find nothing in this text.
            tested = 0.0 if self._used is None else self._record(self._used, slots).tested
            self._held = min(self.HELD, 1 + int(tested / 16))
        self._hopes = None
        if not 0.8 < self._speed / self._probed_at < 1.25:  # acceptance has changed
            self._probe_wait, self._until_probe = 1, min(self._until_probe, 1)
            self._probed_at = self._speed

    def _hoped(self, slots: int) -> Iterator[tuple[Draft, Acceptance, Prior, float]]:
        """Yield the drafts, each with what counts for it, its prior, and its standard error of acceptance."""
        deeper: dict[str, tuple[float, float]] = {}
        for draft in self._by_depth:
            record, prior = self._known(draft, slots), self._priors[draft]
            most_likely, most = (1.0, 1.0) if draft in self._read else deeper.get(draft.kind, (1.0, 1.0))
            prior = prior._replace(chance=min(prior.chance, most_likely))
            chance, error = record.pooled(prior)
            hope = min(chance + error, most)
            deeper[draft.kind] = chance, hope
            yield draft, record, prior, hope - chance

    def _exits_to_read(self, slots: int) -> list[Draft]:
        """Return the exits that may be faster than what is in use: all, where none is known to be."""
        if self._hopes is None:
            offers = [
                self._offer(draft, record.chances(prior, self.HOPED * more), slots, math.inf)
                for draft, record, prior, more in self._hoped(slots)
                if draft in self._read
            ]
            exits = {offer.draft.exit_layer for offer in offers if offer.speed > self._speed * self.MIN_SPEEDUP}
            readable = [draft for draft in self.drafts if DRAFTERS[draft.kind].reads_exit]
            self._hopes = [draft for draft in readable if draft.exit_layer in exits] or readable
        return self._hopes

    def _known(self, draft: Draft, slots: int) -> Acceptance:
        """Return what counts for a draft: its own record, and that of the same exit in the model's other weights."""
        alike, record = self._alike.get(draft), self._record(draft, slots)
        return record if alike is None else record.beside(alike, self.ALIKE)

    def _record(self, draft: Draft, slots: int) -> Acceptance:
        """Return a draft's counts; of n-grams by slots: a text without any is a refusal only beside one that has."""
        if slots == 1 or not DRAFTERS[draft.kind].foresees:
            return self._records[draft]
        return self._foretold[draft, power_of(slots)]

    def _offer(self, draft: Draft, chances: list[float], slots: int, limit: float | None = None) -> Offer:
        """Return a draft's best speed at these chances, of rounds that cost at most `limit`; None: what is allowed."""
        best, limit = Offer(0.0, 0, 0.0, draft), self._limit(slots) if limit is None else limit
        tokens, costs = expected_tokens(chances, self.num_speculations), self._times.rounds(draft, slots)
        for count, (brought, cost) in enumerate(zip(tokens, costs, strict=True), 1):
            if cost <= limit and brought > best.speed * cost:
                best = Offer(brought / max(cost, 0.1), count, cost, draft)
        return best

    def _limit(self, slots: int) -> float:
        """Return what a round may cost, by what is left of ALLOWANCE and what was gained at about so many slots."""
        owed = sum(min(each, 0.0) for each in self._accounts.values())
        return 1 + self.ALLOWANCE + owed + max(self._accounts[power_of(slots)], 0.0)

    def _fade(self) -> None:
        kept = (1 - 1 / (self.FADING * self.memory)) ** self._unfaded
        for record in [*self._records.values(), *self._foretold.values()]:
            record.fade(kept)
        self._unfaded = 0

    def judge(self, agreed: Mapping[Draft, Sequence[Sequence[bool]]]) -> None:
        for draft, by_slot in agreed.items():
            for run in by_slot:
                self._record(draft, len(by_slot)).add_run(run, 1 - 1 / self.memory)

    def learn(self, plan: DraftPlan, drafted: int, accepted: list[int], seconds: float | None = None) -> None:
        slots, plan = len(accepted), plan if drafted else plan._replace(draft=None)
        plan = plan._replace(num_speculations=drafted)
        exits = [draft for draft in plan.probed if DRAFTERS[draft.kind].reads_exit]
        probing = self._times.probe(plan, len(exits), slots) if exits else 0.0
        cost = self._times.taken(self._times.expected(plan, slots) + probing, slots, seconds)
        tokens = 1 + sum(accepted) / slots
        own = self._accounts[power_of(slots)] + (1 + self.budget) * tokens - cost
        self._accounts[power_of(slots)] = min(self.SAVINGS, own)
        self._rounds.setdefault(plan.draft, Counter())[drafted] += 1
        self._held, self._unfaded, self._until_probe = self._held - 1, self._unfaded + 1, self._until_probe - 1
        if self._looks:
            self._have_looked(probing)
        if exits:
            self.probes, seconds = self.probes + 1, None  # its time says little of rounds without a probe
        if drafted:
            self._used = plan.draft
            for count in accepted:
                self._record(plan.draft, slots).add_draft(count, drafted, 1 - 1 / self.memory)
            self._times.learn_drafted(plan.draft, drafted, slots, seconds)
        else:
            self._times.learn_plain(slots, seconds)

    def _have_looked(self, cost: float) -> None:
        least = max(self.budget / 2, cost / self.SELDOM)
        share = max(least, min(self.LOOKING, (self._speed - 1) / 4))
        self._held, self._until_probe = 0, max(self._probe_wait, round(cost / share))
        self._probe_wait = min(2 * self._probe_wait, self.SELDOM)

    def learnt(self) -> dict[str, Any]:
        counts = {str(draft): vars(record) for draft, record in self._records.items() if record.tested}
        return {} if not counts else {"drafts": counts, "extra": self._times.learnt()}

    def recall(self, learnt: dict[str, Any]) -> None:
        check_learnt(learnt)
        if not self._recalled and not self._records:
            self._recalled = learnt

    def summary(self) -> dict[str, Any]:
        """Return, for "plain" and each draft in use: rounds, the recent q, num_speculations -> rounds; and probes."""
        said: dict[str, Any] = {"plain": {"rounds": sum(self._rounds.get(None, Counter()).values())}}
        for draft in self._records:
            if counts := self._rounds.get(draft):
                by_count = dict(sorted(counts.items()))
                of_batches = [each for key, each in self._foretold.items() if key[0] == draft]
                record = reduce(lambda one, other: one.beside(other, math.inf), of_batches, self._records[draft])
                said[str(draft)] = {"rounds": sum(counts.values()), "q": record.rate, "num_speculations": by_count}
        return said | ({"probes": self.probes} if self.probes else {})
