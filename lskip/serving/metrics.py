"""What the server counts and times, for Prometheus."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from lskip.serving.engine import Engine, Ticket
from lskip.serving.lanes import Endpoint

# Seconds: of a small model on a GPU, and of a long prompt on a laptop.
FIRST = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
EACH = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)


class Counters:
    """All counters of a server, each by model."""

    def __init__(self):
        self.registry = CollectorRegistry()
        self.ended = self._counter("requests", "requests that have ended, by how", "outcome")
        self.tokens = {
            name: self._counter(f"{name}_tokens", f"{name} tokens")
            for name in ("prompt", "cached_prompt", "generated", "drafted", "accepted")
        }
        self.rounds = self._counter("rounds", "passes of the whole model over a text")
        self.first = self._histogram("time_to_first_token_seconds", "from a request's coming", FIRST)
        self.each = self._histogram("time_per_token_seconds", "mean of a request, the first token left out", EACH)
        self.running = self._gauge("requests_running", "requests that have a slot")
        self.waiting = self._gauge("requests_waiting", "requests that have none yet")
        self.acceptance_rate = self._gauge("acceptance_rate", "accepted over drafted tokens")
        self.tokens_per_round = self._gauge("tokens_per_round", "tokens that a round adds")

    def text(self) -> bytes:
        """Return all of them in Prometheus' form."""
        return generate_latest(self.registry)

    def _counter(self, name: str, what: str, *labels: str) -> Counter:
        return Counter(f"lskip_{name}", what, ("model", *labels), registry=self.registry)

    def _histogram(self, name: str, what: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"lskip_{name}", what, ("model",), buckets=buckets, registry=self.registry)

    def _gauge(self, name: str, what: str) -> Gauge:
        return Gauge(f"lskip_{name}", what, ("model",), registry=self.registry)


class Metrics:
    """Counts and times of one model's requests."""

    def __init__(self, endpoint: Endpoint, engine: Engine, counters: Counters):
        model, *lanes = endpoint
        self.model = model
        self._ended = counters.ended
        self._tokens = {name: counter.labels(model) for name, counter in counters.tokens.items()}
        self._rounds, self._first, self._each = (
            each.labels(model) for each in (counters.rounds, counters.first, counters.each)
        )
        self._total = {"generated": 0, "drafted": 0, "accepted": 0, "rounds": 0}
        gauges: dict[Gauge, Callable[[], float]] = {
            counters.running: lambda: engine.running(*lanes),
            counters.waiting: lambda: engine.waiting(*lanes),
            counters.acceptance_rate: lambda: self._ratio("accepted", "drafted"),
            counters.tokens_per_round: lambda: self._ratio("generated", "rounds"),
        }
        for gauge, value in gauges.items():
            gauge.labels(model).set_function(value)

    def refused(self, why: str) -> None:
        """Count a request that the engine did not get."""
        self._ended.labels(self.model, why).inc()

    def ended(self, ticket: Ticket, outcome: str) -> None:
        """Count a request that has ended: by its finish_reason, or "cancelled" or "error"."""
        self._ended.labels(self.model, outcome).inc()
        done = ticket.request.generation
        counts = {"generated": len(done.token_ids), "drafted": done.drafted, "accepted": done.accepted}
        prompts = {"prompt": done.prompt_tokens, "cached_prompt": done.cached_prompt_tokens}
        for name, count in (*counts.items(), *prompts.items()):
            self._tokens[name].inc(count)
        self._rounds.inc(done.rounds)
        for name, count in (*counts.items(), ("rounds", done.rounds)):
            self._total[name] += count
        if ticket.first is not None:
            self._first.observe(ticket.first - ticket.came)
            if len(done.token_ids) > 1:
                self._each.observe((ticket.last - ticket.first) / (len(done.token_ids) - 1))

    def _ratio(self, part: str, whole: str) -> float:
        return self._total[part] / self._total[whole] if self._total[whole] else 0.0
