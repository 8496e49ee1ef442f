"""Prometheus metrics of a server, in a collector registry of its own."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from t2kernels.serve.engine.engine import Engine
from t2kernels.serve.experts.registry import MIXED, REMOVED, ExpertRegistry

SECONDS: tuple[float, ...] = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
"""Buckets of the time to the first token."""
SECONDS_PER_TOKEN: tuple[float, ...] = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1)
"""Buckets of the time for each token after the first."""


class Metrics:
    """The metrics of a server. Their label `expert` is "base", an expert's name, "mix" (every mixture) or "removed".

    "removed" stands for all names that are gone, so the number of labels stays bounded however many names come and go.
    """

    registry: CollectorRegistry
    requests: Counter
    tokens_in: Counter
    tokens_out: Counter
    first: Histogram
    each: Histogram

    def __init__(self, engine: Engine, experts: ExpertRegistry) -> None:
        self.registry = CollectorRegistry()
        by_expert = {"labelnames": ("expert",), "registry": self.registry}
        self.requests = Counter("t2_requests", "Requests that have ended", ("expert", "status"), registry=self.registry)
        self.tokens_in = Counter("t2_prompt_tokens", "Tokens of prompts", **by_expert)
        self.tokens_out = Counter("t2_generated_tokens", "Tokens generated", **by_expert)
        self.first = Histogram(
            "t2_time_to_first_token_seconds", "From acceptance to the first token", buckets=SECONDS, **by_expert
        )
        self.each = Histogram(
            "t2_seconds_per_token",
            "From the first token to the last, for each after the first",
            buckets=SECONDS_PER_TOKEN,
            **by_expert,
        )
        self.registry.register(_State(engine, experts))

    def forget(self, expert: str) -> None:
        """Drop the series of an expert, because the series of removed names must not pile up."""
        for metric in (self.requests, self.tokens_in, self.tokens_out, self.first, self.each):
            metric.remove_by_labels({"expert": expert})

    def text(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self.registry)


class _State:
    """Gauges and counters that are read from the engine and the registry when Prometheus collects."""

    def __init__(self, engine: Engine, experts: ExpertRegistry) -> None:
        self.engine, self.experts = engine, experts

    def collect(self) -> Iterable[Metric]:
        engine, bank, counts = self.engine, self.engine.bank, self.experts.counts
        for name, text, value in (
            ("t2_rows", "Rows of the tables, row 0 (the base model) included", bank.rows),
            ("t2_rows_in_use", "Rows that requests hold", bank.rows_in_use),
            ("t2_experts", "Versions of experts in the bank", len(bank)),
            ("t2_requests_waiting", "Accepted requests that have not started", len(engine.waiting)),
            ("t2_requests_running", "Requests in the batch", len(engine.running)),
            ("t2_kv_free", "Share of the KV cache that is free", engine.free_cache()),
            ("t2_ready", "1 while requests are taken", int(not engine.draining and engine.failure is None)),
        ):
            yield GaugeMetricFamily(name, text, value=value)
        for name, text, by_label in (
            ("t2_expert_loads", "Experts and mixtures written into a row", counts.loads),
            ("t2_expert_evictions", "Experts and mixtures that gave up their row to another", counts.evictions),
        ):
            family = CounterMetricFamily(name, text, labels=("expert",))
            for label in (MIXED, REMOVED, *self.experts.current):
                family.add_metric((label,), by_label[label])
            yield family
