"""The thread that decodes all requests of a server, in continuous batches that take turns."""

from __future__ import annotations

import threading
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

from lskip.inference.decoding.request import Request, RequestError
from lskip.serving.lanes import EarlyExit, ExitLane, Lane


class News(NamedTuple):
    """What a round brought to a request.

    Attributes:
        tokens: its new tokens.
        finish_reason: of Generation, with its last ones; else None.
        kinds: how each of them came, as TextRound.kinds.
        logprobs: their log probabilities, where they were asked for.
        error: why it failed, and gets no more; else None.
    """

    tokens: list[int]
    finish_reason: str | None = None
    kinds: list[str] | None = None
    logprobs: list[float] | None = None
    error: Exception | None = None


class BusyError(Exception):
    """As many requests wait as may."""


@dataclass(eq=False)
class Ticket:
    """A request with the engine.

    Attributes:
        request: its generation is complete once a round has brought its end.
        lane: that decodes it.
        deliver: called in the engine's thread with what each round brings.
        came: time of its coming, of time.perf_counter.
        first: time of its first token; None while there is none.
        last: time of its last token so far.
        told: rounds of it that were told.
    """

    request: Request
    lane: Lane | ExitLane
    deliver: Callable[[News], None]
    came: float
    first: float | None = None
    last: float = 0.0
    told: int = 0


class Engine:
    """One thread that decodes all requests: each lane that has any gets a round in turn.

    Requests join and leave between rounds. A request that fails fails alone; a failing round fails those under way.
    """

    def __init__(self, lanes: Sequence[Lane | ExitLane], most_waiting: int):
        """Take lanes, which are the thread's from now on.

        Args:
            most_waiting: requests of a lane that may wait for a slot.
        """
        self.lanes, self.most_waiting = lanes, most_waiting
        self._tickets: dict[Request, Ticket] = {}
        self._wake = threading.Condition()
        self._orders: list[Callable[[], None]] = []  # for the thread, which alone touches the lanes
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="lskip engine")

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """End the thread once no request is left; those under way are finished unless they are cancelled."""
        self._order(partial(setattr, self, "_closing", True))
        self._thread.join()
        for lane in self.lanes:
            lane.keep()

    @property
    def goes(self) -> bool:
        """Whether requests are answered."""
        return self._thread.is_alive() and not self._closing

    def running(self, *lanes: Lane | ExitLane) -> int:
        """Return the requests of lanes that have a slot."""
        return sum(len(lane.under_way) for lane in lanes)

    def waiting(self, *lanes: Lane | ExitLane) -> int:
        """Return the requests of lanes that have none yet."""
        return max(sum(self._held(lane) for lane in lanes) - self.running(*lanes), 0)

    def most(self, lane: Lane | ExitLane) -> int:
        """Return the requests that a lane takes at a time, those that wait among them."""
        return self.most_waiting + lane.slots

    def submit(
        self, lane: Lane | ExitLane, requests: list[Request], deliver: Callable[[int, News], None], *how: EarlyExit
    ) -> list[Ticket]:
        """Queue requests, all or none.

        Args:
            deliver: called in the engine's thread with a request's place in the list and its news.
            how: of an ExitLane the exit.

        Raises:
            BusyError: too many wait.
        """
        with self._wake:
            if self._closing or self._held(lane) + len(requests) > self.most(lane):
                raise BusyError
            came = time.perf_counter()
            tickets = [Ticket(each, lane, partial(deliver, place), came) for place, each in enumerate(requests)]
            self._tickets |= {ticket.request: ticket for ticket in tickets}
        for request in requests:
            self._order(partial(lane.add, request, *how))
        return tickets

    def cancel(self, ticket: Ticket) -> None:
        """Free a request's slot before the next round, unless it has ended."""
        self._order(partial(self._cancel, ticket))

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

    def _held(self, lane: Lane | ExitLane) -> int:
        """Return the requests of a lane that have not ended."""
        return sum(ticket.lane is lane for ticket in list(self._tickets.values()))

    def _order(self, order: Callable[[], None]) -> None:
        with self._wake:
            self._orders.append(order)
            self._wake.notify()

    def _run(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._orders or self._closing or any(lane.busy for lane in self.lanes))
            self._take_orders()
            busy = [lane for lane in self.lanes if lane.busy]
            if not busy and self._closing:
                return
            for lane in busy:
                self._round(lane)
                if not lane.busy:
                    lane.keep()  # while nobody waits for it

    def _take_orders(self) -> None:
        with self._wake:
            orders, self._orders = self._orders, []
        for order in orders:
            order()

    def _round(self, lane: Lane | ExitLane) -> None:
        """Run a round of a lane. What came meanwhile joins in it, as far as there is room."""
        try:
            for news in lane.steps():
                self._tell_all(news)
                self._take_orders()
        except RequestError as error:
            self._fail([error.request], error)
        except Exception as error:  # whatever it is: the server goes on with those that wait
            traceback.print_exc()
            self._fail(lane.under_way, error)

    def _tell_all(self, news: list[tuple[Request, list[int]]]) -> None:
        for request, tokens in news:
            if (ticket := self._tickets.get(request)) is not None:
                done = request.generation
                rounds = done.history[ticket.told :]
                ticket.told += len(rounds)
                kinds = [kind for each in rounds for kind in each.kinds]
                logprobs = done.logprobs[len(done.logprobs) - len(tokens) :] if done.logprobs else None
                self._tell(ticket, News(tokens, done.finish_reason, kinds, logprobs))

    def _fail(self, requests: list[Request], error: Exception) -> None:
        for request in requests:
            if (ticket := self._tickets.get(request)) is not None:
                self._tell(ticket, News([], error=error))
                self._cancel(ticket)

    def _tell(self, ticket: Ticket, news: News) -> None:
        ticket.last = time.perf_counter()
        if ticket.first is None:
            ticket.first = ticket.last
        if ticket.request.ended:
            del self._tickets[ticket.request]
        ticket.deliver(news)

    def _cancel(self, ticket: Ticket) -> None:
        self._tickets.pop(ticket.request, None)
        ticket.lane.cancel(ticket.request)
