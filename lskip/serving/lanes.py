"""Batches of a server that take turns on its one thread: what drafts, or how early texts exit, is common to a batch."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

from lskip.inference import GenerationSettings, TextGenerator
from lskip.inference.decoding.batch import Batch
from lskip.inference.decoding.request import Request, RequestError
from lskip.inference.drafting.costs_file import Learner
from lskip.inference.exit_criteria import Entropy, ExitCriterion, LearnedExit, Margin, Saturation

CRITERIA: dict[str, type[ExitCriterion]] = {kind.__name__: kind for kind in (Entropy, LearnedExit, Margin, Saturation)}


class Lane:
    """A continuous batch of texts that are drafted alike, or leave the model at the same exit.

    Attributes:
        generator: prepares and decodes its requests.
        slots: texts that are decoded together.
        context: tokens that a prompt and its answer may have together.
    """

    def __init__(self, generator: TextGenerator, settings: GenerationSettings, slots: int, context: int):
        """Make room for the texts, and measure what passes cost where the policy goes by that.

        Args:
            settings: how to draft, or where to exit; how tokens are chosen comes with each request.
        """
        self.generator, self.slots, self.context = generator, slots, context
        self._learner = Learner(generator.costs_file, settings.draft_policy)
        self._learner.recall()
        self.batch = Batch(
            *(generator.runners, settings, slots, context, lambda: generator.costs),
            bounds_prefill=True,
            keeps_texts=True,
        )

    @property
    def nbytes(self) -> int:
        """Bytes that the texts' keys and values take."""
        return self.batch.cache.nbytes

    @property
    def busy(self) -> bool:
        """Whether a request of it has not ended."""
        return self.batch.busy

    @property
    def under_way(self) -> list[Request]:
        """Requests that have a slot."""
        joining = self.batch.joining
        return [*self.batch.requests, *([] if joining is None else [joining.request])]

    def add(self, request: Request) -> None:
        """Queue a request."""
        self.batch.add(request)

    def cancel(self, request: Request) -> None:
        """Take a request out, whether it waits or runs."""
        self.batch.cancel(request)

    def steps(self) -> Iterator[list[tuple[Request, list[int]]]]:
        """Run a round, as Batch.steps."""
        return self.batch.steps()

    def keep(self) -> None:
        """Write what the policy has learnt."""
        self._learner.keep()


@dataclass(frozen=True)
class EarlyExit:
    """Where a text leaves the model for good, so that it is another one than the whole model's.

    Attributes:
        exit_layer: blocks that run; None: all.
        criterion: name of the criterion by which each token exits, never behind exit_layer; None: there is none.
        threshold: of the criterion.
    """

    exit_layer: int | None = None
    criterion: str | None = None
    threshold: float = 0.0

    def settings(self) -> dict[str, int | ExitCriterion | None]:
        """Return it as settings of a generation."""
        criterion = None if self.criterion is None else CRITERIA[self.criterion](self.threshold)
        return {"exit_layer": self.exit_layer, "exit_criterion": criterion}


class ExitLane:
    """Lane of one model's requests that exit early: those that ask for the same exit are decoded together.

    One that asks for another exit than those before it waits until they have ended, and so do all behind it: nobody is
    overtaken, and there is memory for one batch, from the first request on.
    """

    def __init__(self, generator: TextGenerator, slots: int, context: int):
        self.generator, self.slots, self.context = generator, slots, context
        self._lane: Lane | None = None
        self._exit: EarlyExit | None = None
        self._waiting: deque[tuple[Request, EarlyExit]] = deque()

    @property
    def busy(self) -> bool:
        """Whether a request of it has not ended."""
        return bool(self._waiting) or (self._lane is not None and self._lane.busy)

    @property
    def under_way(self) -> list[Request]:
        """Requests that have a slot."""
        return [] if self._lane is None else self._lane.under_way

    def add(self, request: Request, early_exit: EarlyExit) -> None:
        """Queue a request."""
        self._waiting.append((request, early_exit))

    def cancel(self, request: Request) -> None:
        """Take a request out, whether it waits or runs."""
        self._waiting = deque(each for each in self._waiting if each[0] is not request)
        if self._lane is not None:
            self._lane.cancel(request)

    def steps(self) -> Iterator[list[tuple[Request, list[int]]]]:
        """Let those join that ask for the exit of the batch, and run a round, as Batch.steps."""
        while self._waiting:
            request, early_exit = self._waiting[0]
            if early_exit != self._exit:
                if self._lane is not None and self._lane.busy:
                    break
                self._turn_to(early_exit, request)
            self._lane.add(request)
            self._waiting.popleft()
        if self._lane is not None:
            yield from self._lane.steps()

    def keep(self) -> None:
        """Do nothing: an exit learns nothing."""

    def _turn_to(self, early_exit: EarlyExit, request: Request) -> None:
        """Make a batch for another exit; RequestError where that does not work, for the request that asked."""
        self._lane = self._exit = None  # frees its memory first
        try:
            settings = self.generator.settings(**early_exit.settings())
            self._lane = Lane(self.generator, settings, self.slots, self.context)
        except Exception as error:
            self._waiting.popleft()
            raise RequestError(request, ValueError(str(error))) from error
        self._exit = early_exit


class Endpoint(NamedTuple):
    """What a name stands for that clients give as the model.

    Attributes:
        lane: of its requests that say nothing of an early exit.
        exits: of those that do.
    """

    name: str
    lane: Lane
    exits: ExitLane


def prepare_request(lane: Lane | ExitLane, prompt: str | list, settings: GenerationSettings, index: int = 0) -> Request:
    """Return the request of a prompt, one of several of a client; ValueError where no room is left for an answer.

    Args:
        index: its place among them, which its seed depends on.
    """
    request = lane.generator.prepare(prompt, settings, index)
    room = lane.context - len(request.prompt)
    if room < 1:
        raise ValueError(
            f"prompt: {len(request.prompt)} tokens leave no room for an answer in the {lane.context} that are kept"
            " here for both"
        )
    if room < request.stop.max_new_tokens:
        request.stop = replace(request.stop, max_new_tokens=room, limit="context")
    return request
