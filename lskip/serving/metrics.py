"""What the server counts and times, for Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from lskip.serving.engine import Engine, Ticket

# Seconds: of a small model on a GPU, and of a long prompt on a laptop.
FIRST = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
EACH = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)


class Metrics:
    """Counts and times of one model's requests."""

    def __init__(self, model: str, engine: Engine):
        self.registry, self.model = CollectorRegistry(), model
        self._ended = self._counter("requests", "requests that have ended, by how", "outcome")
        self._tokens = {
            name: self._counter(f"{name}_tokens", f"{name} tokens").labels(model)
            for name in ("prompt", "cached_prompt", "generated", "drafted", "accepted")
        }
        self._rounds = self._counter("rounds", "passes of the whole model over a text").labels(model)
        self._first = self._histogram("time_to_first_token_seconds", "from a request's coming", FIRST)
        self._each = self._histogram("time_per_token_seconds", "mean of a request, the first token left out", EACH)
        self._gauge("requests_running", "requests that have a slot", lambda: engine.running)
        self._gauge("requests_waiting", "requests that have none yet", lambda: engine.waiting)
        self._total = {"generated": 0, "drafted": 0, "accepted": 0, "rounds": 0}
        self._gauge("acceptance_rate", "accepted over drafted tokens", lambda: self._ratio("accepted", "drafted"))
        self._gauge("tokens_per_round", "tokens that a round adds", lambda: self._ratio("generated", "rounds"))

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

    def text(self) -> bytes:
        """Return all of them in Prometheus' form."""
        return generate_latest(self.registry)

    def _counter(self, name: str, what: str, *labels: str) -> Counter:
        return Counter(f"lskip_{name}", what, ("model", *labels), registry=self.registry)

    def _histogram(self, name: str, what: str, buckets: tuple[float, ...]):
        found = Histogram(f"lskip_{name}", what, ("model",), buckets=buckets, registry=self.registry)
        return found.labels(self.model)

    def _gauge(self, name: str, what: str, value) -> None:
        Gauge(f"lskip_{name}", what, ("model",), registry=self.registry).labels(self.model).set_function(value)

    def _ratio(self, part: str, whole: str) -> float:
        return self._total[part] / self._total[whole] if self._total[whole] else 0.0
