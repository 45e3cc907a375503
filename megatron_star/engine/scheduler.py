"""What runs next, and what fits: the driver's bookkeeping. Knows no tensor and no process group.

Memory is counted in bytes of KV per CP rank. A context is reserved on all ranks when its first request is
admitted, a tail on one rank. A tail is freed when its request ends; a context when nothing uses it and its
memory is wanted.
"""

import sys
from collections.abc import Callable
from itertools import count

from megatron_star.config import StarConfig
from megatron_star.engine.admission import Admissions, Taken
from megatron_star.engine.cached_context import TOKENS_OF_A_DIGEST, CachedContext, ContextKey
from megatron_star.engine.command import Command, Fed
from megatron_star.engine.encode_queue import EncodeQueue
from megatron_star.engine.fair_queue import WaitingRequests, shares_of_queries
from megatron_star.engine.reservation import KvMemory, Reservation, Reserver
from megatron_star.engine.scheduled_request import ScheduledRequest, Stage
from megatron_star.planning.kv_memory import MOST_PROPOSED_TOKENS, KvLayers
from megatron_star.planning.plan import ContextPlan
from megatron_star.planning.planner import Planner

RESTORED_BYTES_AT_ONCE = 1 << 26
"""By a rank in one command, beside sequences that are answered: about 0.1 s."""


class Scheduler[Request: ScheduledRequest]:
    """Queues requests, shares contexts, keeps within the budget, and says what the ranks do next."""

    def __init__(
        self,
        planner: Planner,
        *,
        kv_layers: KvLayers,
        budget_bytes_per_rank: int,
        max_running: int = 64,
    ) -> None:
        self.memory = KvMemory(planner.cp_size, kv_layers, budget_bytes_per_rank)
        self.used = [0] * planner.cp_size
        self.waiting = WaitingRequests[Request]()
        self.running: dict[int, Request] = {}
        self.contexts: dict[ContextKey, CachedContext] = {}
        self._to_encode = EncodeQueue()
        self._drop_sequences: list[int] = []
        self._drop_contexts: list[int] = []
        self._rewind: dict[int, int] = {}
        self._ids, self._clock = count(), count()
        self._reserver = Reserver(planner, self.memory)
        self._admissions = Admissions(self.waiting, self._reserver, max_running)
        self._num_changes = 0

    def check_fits(self, request: Request) -> None:
        """Raises ValueError, with what it needs and what there is, if this request can never run."""
        needed, budget = self._reserver.most_bytes_alone(request), self.memory.budget
        if needed > budget:
            raise ValueError(
                f"{request.plan.num_tokens} context tokens and their answer need {needed:,} bytes of KV on a "
                f"rank, but the budget is {budget:,} bytes a rank: use more context-parallel ranks"
            )

    def add(self, request: Request) -> None:
        """Queue a request that fits in principle."""
        request.stage = Stage.WAITING
        self.waiting.add(request)
        self._admissions.note(request)

    def admit(self) -> list[Request]:
        """Admit waiting requests, as `Admissions` orders them, as long as the next one fits; returns them."""
        admitted = []
        while self.waiting and (found := self._admissions.next(self._taken())):
            request, reservation = found
            self._start(request, reservation)
            admitted.append(request)
        return admitted

    @property
    def answering(self) -> bool:
        """A sequence waits for its next token, after others."""
        return any(request.is_answering for request in self.running.values())

    @property
    def encoding(self) -> bool:
        """The next command has a wave."""
        return self.next_to_encode is not None

    @property
    def next_to_encode(self) -> CachedContext | None:
        """The context whose waves, or layers of a store, the next commands have."""
        return self._to_encode.next

    def recut_next(self, bounded: Callable[[CachedContext], tuple[StarConfig, ContextPlan]]) -> None:
        """Let the context that is encoded next have the waves that `bounded` allows by now.

        Nothing is changed if it is being encoded already, if another context extends it, or without memory.
        """
        context = self.next_to_encode
        if not context or context.opened or any(c.parent is context for c in self.contexts.values()):
            return
        star, plan = bounded(context)
        sizes = self.memory.of_plans([plan])
        more = [new - old for new, old in zip(sizes, context.bytes_per_rank, strict=True)]
        if all(used + extra <= self.memory.budget for used, extra in zip(self.used, more, strict=True)):
            self._add(more)
            context.star, context.plan, context.bytes_per_rank = star, plan, sizes

    def next_command(self, most_query_tokens: int = sys.maxsize) -> Command:
        """Free what was dropped, feed sequences whose context is ready, and encode one wave.

        Every sequence that is answered gets its token; those that begin share `most_query_tokens`.
        """
        command = Command(drop_sequences=self._drop_sequences, drop_contexts=self._drop_contexts)
        command.rewind = list(self._rewind.items())
        self._drop_sequences, self._drop_contexts, self._rewind = [], [], {}
        fed = [request for request in self.running.values() if request.context.encoded and request.pending]
        shares = shares_of_queries([one for one in fed if not one.is_answering], most_query_tokens)
        for request in fed:
            if most := shares.get(request, 1):
                self._feed_into(command, request, most)
        self._encode_into(command)
        return command

    def rewind(self, request: Request, num_tail_tokens: int) -> None:
        """Let a sequence's tail forget its end before the next tokens, so that so many stay."""
        self._rewind[request.id] = num_tail_tokens

    def remove(self, request: Request) -> None:
        """A request ends, in whatever way; it may still be waiting."""
        if request.stage == Stage.WAITING:
            self.waiting.remove(request)
        else:
            del self.running[request.id]
            self.waiting.refund(request)
            self._rewind.pop(request.id, None)
            self._add(self._on_rank(request.tail_rank, -request.tail_bytes))
            if request.stage >= Stage.READING:
                self._drop_sequences.append(request.id)
            self._release(request.context)
        request.stage = Stage.ENDED

    def bytes_per_rank(self, request: Request) -> list[int]:
        """KV of a request's context and tail on each CP rank; the same on each TP rank of it."""
        tail = self._on_rank(request.tail_rank, request.tail_bytes)
        contexts = request.context.chain() if request.context else ()
        return [sum(sizes) for sizes in zip(tail, *(c.bytes_per_rank for c in contexts), strict=True)]

    @property
    def idle(self) -> bool:
        """There is nothing to do, and nothing to tell the ranks."""
        return not (self.waiting or self.running or self._drop_sequences or self._drop_contexts)

    def num_encoded_tokens(self, key: ContextKey) -> int | None:
        """Of a context, so far; None if nothing of it is held. Any thread may ask."""
        context = self.contexts.get(key)
        return context and context.num_encoded_tokens

    def forget(self, key: ContextKey) -> None:
        """Drop a context, and all that extend it, as soon as no sequence uses them."""
        for context in self.contexts.values():
            context.unwanted |= any(link.key == key for link in context.chain())
        while ended := [c for c in self.contexts.values() if c.unwanted and not c.users]:
            self._drop(ended[0])

    def drop_unused_contexts(self) -> None:
        """Forget every context that no sequence uses."""
        while unused := [context for context in self.contexts.values() if not context.users]:
            self._drop(unused[0])

    def _feed_into(self, command: Command, request: Request, most: int) -> None:
        if request.stage == Stage.ENCODING:
            command.open_sequences.append((request.id, request.context.id, request.tail_rank))
            request.stage = Stage.READING
        fed, request.pending = request.pending[:most], request.pending[most:]
        request.num_fed += len(fed)
        proposals = request.fed_proposals = request.proposals
        request.proposals = []
        assert len(proposals) <= MOST_PROPOSED_TOKENS and (request.is_answering or not proposals)
        is_last, is_scored = not request.pending, request.scores_query and not request.is_answering
        num_scored = len(fed) - is_last if is_scored else 0
        num_logits = num_scored + (1 + len(proposals) if is_last else 0)
        command.feed.append(Fed(request.id, [*fed, *proposals], num_logits, num_scored))

    def _encode_into(self, command: Command) -> None:
        context = self.next_to_encode
        if not context:
            return
        if not context.opened:
            command.open_context = context.opening()
            context.opened = True
        if context.entry:
            first = 1 + context.num_restored_layers
            command.restore_context = (
                context.id,
                context.entry,
                first,
                first + self._restored_at_once(context),
            )
            return
        if context.next_wave < len(context.plan.waves):
            command.encode_wave, command.score_wave = (context.id, context.next_wave), context.scoring
            wave = context.plan.waves[context.next_wave]
            self._to_encode.charge(context, sum(segment.num_tokens for segment in wave))
            context.next_wave += 1
        if context.encoded:
            self._to_encode.remove(context)

    def note_restored(self, context: CachedContext, end_layer: int) -> None:
        """All ranks have read the layers before this one: with the last of them, no wave is left to run."""
        num_tokens = context.plan.num_tokens - context.plan.start
        share = (end_layer - 1 - context.num_restored_layers) / self._num_layers
        self._to_encode.charge(context, share * num_tokens)
        context.num_restored_layers = end_layer - 1
        if context.num_restored_layers == self._num_layers:
            context.next_wave = len(context.plan.waves)
            self._to_encode.remove(context)

    def encode_anew(self, context: CachedContext) -> None:
        """It could not be read: the ranks forget what they have of it, and its waves come next."""
        self._drop_contexts.append(context.id)
        context.opened, context.entry, context.num_restored_layers = False, "", 0

    def hold(self, context: CachedContext) -> None:
        """It is in use until `let_go`."""
        context.users += 1

    def let_go(self, context: CachedContext) -> None:
        """What `hold` has held; its memory may be taken from now on."""
        self._release(context)
        self._num_changes += 1

    @property
    def _num_layers(self) -> int:
        return len(self.memory.layers.masks)

    def _restored_at_once(self, context: CachedContext) -> int:
        """All layers that are left; while sequences are answered, as few as keep them from waiting long."""
        left = self._num_layers - context.num_restored_layers
        bytes_of_a_layer = max(1, max(context.bytes_per_rank) // self._num_layers)
        return min(left, max(1, RESTORED_BYTES_AT_ONCE // bytes_of_a_layer)) if self.answering else left

    def _taken(self) -> Taken[Request]:
        return Taken(self.running.values(), self.contexts, self.used, self._num_changes)

    def _start(self, request: Request, reservation: Reservation) -> None:
        num_new = sum(plan.num_tokens - plan.start for plan in reservation.plans)
        self.waiting.admit(request, num_new)
        for unused in reservation.dropped:
            self._drop(unused)
        context = reservation.base
        request.num_cached_tokens = reservation.num_reused
        for plan in reservation.plans:
            context = self._new_context(request, plan, parent=context)
        context.users += 1
        context.last_use = next(self._clock)
        for awaited in context.chain():
            awaited.priority = min(awaited.priority, request.owner.priority)
        request.context, request.stage = context, Stage.ENCODING
        request.tail_rank, request.tail_bytes = reservation.tail_rank, reservation.tail_bytes
        self._add(self._on_rank(request.tail_rank, request.tail_bytes))
        self.running[request.id] = request

    def _new_context(
        self, request: Request, plan: ContextPlan, parent: CachedContext | None
    ) -> CachedContext:
        end, key = plan.num_tokens, request.keys[plan.num_tokens]
        context = CachedContext(
            id=next(self._ids),
            key=key,
            token_ids=request.context_tokens[:end],
            digests=request.digests[: end // TOKENS_OF_A_DIGEST],
            star=request.planned.star,
            edges=tuple(edge for edge in request.planned.edges if edge <= end),
            plan=plan,
            parent=parent,
            bytes_per_rank=self.memory.of_plans([plan]),
            is_long=request.is_long,
            owner=request.owner,
            priority=request.owner.priority,
            last_use=next(self._clock),
            scoring=request.scoring,
            unwanted=bool(parent and parent.unwanted),
        )
        if parent:
            parent.users += 1
        assert key not in self.contexts
        self.contexts[key] = context
        self._to_encode.add(context)
        self._add(context.bytes_per_rank)
        return context

    def _release(self, context: CachedContext) -> None:
        """One user fewer; without one, what is unwanted goes, and what is not encoded is not worth it."""
        context.users -= 1
        if not context.users and (context.unwanted or not context.encoded):
            self._drop(context)

    def _drop(self, context: CachedContext) -> None:
        del self.contexts[context.key]
        if context in self._to_encode:
            self._to_encode.remove(context)
        if context.opened:
            self._drop_contexts.append(context.id)
        self._add([-size for size in context.bytes_per_rank])
        if context.parent:
            self._release(context.parent)

    def _on_rank(self, rank: int, num_bytes: int) -> list[int]:
        return [num_bytes if rank == other else 0 for other in range(self.memory.cp_size)]

    def _add(self, sizes: list[int]) -> None:
        """Note that so many bytes of each rank are taken or given back; every change comes through here."""
        self.used = [used + size for used, size in zip(self.used, sizes, strict=True)]
        self._num_changes += 1
