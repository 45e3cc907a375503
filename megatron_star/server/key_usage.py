"""What each key has in flight, and what it may have."""

import threading
from collections import Counter
from collections.abc import Iterable

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from megatron_star.engine.request import StarRequest, StarResult
from megatron_star.server.errors import RequestError
from megatron_star.server.keys import KeyLimits

PREFIX = "megatron_star_key"


def tokens_in_flight(request: StarRequest) -> int:
    """Of context and query, and that may be generated."""
    prompt = len(request.context_tokens) + len(request.query_tokens)
    return prompt + request.sampling.num_tokens_to_generate


class KeyUsage(Collector):
    """Counts by names of keys; where no key is asked for, the name is "". Any thread may call it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._sequences, self._tokens = Counter[str](), Counter[str]()
        self._ended = Counter[tuple[str, str]]()

    def take_sequences(self, limits: KeyLimits, count: int) -> None:
        """So many more are in flight. Raises RequestError, and takes nothing, if they are too many."""
        self._take(self._sequences, limits, count, "max_requests", "sequences (prompts times n)")

    def take_tokens(self, limits: KeyLimits, count: int) -> None:
        """The same of tokens."""
        self._take(self._tokens, limits, count, "max_tokens", "tokens (context, query and generated)")

    def give_back(self, name: str, *, sequences: int = 0, tokens: int = 0) -> None:
        """They have ended."""
        with self._lock:
            self._sequences[name] -= sequences
            self._tokens[name] -= tokens

    def note_result(self, name: str, result: StarResult) -> None:
        """A sequence of this key has ended."""
        with self._lock:
            self._ended[name, "context"] += result.num_context_tokens
            self._ended[name, "context_cached"] += result.num_cached_tokens
            self._ended[name, "query"] += result.num_query_tokens
            self._ended[name, "generated"] += len(result.tokens)

    def collect(self) -> Iterable[Metric]:
        """Series of keys that have been used; none where no key is asked for."""
        with self._lock:
            counts, ended = (self._sequences.copy(), self._tokens.copy()), self._ended.copy()
        for count, kind in zip(counts, ("sequences", "tokens"), strict=True):
            gauge = GaugeMetricFamily(
                f"{PREFIX}_{kind}_in_flight", f"{kind} of a key that wait or run", labels=["key"]
            )
            for name in filter(None, count):
                gauge.add_metric([name], count[name])
            yield gauge
        total = CounterMetricFamily(
            f"{PREFIX}_tokens", "tokens of a key's ended sequences", labels=["key", "kind"]
        )
        for (name, kind), number in ended.items():
            if name:
                total.add_metric([name, kind], number)
        yield total

    def _take(self, taken: Counter[str], limits: KeyLimits, count: int, limit: str, what: str) -> None:
        most = getattr(limits, limit)
        if most is not None and count > most:
            raise RequestError(
                400, f"{count} {what} are more than the {most} of key {limits.name!r} ({limit})"
            )
        with self._lock:
            if most is not None and taken[limits.name] + count > most:
                raise RequestError(
                    429,
                    f"key {limits.name!r} has {taken[limits.name]} of {most} {what} in flight, and {count} "
                    f"more would be too many ({limit}): try again later",
                )
            taken[limits.name] += count
