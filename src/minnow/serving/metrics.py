"""What /metrics tells Prometheus."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Metrics:
    """The counters of one server, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "minnow_requests", "Requests by path and status", ["path", "status"], registry=self.registry
        )
        self.prompt_tokens = Counter("minnow_prompt_tokens", "Tokens read", ["model"], registry=self.registry)
        self.cached_tokens = Counter(
            "minnow_cached_prompt_tokens", "Of these, found in the cache", ["model"], registry=self.registry
        )
        self.generated_tokens = Counter("minnow_generated_tokens", "Tokens written", ["model"], registry=self.registry)
        self.aborted = Counter(
            "minnow_aborted_requests", "Requests whose client left early", ["model"], registry=self.registry
        )
        self.first_token_seconds = Histogram(
            "minnow_time_to_first_token_seconds",
            "From a request's arrival in the engine to its first token",
            ["model"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.request_seconds = Histogram(
            "minnow_request_seconds",
            "From a request's arrival in the engine to its last token",
            ["model"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self._in_flight = Gauge(
            "minnow_answers_in_flight",
            "Answers under way and waiting, those of its adapters and requests for embeddings among them",
            ["model"],
            registry=self.registry,
        )

    def watch_in_flight(self, model: str, count: Callable[[], int]) -> None:
        """Report `count()` as the model's answers under way and waiting."""
        self._in_flight.labels(model).set_function(count)

    def text(self) -> bytes:
        """Prometheus' text format."""
        return generate_latest(self.registry)
