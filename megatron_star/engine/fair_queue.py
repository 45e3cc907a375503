"""Who is next where several want one thing: fair queueing by start times (Goyal, Vin and Cheng, 1996).

Each flow has a virtual time at which its next piece of work starts; the earliest is next. A piece moves its
flow's start on by its work over the flow's weight. So of flows that always want something, each gets work in
proportion to its weight, and one that comes anew starts at the present time: it has neither saved anything up
nor to make up for anything.
"""

from bisect import insort
from collections.abc import Collection, Hashable, Iterable, Iterator
from itertools import count

from megatron_star.engine.scheduled_request import ScheduledRequest

MAX_TOKENS_FED_AT_ONCE = 512
"""Of one query in one step, so that a long query does not hold up the sequences beside it."""
MAX_TOKENS_SCORED_AT_ONCE = 128
"""The same, where the logits of all of them are wanted."""


class FairShares[Flow: Hashable]:
    """Virtual times of flows."""

    def __init__(self) -> None:
        self._now = 0.0
        self._starts: dict[Flow, float] = {}

    def start(self, flow: Flow) -> float:
        """When its next piece of work starts."""
        return max(self._now, self._starts.get(flow, 0.0))

    def in_order(self, flows: Iterable[Flow]) -> list[Flow]:
        """The next one first; of equals, as they are given."""
        return sorted(flows, key=self.start)

    def charge(self, flow: Flow, work: float, waiting: Collection[Flow]) -> None:
        """A flow has its next piece of work.

        Args:
            work: over the flow's weight.
            waiting: flows that want something, this one included.
        """
        self._now = min(map(self.start, waiting))
        self._starts[flow] = self.start(flow) + work
        self._starts = {other: start for other, start in self._starts.items() if start > self._now}

    def refund(self, flow: Flow, work: float) -> None:
        """A piece of its work was smaller than it was charged for."""
        if flow in self._starts:
            self._starts[flow] -= work


class WaitingRequests[Request: ScheduledRequest]:
    """Requests that wait to be admitted: fair between tenants; of a tenant by priority, then as they came."""

    def __init__(self) -> None:
        self._of_tenants: dict[str, list[tuple[int, int, Request]]] = {}
        self._shares = FairShares[str]()
        self._arrivals = count()
        self._num_requests = 0

    def __len__(self) -> int:
        return self._num_requests

    def __iter__(self) -> Iterator[Request]:
        for entries in self._of_tenants.values():
            for *_, request in entries:
                yield request

    def add(self, request: Request) -> None:
        """The last of its tenant and priority."""
        entries = self._of_tenants.setdefault(request.owner.tenant, [])
        insort(entries, (request.owner.priority, next(self._arrivals), request))
        self._num_requests += 1

    def remove(self, request: Request) -> None:
        """It waits no more."""
        tenant = request.owner.tenant
        left = [entry for entry in self._of_tenants[tenant] if entry[-1] is not request]
        self._num_requests -= len(self._of_tenants[tenant]) - len(left)
        self._of_tenants[tenant] = left
        if not left:
            del self._of_tenants[tenant]

    def heads(self) -> list[Request]:
        """The first one of each tenant, the fairest first."""
        return [self._of_tenants[tenant][0][-1] for tenant in self._shares.in_order(self._of_tenants)]

    def start(self, request: Request) -> float:
        """When it starts in virtual time, as the first of its tenant."""
        return self._shares.start(request.owner.tenant)

    def end(self, request: Request) -> float:
        """When it ends in virtual time, as the first of its tenant, if nothing of its context is there."""
        return self.start(request) + _weighted(request, request.plan.num_tokens + request.num_tail_tokens)

    def admit(self, request: Request, num_context_tokens: int) -> None:
        """It waits no more, and its tenant is charged for its tail and so many context tokens."""
        work = _weighted(request, num_context_tokens + request.num_tail_tokens)
        self._shares.charge(request.owner.tenant, work, self._of_tenants)
        self.remove(request)

    def refund(self, request: Request) -> None:
        """It ends: what it did not generate is not charged."""
        unused = request.num_tail_tokens - request.num_fed
        if unused > 0:
            self._shares.refund(request.owner.tenant, _weighted(request, unused))


def shares_of_queries[Request: ScheduledRequest](
    reading: Collection[Request], most_tokens: int
) -> dict[Request, int]:
    """How many tokens of each query are fed: even shares, of which short ones leave some to others."""
    shares: dict[Request, int] = {}
    for num_before, request in enumerate(sorted(reading, key=lambda request: len(request.pending))):
        even = -(-most_tokens // (len(reading) - num_before))
        at_once = MAX_TOKENS_SCORED_AT_ONCE if request.scores_query else MAX_TOKENS_FED_AT_ONCE
        shares[request] = min(at_once, len(request.pending), even)
        most_tokens -= shares[request]
    return shares


def _weighted(request: ScheduledRequest, num_tokens: int) -> float:
    return max(1, num_tokens) / request.owner.share
