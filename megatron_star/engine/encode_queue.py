"""Which context's wave is next, of those that are to be encoded.

Tenants share the waves by their weights, and of a tenant's contexts the more urgent ones are first. Of these,
short ones and long ones are flows of their own: a short context passes between two waves of a long one, which
goes on all the same while short ones keep coming. Contexts of one size are encoded one after the other.
"""

from megatron_star.engine.cached_context import CachedContext
from megatron_star.engine.fair_queue import FairShares

BITS_OF_THE_SHORTEST = 10
"""Contexts of up to 1023 tokens are of the first size; each further size has four times as many."""


class EncodeQueue:
    """Contexts that are not encoded yet, in the order in which they came."""

    def __init__(self) -> None:
        self._contexts: list[CachedContext] = []
        self._tenants = FairShares[str]()
        self._sizes: dict[str, FairShares[int]] = {}

    def __bool__(self) -> bool:
        return bool(self._contexts)

    def __contains__(self, context: CachedContext) -> bool:
        return context in self._contexts

    def add(self, context: CachedContext) -> None:
        """Behind those of its tenant, priority and size; and behind those that it extends."""
        self._contexts.append(context)

    def remove(self, context: CachedContext) -> None:
        """It is encoded, or nobody wants it any more."""
        self._contexts.remove(context)
        tenant = context.owner.tenant
        if all(other.owner.tenant != tenant for other in self._contexts):
            self._sizes.pop(tenant, None)

    @property
    def next(self) -> CachedContext | None:
        """The one whose wave, or layers of a store, come next."""
        ready = self._ready()
        if not ready:
            return None
        tenant, *_ = self._tenants.in_order({context.owner.tenant: None for context in ready})
        of_tenant = [context for context in ready if context.owner.tenant == tenant]
        priority = min(context.priority for context in of_tenant)
        urgent = [context for context in of_tenant if context.priority == priority]
        size, *_ = self._sizes_of(tenant).in_order({_size(context): None for context in urgent})
        return next(context for context in urgent if _size(context) == size)

    def charge(self, context: CachedContext, num_tokens: float) -> None:
        """So many of its tokens are encoded next."""
        ready, tenant = self._ready(), context.owner.tenant
        self._tenants.charge(
            tenant, num_tokens / context.owner.share, {other.owner.tenant: None for other in ready}
        )
        sizes = {_size(other): None for other in ready if other.owner.tenant == tenant}
        self._sizes_of(tenant).charge(_size(context), num_tokens / _weight(_size(context)), sizes)

    def _ready(self) -> list[CachedContext]:
        """Those that extend nothing which is not encoded yet."""
        return [context for context in self._contexts if not context.parent or context.parent.encoded]

    def _sizes_of(self, tenant: str) -> FairShares[int]:
        return self._sizes.setdefault(tenant, FairShares())


def _size(context: CachedContext) -> int:
    num_tokens = context.plan.num_tokens - context.plan.start
    return max(0, num_tokens.bit_length() - BITS_OF_THE_SHORTEST + 1) // 2


def _weight(size: int) -> float:
    """Of short ones, more: they wait for less, and so each wave beside them counts for more."""
    return 1 / (1 + size)
