"""Prometheus metrics, in a registry of their own."""

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector

from megatron_star.engine.expert_load import ExpertLoad
from megatron_star.engine.request import StarResult
from megatron_star.engine.thread import EngineThread
from megatron_star.server.contexts import ContextRegistry

PREFIX = "megatron_star"
STORE_COUNTS = {
    "restored": "contexts that were read from the store",
    "missed": "contexts that were not in the store",
    "unusable": "contexts of the store that could not be read",
    "written": "contexts that were written to the store",
    "bytes_written": "bytes of these",
}
TTFT_BUCKETS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0)
TPOT_BUCKETS = (0.003, 0.01, 0.02, 0.03, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0, 3.0)


class EngineCollector(Collector):
    """Reads the engine's own numbers when somebody asks."""

    def __init__(self, engine: EngineThread) -> None:
        self.engine = engine

    def collect(self) -> Iterable[Metric]:
        """Gauges of this moment."""
        stats = self.engine.stats()
        for key, help_text in (
            ("waiting", "sequences that wait"),
            ("running", "sequences that run"),
            ("cached_contexts", "contexts whose KV is held or being made"),
            ("context_encodings", "contexts that were encoded since the start"),
            ("kv_budget_bytes_per_rank", "KV that a CP rank may hold"),
        ):
            yield GaugeMetricFamily(f"{PREFIX}_{key}", help_text, value=stats[key])
        for key, help_text in (
            ("proposed_tokens", "tokens that were guessed and verified, several a step"),
            ("accepted_tokens", "tokens of these that were right"),
        ):
            yield CounterMetricFamily(f"{PREFIX}_{key}", help_text, value=stats[key])
        for key, value in stats["context_store"].items():
            help_text = STORE_COUNTS[key]
            yield CounterMetricFamily(f"{PREFIX}_context_store_{key}", help_text, value=value)
        used = GaugeMetricFamily(f"{PREFIX}_kv_bytes", "KV that is reserved on a CP rank", labels=["cp_rank"])
        for rank, size in enumerate(stats["kv_bytes_per_rank"]):
            used.add_metric([str(rank)], size)
        yield used
        kept_in = {"dtype": stats["kv_dtype"]}
        yield InfoMetricFamily(f"{PREFIX}_kv", "what contexts are kept in", value=kept_in)


class ExpertCollector(Collector):
    """Has the ranks report how tokens spread over experts when somebody asks."""

    def __init__(self, engine: EngineThread, *, each_expert: bool) -> None:
        """each_expert: count the tokens of every expert of every layer, which may be 15,000 series."""
        self.engine, self.each_expert = engine, each_expert

    def collect(self) -> Iterable[Metric]:
        """Nothing of a model without experts."""
        load = self.engine.expert_load()
        if load is None:
            return
        for key, of_layers, help_text in (
            ("expert_busiest_over_mean", load.busiest_expert, "tokens of a layer's busiest expert"),
            ("expert_rank_busiest_over_mean", load.busiest_rank, "tokens of the rank with most of a layer"),
        ):
            recent = f"{help_text} over the mean of all, since /metrics was asked before"
            gauge = GaugeMetricFamily(f"{PREFIX}_{key}", recent, labels=["layer"])
            for layer, ratio in zip(load.layers, of_layers, strict=True):
                gauge.add_metric([str(layer)], ratio)
            yield gauge
        ranks = CounterMetricFamily(
            f"{PREFIX}_expert_rank_tokens", "tokens that a rank's experts were given", labels=["ep_rank"]
        )
        for rank, tokens in enumerate(load.tokens_of_ranks):
            ranks.add_metric([str(rank)], tokens)
        yield ranks
        if self.each_expert:
            yield self._of_each_expert(load)

    def _of_each_expert(self, load: ExpertLoad) -> Metric:
        experts = CounterMetricFamily(
            f"{PREFIX}_expert_tokens", "tokens that an expert was given", labels=["layer", "expert"]
        )
        for layer, of_experts in zip(load.layers, load.total.tolist(), strict=True):
            for expert, tokens in enumerate(of_experts):
                experts.add_metric([str(layer), str(expert)], tokens)
        return experts


class ServerMetrics:
    """What is counted per request; the rest comes from the engine."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        registry = {"registry": self.registry}
        self.requests = Counter(
            f"{PREFIX}_http_requests", "HTTP requests", ["route", "method", "status"], **registry
        )
        self.errors = Counter(f"{PREFIX}_errors", "requests that failed", ["kind"], **registry)
        self.tokens = Counter(f"{PREFIX}_tokens", "tokens of ended sequences", ["kind"], **registry)
        self.ended = Counter(f"{PREFIX}_sequences_ended", "ended sequences", ["reason"], **registry)
        self.cache_hits = Counter(
            f"{PREFIX}_context_cache_hits", "sequences whose whole context was encoded already", **registry
        )
        self.dropped_lines = Counter(
            f"{PREFIX}_log_lines_dropped", "log lines that nobody read in time", **registry
        )
        self.ttft = Histogram(
            f"{PREFIX}_ttft_seconds",
            "until the first token, queue included",
            buckets=TTFT_BUCKETS,
            **registry,
        )
        self.tpot = Histogram(
            f"{PREFIX}_tpot_seconds", "per token after the first", buckets=TPOT_BUCKETS, **registry
        )

    def watch(self, engine: EngineThread, *, each_expert: bool = False) -> None:
        """Add the engine's gauges, and what its experts were given."""
        self.registry.register(EngineCollector(engine))
        self.registry.register(ExpertCollector(engine, each_expert=each_expert))

    def watch_keys(self, usage: Collector) -> None:
        """Add what keys have in flight, and their tokens."""
        self.registry.register(usage)

    def watch_contexts(self, contexts: ContextRegistry) -> None:
        """Add the gauges of contexts that clients have sent ahead."""
        for key, help_text, function in (
            ("kept_contexts", "contexts that were sent to /v1/contexts and are kept", contexts.num_kept),
            ("kept_contexts_bytes", "memory of their texts and tokens, without KV", contexts.num_bytes),
        ):
            Gauge(f"{PREFIX}_{key}", help_text, registry=self.registry).set_function(function)

    def note_result(self, result: StarResult) -> None:
        """A sequence has ended."""
        self.ended.labels(result.finish_reason).inc()
        self.tokens.labels("context").inc(result.num_context_tokens)
        self.tokens.labels("context_cached").inc(result.num_cached_tokens)
        self.tokens.labels("query").inc(result.num_query_tokens)
        self.tokens.labels("generated").inc(len(result.tokens))
        self.cache_hits.inc(int(result.cache_hit))
        if result.tokens:
            self.ttft.observe(result.timings.queue_s + result.timings.ttft_s)
        if len(result.tokens) > 1:
            self.tpot.observe(result.timings.tpot_s)

    def note_response(self, *, route: str, method: str, status: int, error: str | None) -> None:
        """An HTTP request was answered, or given up."""
        self.requests.labels(route, method, str(status)).inc()
        if error:
            self.errors.labels(error).inc()

    def note_dropped_lines(self, count: int) -> None:
        """So many lines more did not get into the log."""
        self.dropped_lines.inc(count)

    def text(self) -> bytes:
        """The exposition format."""
        return generate_latest(self.registry)
