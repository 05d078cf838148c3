"""lskip's methods in the decoding benchmark."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Collection
from copy import copy
from functools import partial
from statistics import mean

from transformers import PreTrainedModel

from benchmarks.decoding.measuring import PROMPT, Run
from benchmarks.decoding.settings import ADAPTER, DRAFTS, OWN_WEIGHTS, Setting
from lskip.evaluation.sweep.cells import remember_rounds
from lskip.inference import Generation, TextGenerator
from lskip.inference.drafting.cost_aware import CostAwareDraft
from lskip.inference.drafting.costs import Costs
from lskip.inference.drafting.draft import DraftPlan
from lskip.inference.drafting.policies import ConfidenceDraft, FixedDraft
from lskip.inference.drafting.registry import round_seconds
from lskip.models.exit_adapter import ExitAdapter

POLICY_CLASSES = {"fixed": FixedDraft, "confidence": ConfidenceDraft, "cost_aware": CostAwareDraft}


class Generators:
    """One model, ready for decoding with each kind of draft weights in batches of each size."""

    def __init__(
        self,
        model: PreTrainedModel,
        release: bool = False,
        exit_adapter: ExitAdapter | None = None,
        draft_tokens: list[int] | None = None,
    ):
        """Prepare to build generators of a model.

        Args:
            release: convert the model instead of copying it; only one generator can then be built.
            exit_adapter: of the draft "adapter".
            draft_tokens: that drafts of layers and of weights choose among; None: all.
        """
        self.model, self.release, self.exit_adapter = model, release, exit_adapter
        self.draft_tokens = draft_tokens
        self.made: dict[tuple[str | None, int], TextGenerator] = {}
        self.costs: dict[TextGenerator, list[Costs]] = defaultdict(list)  # measured again and again

    def drafting_with(self, draft_weights: str | None, batch: int = 1) -> TextGenerator:
        """Return the generator for these draft weights and batch; ValueError if they do not work."""
        if (draft_weights, batch) not in self.made:
            if draft_weights == OWN_WEIGHTS:
                made = copy(self.drafting_with(None, batch))
                made.draft_runner = copy(made.runner)
                vars(made).pop("costs", None)  # measured without a draft runner
            elif draft_weights == ADAPTER:
                made = self._convert(batch, exit_adapter=self.exit_adapter)
            else:
                made = self._convert(batch, draft_weights=draft_weights, draft_tokens=self.draft_tokens)
            self.made[draft_weights, batch] = made
        return self.made[draft_weights, batch]

    def _convert(self, batch: int, **drafting) -> TextGenerator:
        return TextGenerator(self.model, release_model=self.release, batch_size=batch, **drafting)

    def measure_costs(self, batches: Collection[int]) -> None:
        """Measure the costs of generators once more, since a shared machine's speed varies."""
        for (_, batch), made in self.made.items():
            if batch in batches:
                vars(made).pop("costs", None)
                self.costs[made].append(made.costs)

    def by_name(self) -> dict[str, TextGenerator]:
        """Return the costs by the names used in files."""
        return {
            f"{weights or 'none'}{f', batch {batch}' if batch > 1 else ''}": made
            for (weights, batch), made in self.made.items()
        }


class Lskip:
    """`autoregressive`, `control`, `fixed_exit` and `self_speculative`."""

    def __init__(self, generators: Generators, setting: Setting):
        source = DRAFTS.get(setting.draft)
        self.setting, self.costs = setting, generators.costs
        self.generator = generators.drafting_with(source.draft_weights if source else None, setting.batch)
        self.arguments = {"temperature": 0.0, "exit_layer": setting.exit_layer}
        self.rounds: list[tuple[DraftPlan, int]] = []
        if source is not None:
            policy = POLICY_CLASSES[setting.policy]()  # one for all prompts: it learns
            remember_rounds(policy, self.rounds)
            self.arguments |= {
                "draft": source.draft,
                "draft_policy": policy,
                "num_speculations": setting.num_speculations,
            }
        self.generator.settings(**self.arguments)  # ValueError now rather than in an hour

    def run(self, prompts: list[list[int]], max_new_tokens: int) -> Run:
        self.rounds.clear()
        arguments = {**self.arguments, "max_new_tokens": max_new_tokens, "min_new_tokens": max_new_tokens}
        begin = time.perf_counter()
        if self.setting.batch == 1:
            generations = [self.generator.generate(prompt, **arguments) for prompt in prompts]
        else:
            ended = self.generator.generate_batch(prompts, batch_size=self.setting.batch, **arguments)
            generations = [generation for _, generation in sorted(ended, key=lambda pair: pair[0])]
        seconds = time.perf_counter() - begin
        slots = min(self.setting.batch, len(prompts))
        steps = sum(len(generation.token_ids) - 1 for generation in generations) / slots
        planned = partial(self._planned, rounds=list(self.rounds), steps=steps, slots=slots)
        return run_of(generations, seconds)._replace(planned=planned)

    def _planned(self, rounds: list[tuple[DraftPlan, int]], steps: float, slots: int) -> float:
        """Return the cost model's seconds for the rounds, which replaced `steps` undrafted ones.

        The mean over all measured costs.
        """
        measured = self.costs[self.generator] or [self.generator.costs]
        return mean(self._by(costs, rounds, steps, slots) for costs in measured)

    def _by(self, costs: Costs, rounds: list[tuple[DraftPlan, int]], steps: float, slots: int) -> float:
        if self.setting.draft is not None:
            return sum(round_seconds(costs, plan, slots) for plan, slots in rounds)
        if self.setting.exit_layer is None:
            return steps * costs.plain(slots)
        # A token of a fixed exit is what a drafted one is.
        return steps * costs.model.token_seconds(self.setting.exit_layer, slots)


def run_of(generations: list[Generation], seconds: float) -> Run:
    """Return the Run of several generations, without a prediction of the cost model."""
    return Run(
        texts=[generation.token_ids for generation in generations],
        seconds=seconds,
        rounds=sum(generation.rounds for generation in generations),
        drafted=sum(generation.drafted for generation in generations),
        accepted=sum(generation.accepted for generation in generations),
        accepted_counts=sum((generation.accepted_counts for generation in generations), Counter()),
    )


class PromptPass:
    """The prompts' own passes: generating the first token and no more."""

    def __init__(self, generators: Generators, batch: int = 1):
        self.setting = Setting(PROMPT, "", batch=batch)
        self.autoregressive = Lskip(generators, self.setting)

    def run(self, prompts: list[list[int]], max_new_tokens: int) -> Run:
        return self.autoregressive.run(prompts, 1)
