"""The thread that decodes all requests of a server in one continuous batch."""

from __future__ import annotations

import threading
import time
import traceback
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

from lskip.inference import GenerationSettings, TextGenerator
from lskip.inference.decoding.batch import Batch
from lskip.inference.decoding.request import Request, RequestError
from lskip.inference.drafting.costs_file import Learner

PIECES_A_ROUND = 1  # of a prompt, so that the others' next tokens wait for no more than that


class News(NamedTuple):
    """What a round brought to a request.

    Attributes:
        tokens: its new tokens.
        finish_reason: of Generation, with its last ones; else None.
        kinds: how each of them came, as TextRound.kinds.
        error: why it failed, and gets no more; else None.
    """

    tokens: list[int]
    finish_reason: str | None = None
    kinds: list[str] | None = None
    error: Exception | None = None


class BusyError(Exception):
    """As many requests wait as may."""


@dataclass(eq=False)
class Ticket:
    """A request with the engine.

    Attributes:
        request: its generation is complete once a round has brought its end.
        deliver: called in the engine's thread with what each round brings.
        came: time of its coming, of time.perf_counter.
        first: time of its first token; None while there is none.
        last: time of its last token so far.
        told: rounds of it that were told.
    """

    request: Request
    deliver: Callable[[News], None]
    came: float
    first: float | None = None
    last: float = 0.0
    told: int = 0


class Engine:
    """One thread that takes requests into a batch, runs round after round, and tells each request what it got.

    Requests join and leave between rounds. A request that fails fails alone; a failing round fails those under way.
    """

    def __init__(
        self, generator: TextGenerator, settings: GenerationSettings, slots: int, context: int, most_waiting: int
    ):
        """Make room for the texts, and measure what passes cost where the policy goes by that.

        Args:
            settings: how to draft; how tokens are chosen comes with each request.
            slots: texts that are decoded together.
            context: tokens that a prompt and its answer may have together.
            most_waiting: requests that may wait for a slot.
        """
        self.generator, self.context, self.most_waiting = generator, context, most_waiting
        self._learner = Learner(generator.costs_file, settings.draft_policy)
        self._learner.recall()
        self.batch = Batch(
            *(generator.runners, settings, slots, context, lambda: generator.costs),
            pieces_a_round=PIECES_A_ROUND,
            keeps_texts=True,
        )
        self._tickets: dict[Request, Ticket] = {}
        self._wake = threading.Condition()
        self._orders: list[Callable[[], None]] = []  # for the thread, which alone touches the batch
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="lskip engine")

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """End the thread once no request is left; those under way are finished unless they are cancelled."""
        self._order(partial(setattr, self, "_closing", True))
        self._thread.join()
        self._learner.keep()

    @property
    def most(self) -> int:
        """Requests that it takes at a time, those that wait among them."""
        return self.most_waiting + len(self.batch.cache.lengths)

    @property
    def goes(self) -> bool:
        """Whether requests are answered."""
        return self._thread.is_alive() and not self._closing

    @property
    def running(self) -> int:
        """Requests that have a slot."""
        return len(self.batch.requests) + (self.batch.joining is not None)

    @property
    def waiting(self) -> int:
        """Requests that have none yet."""
        return max(len(self._tickets) - self.running, 0)

    def prepare(self, prompt, settings: GenerationSettings, index: int = 0) -> Request:
        """Return the request of a prompt, one of several of a client; ValueError where no room is left for an answer.

        Args:
            index: its place among them, which its seed depends on.
        """
        request = self.generator.prepare(prompt, settings, index)
        room = self.context - len(request.prompt)
        if room < 1:
            raise ValueError(
                f"prompt: {len(request.prompt)} tokens leave no room for an answer in the {self.context} that are kept"
                " here for both"
            )
        if room < request.stop.max_new_tokens:
            request.stop = replace(request.stop, max_new_tokens=room, limit="context")
        return request

    def submit(self, requests: list[Request], deliver: Callable[[int, News], None]) -> list[Ticket]:
        """Queue requests, all or none.

        Args:
            deliver: called in the engine's thread with a request's place in the list and its news.

        Raises:
            BusyError: too many wait.
        """
        with self._wake:
            if self._closing or len(self._tickets) + len(requests) > self.most:
                raise BusyError
            came = time.perf_counter()
            tickets = [Ticket(each, partial(deliver, place), came) for place, each in enumerate(requests)]
            self._tickets |= {ticket.request: ticket for ticket in tickets}
        for request in requests:
            self._order(partial(self.batch.add, request))
        return tickets

    def cancel(self, ticket: Ticket) -> None:
        """Free a request's slot before the next round, unless it has ended."""
        self._order(partial(self._cancel, ticket.request))

    def call(self, work: Callable[[], Any]) -> Future:
        """Return the outcome of `work`, done in the engine's thread between two rounds, as the model is its own."""
        future: Future = Future()

        def do() -> None:
            try:
                future.set_result(work())
            except Exception as error:
                future.set_exception(error)

        self._order(do)
        return future

    def _order(self, order: Callable[[], None]) -> None:
        with self._wake:
            self._orders.append(order)
            self._wake.notify()

    def _run(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._orders or self.batch.busy or self._closing)
                orders, self._orders = self._orders, []
            for order in orders:
                order()
            if self.batch.busy:
                self._round()
            elif self._closing:
                return
            if not self.batch.busy:
                self._learner.keep()  # while nobody waits

    def _round(self) -> None:
        under_way = [*self.batch.requests, *([self.batch.joining.request] if self.batch.joining else ())]
        try:
            self._tell_all(self.batch.round())
        except RequestError as error:
            self._tell_all(error.news)
            self._fail([error.request], error)
        except Exception as error:  # whatever it is: the server goes on with those that wait
            traceback.print_exc()
            self._fail(under_way, error)

    def _tell_all(self, news: list[tuple[Request, list[int]]]) -> None:
        for request, tokens in news:
            if (ticket := self._tickets.get(request)) is not None:
                rounds = request.generation.history[ticket.told :]
                ticket.told += len(rounds)
                kinds = [kind for each in rounds for kind in each.kinds]
                self._tell(request, News(tokens, request.generation.finish_reason, kinds))

    def _fail(self, requests: list[Request], error: Exception) -> None:
        for request in requests:
            self._tell(request, News([], error=error))
            self._cancel(request)

    def _tell(self, request: Request, news: News) -> None:
        if (ticket := self._tickets.get(request)) is None:
            return
        ticket.last = time.perf_counter()
        if ticket.first is None:
            ticket.first = ticket.last
        if request.ended:
            del self._tickets[request]
        ticket.deliver(news)

    def _cancel(self, request: Request) -> None:
        self._tickets.pop(request, None)
        self.batch.cancel(request)
