"""Which waiting request is admitted next, and what it takes then: found, and nothing changed."""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from megatron_star.engine.cached_context import CachedContext, ContextKey
from megatron_star.engine.fair_queue import WaitingRequests
from megatron_star.engine.reservation import Reservation, Reserver
from megatron_star.engine.scheduled_request import ScheduledRequest

RESERVED_PARTS = 8
"""With several tenants, one of so many parts of places and memory is for those that run nothing."""


@dataclass(frozen=True)
class Taken[Request: ScheduledRequest]:
    """
    Attributes:
        running: requests.
        contexts: in use or not.
        bytes_per_rank: of all that.
        num_changes: so far, to any of it.
    """

    running: Collection[Request]
    contexts: Mapping[ContextKey, CachedContext]
    bytes_per_rank: list[int]
    num_changes: int


class Admissions[Request: ScheduledRequest]:
    """Chooses among the first waiting requests of all tenants, fairly.

    One that does not fit is passed by other tenants' requests, but only by as much work as it takes itself:
    then nothing is admitted before it. Tenants that run something leave a part of places and memory to those
    that run nothing, who are thus neither kept out by long requests nor passed for ever.
    """

    def __init__(self, waiting: WaitingRequests[Request], reserver: Reserver, max_running: int) -> None:
        self.waiting, self.reserver, self.max_running = waiting, reserver, max_running
        self._tenants: set[str] = set()
        self._in_vain: tuple[int, set[Request]] = 0, set()

    def note(self, request: Request) -> None:
        """Its tenant exists."""
        self._tenants.add(request.owner.tenant)

    def next(self, taken: Taken[Request]) -> tuple[Request, Reservation] | None:
        """The request that is admitted now, and how; None if nobody fits whose turn it is."""
        tenants_running = {request.owner.tenant for request in taken.running}
        latest = {True: math.inf, False: math.inf}
        for request in self.waiting.heads():
            runs = request.owner.tenant in tenants_running
            if self.waiting.start(request) >= latest[runs]:
                continue
            leaves_a_part = runs and len(self._tenants) > 1
            if reservation := self._reservation(request, taken, leaves_a_part=leaves_a_part):
                return request, reservation
            for held_up in (True,) if runs else (True, False):
                latest[held_up] = min(latest[held_up], self.waiting.end(request))
        return None

    def _reservation(
        self, request: Request, taken: Taken[Request], *, leaves_a_part: bool
    ) -> Reservation | None:
        """How the request can be admitted, if it can; not looked for again until something has changed."""
        num_changes, in_vain = self._in_vain
        if num_changes != taken.num_changes:
            in_vain = set()
            self._in_vain = taken.num_changes, in_vain
        places, budget = self.max_running, self.reserver.memory.budget
        if leaves_a_part:
            places, budget = places - places // RESERVED_PARTS, budget - budget // RESERVED_PARTS
        if request in in_vain or len(taken.running) >= places:
            return None
        reservation = self.reserver.find(request, taken.contexts, taken.bytes_per_rank, budget)
        if not reservation:
            in_vain.add(request)
        return reservation
