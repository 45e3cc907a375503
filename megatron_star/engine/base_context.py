"""Which contexts a request may build on: that have what is encoded for its first tokens, and are worth it."""

from collections.abc import Collection, Iterator, Mapping
from typing import NamedTuple

from megatron_star.engine.cached_context import TOKENS_OF_A_DIGEST, CachedContext, ContextKey
from megatron_star.engine.scheduled_request import ScheduledRequest
from megatron_star.planning.layer_mask import LayerMask
from megatron_star.planning.planner import MOST_LINKS, Planner
from megatron_star.planning.shared_prefix import num_equal_items, num_kept_tokens, num_shared_tokens

SMALLEST_SHARE_SAVED = 1 / 8
"""Of a request's context: for less, no further context is kept, and attended to in calls of its own."""
SMALLEST_SHARE_USED, SMALLEST_SHARE_AWAITED = 1 / 4, 1 / 2
"""Of a context that is encoded, and of one that is about to be: a request that uses less of it would hold the
memory of all, or wait for all, and for what nobody else may want any more."""


class Base(NamedTuple):
    """A context, and how many of its first tokens are used."""

    context: CachedContext
    num_tokens: int


class Bases:
    """Finds contexts to build on, of a model whose layers have these masks of their own."""

    def __init__(self, planner: Planner, own_masks: Collection[LayerMask]) -> None:
        self.planner, self.own_masks = planner, own_masks

    def of(self, request: ScheduledRequest, contexts: Mapping[ContextKey, CachedContext]) -> Iterator[Base]:
        """The best one first: the request's own context, then those with most of its first tokens."""
        num_tokens = request.plan.num_tokens
        own = contexts.get(request.key)
        if own:
            yield Base(own, num_tokens)
        others = [context for context in contexts.values() if context is not own]
        found = [Base(context, self._num_usable(request, context)) for context in others]
        worthy = [base for base in found if self._is_worth_it(request, base)]
        for base in sorted(worthy, key=_merit, reverse=True):
            yield shortened(base, num_tokens)

    def _num_usable(self, request: ScheduledRequest, context: CachedContext) -> int:
        """How many first tokens of a context the request may use; 0 if its parent has all of these."""
        start, end = context.plan.start, context.plan.num_tokens
        most = num_shared_tokens(request.plan.mask, context.plan.mask)
        if most <= start or request.is_long != context.is_long or not _may_share(request, context):
            return 0
        most = num_kept_tokens(self.own_masks, min(most, _num_equal_tokens(request, context)), end)
        return most if most > start else 0

    def _is_worth_it(self, request: ScheduledRequest, base: Base) -> bool:
        """Whether it saves much, and little is held or awaited for it.

        A turn of the request always is, where turns have contexts of their own: there cannot be two of it.
        """
        context, num_reused = base
        if self.planner.keeps_turns and request.keys.get(num_reused) == context.key:
            return True
        least_used = SMALLEST_SHARE_USED if context.encoded else SMALLEST_SHARE_AWAITED
        saves = 0 < num_reused >= SMALLEST_SHARE_SAVED * request.plan.num_tokens
        return saves and num_reused >= least_used * context.plan.num_tokens


def shortened(base: Base, num_tokens: int) -> Base:
    """The base that a context of `num_tokens` really extends, so that its chain has at most `MOST_LINKS`.

    Where the chain would be longer, its last links are encoded again, as one: as many as have fewer tokens
    than what is encoded after them anyway. So of a conversation that grows, each token is encoded again a few
    times at most: it is then in a link that is twice as long.
    """
    context, num_reused = base
    if context.num_links < MOST_LINKS:
        return base
    while context.parent and (
        context.num_links >= MOST_LINKS or num_reused - context.plan.start <= num_tokens - num_reused
    ):
        context, num_reused = context.parent, context.plan.start
    return Base(context, num_reused)


def _may_share(request: ScheduledRequest, context: CachedContext) -> bool:
    """Whether a context is of those that the request may use, and may show that are there."""
    is_shared = request.scoring is None and context.scoring is None
    return is_shared and request.owner.salt == context.owner.salt


def _merit(base: Base) -> tuple[int, int, int]:
    """Most tokens, then fewest links, then last used."""
    return base.num_tokens, -base.context.num_links, base.context.last_use


def _num_equal_tokens(request: ScheduledRequest, context: CachedContext) -> int:
    """How many tokens both begin with."""
    sure = TOKENS_OF_A_DIGEST * num_equal_items(request.digests, context.digests)
    further = slice(sure, sure + TOKENS_OF_A_DIGEST)
    return sure + num_equal_items(request.context_tokens[further], context.token_ids[further])
